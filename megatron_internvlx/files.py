"""Files of a run: where checkpoints lie, and writing that leaves no half file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"


def iterations(save: Path) -> list[int]:
    """Iterations that have a checkpoint directory, newest first, complete or not."""
    found = (re.fullmatch(r"iter_(\d{7,})", path.name) for path in save.glob("iter_*"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def checkpoint_directory(save: Path, iteration: int) -> Path:
    """Where Megatron puts a checkpoint."""
    return save / f"iter_{iteration:07d}"


@contextmanager
def unfinished(path: Path, mark: str = "") -> Iterator[Path]:
    """A name beside `path` to write under; the file gets its final name when the block ends without an error.

    After an error, or a kill, nothing is under the final name that was not there before. `mark` tells writers of the
    same file apart.
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
    """All of the text under the final name and on the disk, or nothing."""
    # Ranks that fail at the same moment write the same file.
    with unfinished(path, f"{os.getpid()}.") as partial, partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
