"""JSONL annotations for Energon: selected lines of a file, and the index of line offsets."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_internvlx.data.manifest import DatasetEntry


def write_index(path: Path, offsets: np.ndarray) -> None:
    """Write Energon's index of a JSONL file: uint64 offsets of the records, and the size of the file."""
    offsets.astype("<u8").tofile(path.with_suffix(".jsonl.idx"))


def copy_lines(entry: DatasetEntry, indices: Iterable[int], path: Path) -> None:
    """Copy records to another JSONL file, and write its index and the original line numbers."""
    offsets, lines = [0], []
    with path.open("wb") as out:
        for index in indices:
            data = entry.file.line(index) + b"\n"
            out.write(data)
            offsets.append(offsets[-1] + len(data))
            lines.append(int(entry.file.key(index).rsplit(":", 1)[1]))
    write_index(path, np.asarray(offsets))
    np.save(path.with_suffix(".lines.npy"), np.asarray(lines, np.int64))
