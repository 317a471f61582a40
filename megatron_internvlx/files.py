"""Files of a run: where checkpoints lie, and writing that leaves no half file."""

from __future__ import annotations

import os
import re
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"


def iterations(save: Path) -> list[int]:
    """Iterations that have a checkpoint directory, newest first, complete or not."""
    found = (re.fullmatch(r"iter_(\d{7,})", path.name) for path in save.glob("iter_*"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def checkpoint_directory(save: Path, iteration: int) -> Path:
    """Where Megatron puts a checkpoint."""
    return save / f"iter_{iteration:07d}"


def write_atomically(path: Path, text: str) -> None:
    """All of the text under the final name, or nothing."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
