"""InternVL's description of a training set: a `meta.json` that names JSONL files of conversations.

`meta.json` is `{name: {root, annotation, data_augment, repeat_time, max_dynamic_patch, length}}`; keys that begin
with `_` are comments. Records stay on disk; only their byte offsets are held in memory (16 bytes each).
"""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.paths import is_url
from megatron_internvlx.recipe import similar

_CHUNK_BYTES = 1 << 24
_KEYS = ("root", "annotation", "data_augment", "repeat_time", "max_dynamic_patch", "length")
MAX_REPEAT = 1000
"""Largest `repeat_time`; for a longer run, use --train-iters."""
MAX_EPOCH = 1 << 28
"""Maximum records of an epoch; their permutation is held in memory, 8 bytes each."""


def read_json(text: str | bytes) -> Any:
    """Parse JSON like `json.loads`, but reject duplicate keys, of which it would silently use the last.

    Raises ValueError, and RecursionError for brackets nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_reject_duplicate_keys)


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate key {twice!r}")
    return found


@dataclass(frozen=True)
class Record:
    """Parsed line of a JSONL file: its `key` (`file.jsonl:12`), JSON object, and settings of its dataset.

    `root` is the folder of its images, `max_tiles` the dataset's own maximum or None.
    """

    key: str
    data: dict[str, Any]
    root: str
    data_augment: bool
    max_tiles: int | None


class JsonlFile:
    """Records of a JSONL file by number, read from disk on access. Blank lines are not records.

    `label` is the name of the file in keys. Picklable: each process opens the file for itself.
    """

    def __init__(self, path: Path, label: str):
        self.path, self.label = path, label
        self._fd: int | None = None
        starts, lengths = self._scan()
        # Only short lines can be blank.
        blank = [i for i in np.flatnonzero(lengths <= 4) if not self._read(starts[i], lengths[i]).strip()]
        self._numbers: np.ndarray | None = None
        if any(number != len(starts) - 1 for number in blank):  # nothing follows the last line end
            self._numbers = np.delete(np.arange(1, len(starts) + 1), blank)
        self._starts, self._lengths = np.delete(starts, blank), np.delete(lengths, blank)
        if len(self) and self._read(self._starts[0], min(64, self._lengths[0])).lstrip()[:1] == b"[":
            raise ValueError(
                f"{path} starts with '[': it must be JSONL, one record per line, not a JSON array"
            )

    def _scan(self) -> tuple[np.ndarray, np.ndarray]:
        breaks, size = [], 0
        with self.path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                breaks.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10) + size)
                size += len(chunk)
        stops = np.concatenate([*breaks, [size]]).astype(np.int64)
        starts = np.concatenate([[0], stops[:-1] + 1])
        return starts, np.maximum(stops - starts, 0)

    def _read(self, start: int, length: int) -> bytes:
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDONLY)
        return os.pread(
            self._fd, int(length), int(start)
        )  # no shared file position: safe in threads and forks

    def __len__(self) -> int:
        return len(self._starts)

    def key(self, index: int) -> str:
        """Key of record `index`: file name and line number."""
        return f"{self.label}:{index + 1 if self._numbers is None else self._numbers[index]}"

    def offsets(self) -> np.ndarray | None:
        """Byte offsets of the records and the file's size, int64 [records + 1]; None if there are blank lines."""
        if self._numbers is not None:
            return None
        return np.append(self._starts, self.path.stat().st_size)

    def line(self, index: int) -> bytes:
        """Raw text of record `index`, without surrounding white space."""
        return self._read(self._starts[index], self._lengths[index]).strip()

    def __getitem__(self, index: int) -> dict[str, Any]:
        line = self.line(index)
        try:
            data = read_json(line)
        except (ValueError, RecursionError) as error:
            raise BadSample(self.key(index), "malformed_json", f"not valid JSON: {error}") from error
        if not isinstance(data, dict):
            raise BadSample(
                self.key(index), "malformed_json", f"expected a JSON object, found {type(data).__name__}"
            )
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fd": None}

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            os.close(self._fd)  # type: ignore[arg-type]


@dataclass(frozen=True)
class DatasetEntry:
    """One dataset of `meta.json`; `repeat_time` is how often an epoch contains each of its records."""

    name: str
    file: JsonlFile
    root: str
    data_augment: bool
    repeat_time: float
    max_tiles: int | None

    @property
    def epoch_size(self) -> int:
        """Number of records in an epoch: `floor(repeat_time * records)`."""
        return math.floor(self.repeat_time * len(self.file) + 1e-6)

    def select(self, position: int) -> int:
        """Record number at `position` of the unshuffled epoch.

        Each whole repeat uses every record. The fractional rest uses records spread evenly over the file, the
        same ones each epoch; the released code uses the first lines.
        """
        records = len(self.file)
        whole = math.floor(self.repeat_time + 1e-9) * records
        if position < whole:
            return position % records
        return (position - whole) * records // (self.epoch_size - whole)


