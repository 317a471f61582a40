"""Files of a run: locations of checkpoints, and atomic writing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"


def iterations(save: Path) -> list[int]:
    """Iterations that have a checkpoint directory, newest first, whether complete or not."""
    found = (re.fullmatch(r"iter_(\d{7,})", path.name) for path in save.glob("iter_*"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def checkpoint_directory(save: Path, iteration: int) -> Path:
    """Directory in which Megatron saves the checkpoint of an iteration."""
    return save / f"iter_{iteration:07d}"


@contextmanager
def atomic_path(path: Path, mark: str = "") -> Iterator[Path]:
    """Temporary path to write to, renamed to `path` when the block ends without an error.

    After an error or a kill, `path` is as it was before. `mark` distinguishes processes that write the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{mark}partial")
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file completely, flushed to the disk, or not at all."""
    # Ranks that fail at the same moment write the same file.
    with atomic_path(path, f"{os.getpid()}.") as partial, partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
