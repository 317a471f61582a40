"""Files of a run: locations of checkpoints, JSON objects, and atomic writing."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


def iterations(save: Path) -> list[int]:
    """Iterations that have a checkpoint directory, newest first, whether complete or not."""
    found = (step_of(path) for path in save.glob("iter_*"))
    return sorted((step for step in found if step is not None), reverse=True)


def checkpoint_directory(save: Path, iteration: int) -> Path:
    """Directory in which Megatron saves the checkpoint of an iteration."""
    return save / f"iter_{iteration:07d}"


def newest_checkpoint(folder: Path) -> Path | None:
    """Directory of the checkpoint that Megatron loads from `folder`, an import or a run; None without one."""
    try:
        latest = (folder / TRACKER).read_text(errors="replace").strip()
    except OSError:
        return None
    if latest != RELEASE and not latest.isdecimal():
        return None
    checkpoint = folder / RELEASE if latest == RELEASE else checkpoint_directory(folder, int(latest))
    return checkpoint if checkpoint.is_dir() else None


def step_of(checkpoint: Path | None) -> int | None:
    """Step of a checkpoint's directory; None for an import's, and without one."""
    match = re.fullmatch(r"iter_(\d{7,})", checkpoint.name) if checkpoint else None
    return int(match[1]) if match else None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object. Raises ValueError if it is missing or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: not readable: brackets are nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


class FileWindow(io.RawIOBase):
    """File object for a range of bytes of an open file; torch reads tensors from it without a copy.

    Args:
        file: the file, opened in binary mode.
        start: first byte of the range.
        length: number of its bytes.
    """

    def __init__(self, file: io.RawIOBase, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def seekable(self) -> bool:
        """Whether `seek` works: always."""
        return True

    def tell(self) -> int:
        """Position in the range, in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position in the range; returns it."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the present position on; returns the number of bytes."""
        view = memoryview(buffer).cast("B")
        view = view[: max(self._length - self._at, 0)]
        got = os.preadv(self._file.fileno(), [view], self._start + self._at) if len(view) else 0
        self._at += got
        return got


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