def _resolve(path: str, folder: Path) -> Path:
    """Return `path` if it exists, otherwise the path relative to the folder of `meta.json`."""
    given = Path(path).expanduser()
    if not given.parts:  # "" and ".": the working directory always exists
        return folder
    return given if given.is_absolute() or given.exists() else folder / given


def _read_number(
    name: str, entry: dict[str, Any], key: str, default: Any, least: float, most: float = 1 << 31
) -> Any:
    value = entry.get(key, default)
    if value is None and default is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not least <= value <= most
    ):
        raise ValueError(
            f"dataset {name!r}: {key} is {value!r}; it must be a number between {least} and {most}"
        )
    return value


def _parse_entry(name: str, entry: Any, folder: Path) -> DatasetEntry:
    if not isinstance(entry, dict) or not {"root", "annotation"} <= entry.keys():
        has = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"dataset {name!r} needs the keys 'root' and 'annotation'; it has {has}")
    for key in ("root", "annotation"):
        if not isinstance(entry[key], str):
            raise ValueError(f"dataset {name!r}: {key} must be a path, found {entry[key]!r}")
    if unknown := [key for key in entry if key not in _KEYS and not key.startswith("_")]:
        named = ", ".join(f"{key!r}{similar(key, _KEYS)}" for key in unknown)
        raise ValueError(
            f"dataset {name!r}: unknown keys {named}; known are {', '.join(_KEYS)}, and comments starting with '_'"
        )
    if not isinstance(entry.get("data_augment", False), bool):
        raise ValueError(
            f"dataset {name!r}: data_augment is {entry['data_augment']!r}; it must be true or false"
        )
    annotation = _resolve(entry["annotation"], folder)
    if not annotation.is_file():
        raise ValueError(
            f"dataset {name!r}: annotation file {entry['annotation']!r} not found, also not in {folder}"
        )
    max_tiles = _read_number(name, entry, "max_dynamic_patch", None, 1)
    if max_tiles is not None and max_tiles != int(max_tiles):
        raise ValueError(f"dataset {name!r}: max_dynamic_patch is {max_tiles}; it must be a whole number")
    return DatasetEntry(
        name=name,
        file=JsonlFile(annotation, entry["annotation"]),
        root=entry["root"] if is_url(entry["root"]) else str(_resolve(entry["root"], folder)),
        data_augment=entry.get("data_augment", False),
        repeat_time=_read_number(name, entry, "repeat_time", 1, 0, MAX_REPEAT),
        max_tiles=None if max_tiles is None else int(max_tiles),
    )


class Manifest:
    """All datasets of a `meta.json`, concatenated with their repeats; `len` is the size of an epoch.

    Relative paths that do not exist, and an empty root, are relative to the folder of `meta.json`.
    `repeat_time` 0 excludes a dataset. `length` is ignored. With `each_once`, for held-out data, any other
    `repeat_time` counts as 1.

    Raises ValueError with the file and dataset: unreadable JSON, missing keys, missing annotation, values
    out of range, no records.
    """

    def __init__(self, path: str | Path, *, each_once: bool = False):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"meta file {self.path} not found")
        try:
            meta = read_json(self.path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path} is not valid JSON: {error}") from error
        if not isinstance(meta, dict):
            raise ValueError(
                f"{self.path} must contain an object {{name: dataset}}, found {type(meta).__name__}"
            )
        try:
            self.entries = [_parse_entry(name, entry, self.path.parent) for name, entry in meta.items()]
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        if each_once:
            self.entries = [replace(e, repeat_time=float(e.repeat_time > 0)) for e in self.entries]
        if (records := sum(entry.epoch_size for entry in self.entries)) > MAX_EPOCH:
            raise ValueError(
                f"{self.path}: an epoch has {records:,} records, must be at most {MAX_EPOCH:,}: lower repeat_time"
            )
        self._ends = np.cumsum([entry.epoch_size for entry in self.entries], dtype=np.int64)
        if not len(self):
            held = ", ".join(f"{e.name}: {len(e.file)} records x {e.repeat_time}" for e in self.entries)
            raise ValueError(f"{self.path}: the data set is empty ({held or 'it names no dataset'})")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _locate(self, position: int) -> tuple[DatasetEntry, int]:
        """Dataset, and number in its file, of the record at `position`."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} is outside an epoch of {len(self)} records")
        number = int(np.searchsorted(self._ends, position, side="right"))
        entry = self.entries[number]
        return entry, entry.select(position - (int(self._ends[number - 1]) if number else 0))

    def key(self, position: int) -> str:
        """Key (file:line) of the record at `position` of the unshuffled epoch, without reading it."""
        entry, index = self._locate(position)
        return entry.file.key(index)

    def record(self, position: int) -> Record:
        """Read the record at `position` of the unshuffled epoch. Raises BadSample (malformed_json) with its key."""
        entry, index = self._locate(position)
        return Record(
            entry.file.key(index), entry.file[index], entry.root, entry.data_augment, entry.max_tiles
        )

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """Shuffled positions of an epoch, int64 [len]: a permutation that depends only on seed and epoch."""
        return np.random.default_rng([seed, epoch]).permutation(len(self))
