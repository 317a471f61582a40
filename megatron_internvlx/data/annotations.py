"""JSONL annotations as Energon reads them: some lines of a file, and where each begins."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_internvlx.data.manifest import DatasetEntry


def write_index(path: Path, offsets: np.ndarray) -> None:
    """Energon's index of a JSONL file: uint64 starts of the records, and the size of the file."""
    offsets.astype("<u8").tofile(path.with_suffix(".jsonl.idx"))


def copy_lines(entry: DatasetEntry, indices: Iterable[int], path: Path) -> None:
    """Write these records to a JSONL file of its own, with its index and their original line numbers."""
    offsets, lines = [0], []
    with path.open("wb") as out:
        for index in indices:
            data = entry.file.line(index) + b"\n"
            out.write(data)
            offsets.append(offsets[-1] + len(data))
            lines.append(int(entry.file.key(index).rsplit(":", 1)[1]))
    write_index(path, np.asarray(offsets))
    np.save(path.with_suffix(".lines.npy"), np.asarray(lines, np.int64))
