"""Files of a prepared directory, as typed values: all reading and writing of its tables is here.

OUT/prepared.json                `PreparedSet` of every data set; written last
OUT/metadataset.yaml             Energon's MetadatasetV2: the `Part`s to blend
OUT/validation/meta.json         held-out records, as another InternVL meta file
OUT/broken.jsonl                 unreadable images, lines and records
OUT/<set>/done.json              the set's `PreparedSet`, and a fingerprint of its input
OUT/<set>/media/                 `SizeTable`
OUT/<set>/shards/*.tar           a `ShardRecord` and images per record
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.files import write_atomically
from megatron_internvlx.paths import is_url

VERSION = 1
MARK = "prepared.json"
METADATASET = "metadataset.yaml"
BROKEN_LIST = "broken.jsonl"
SHARD_JSON = "record.json"
"""Extension of the JSON file of each record in a shard."""

_BROKEN = "broken"
_TURNED = ";turned"
_MOST_DETAIL = 500  # characters kept of an error


@dataclass(frozen=True)
class RecordedImage:
    """Header of one image, as Energon's media metadata stores it; `format` is "broken" if it was unreadable.

    `width` and `height` are in pixels, upright. `mode` ends with ";turned" if EXIF swaps the two; of a broken image
    it is the cause and the detail.
    """

    width: int
    height: int
    format: str
    mode: str = "RGB"

    @classmethod
    def readable(cls, width: int, height: int, kind: str, *, turned: bool) -> RecordedImage:
        """Entry of an image whose upright size is `width` x `height`; `turned`: EXIF swaps the two."""
        return cls(width, height, kind, "RGB" + (_TURNED if turned else ""))

    @classmethod
    def unreadable(cls, cause: str, detail: str) -> RecordedImage:
        """Entry of a broken image."""
        return cls(0, 0, _BROKEN, f"{cause}: {detail}"[:_MOST_DETAIL])

    @property
    def broken(self) -> bool:
        """Whether the image could not be read."""
        return self.format == _BROKEN

    def reject(self, key: str) -> BadSample:
        """Error that was found in a broken image, under the name `key`."""
        cause, _, detail = self.mode.partition(": ")
        return BadSample(key, cause, detail)

    def size(self, name: str, *, apply_exif: bool) -> tuple[int, int]:
        """Width and height in pixels. Raises BadSample named `name` if the image is broken."""
        if self.broken:
            bad = self.reject(name)
            raise BadSample(name, bad.cause, f"broken when sizes were recorded: {bad.detail}")
        swapped = self.mode.endswith(_TURNED) and not apply_exif
        return (self.height, self.width) if swapped else (self.width, self.height)


class SizeTable:
    """Recorded headers of one data set's images: Energon's media metadata, an SQLite file below `folder`.

    SQLite connections must not be shared, so every process and thread opens its own for reading.
    """

    def __init__(self, folder: Path):
        self.path = folder / ".nv-meta" / "index.sqlite"
        self._local = threading.local()

    @contextmanager
    def edit(self) -> Iterator[SizeTableEditor]:
        """Open the table for changes; create it if missing. Raises ValueError if the file is damaged."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(self.path)) as connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS media_metadata (entry_key TEXT PRIMARY KEY, "
                    "metadata_type TEXT NOT NULL, metadata_json TEXT NOT NULL)"
                )
                yield SizeTableEditor(connection)
        except sqlite3.Error as error:
            remedy = "delete it if it is damaged, or prepare into another directory"
            raise ValueError(f"{self.path}: {error}: {remedy}") from error

    def find(self, name: str) -> RecordedImage | None:
        """Entry of an image, or None."""
        local = self._local
        if getattr(local, "owner", None) != os.getpid():
            local.owner = os.getpid()
            local.db = sqlite3.connect(f"file:{self.path}?mode=ro&immutable=1", uri=True)
        return _find(local.db, name)

    def size(self, name: str, *, apply_exif: bool) -> tuple[int, int] | None:
        """Width and height in pixels, or None if not recorded. Raises BadSample if the image is broken."""
        found = self.find(name)
        return None if found is None else found.size(name, apply_exif=apply_exif)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self._local = state["path"], threading.local()


class SizeTableEditor:
    """Open `SizeTable`; see `SizeTable.edit`. Every method commits its changes."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection

    def names(self) -> set[str]:
        """Names of all recorded images."""
        return {row[0] for row in self._connection.execute("SELECT entry_key FROM media_metadata")}

    def find(self, name: str) -> RecordedImage | None:
        """Entry of an image, or None."""
        return _find(self._connection, name)

    def broken(self) -> list[tuple[str, RecordedImage]]:
        """Names and entries of all broken images."""
        rows = self._connection.execute(
            "SELECT entry_key, metadata_json FROM media_metadata "
            "WHERE json_extract(metadata_json, '$.format') = ?",
            (_BROKEN,),
        )
        return [(name, RecordedImage(**json.loads(text))) for name, text in rows]

    def add(self, entries: Iterable[tuple[str, RecordedImage]]) -> None:
        """Add or replace entries."""
        rows = [(name, json.dumps(asdict(entry))) for name, entry in entries]
        self._connection.executemany("INSERT OR REPLACE INTO media_metadata VALUES (?, 'image', ?)", rows)
        self._connection.commit()

    def remove(self, names: Iterable[str]) -> None:
        """Remove entries."""
        rows = [(name,) for name in names]
        self._connection.executemany("DELETE FROM media_metadata WHERE entry_key = ?", rows)
        self._connection.commit()


def _find(connection: sqlite3.Connection, name: str) -> RecordedImage | None:
    query = "SELECT metadata_json FROM media_metadata WHERE entry_key = ?"
    row = connection.execute(query, (name,)).fetchone()
    return None if row is None else RecordedImage(**json.loads(row[0]))


def size_table(out: Path, data_set: str) -> SizeTable:
    """Recorded image sizes of a data set."""
    return SizeTable(out / data_set / "media")


@dataclass(frozen=True)
class ShardRecord:
    """JSON file of one record in a shard: its key, the headers of its images by their names in the shard, its data."""

    key: str
    sizes: dict[str, RecordedImage]
    record: dict[str, Any]

    def to_json(self) -> bytes:
        """Contents of the file."""
        return json.dumps(asdict(self), ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, text: bytes | str) -> ShardRecord:
        """Inverse of `to_json`."""
        found = json.loads(text)
        sizes = {name: RecordedImage(**entry) for name, entry in found["sizes"].items()}
        return cls(found["key"], sizes, found["record"])


@dataclass(frozen=True)
class Flavors:
    """Properties of a part that Energon attaches to each of its samples ("subflavors").

    `label` names the annotation file in messages, empty for shards. Relative to the prepared directory are `root`, the
    folder or URL of the images, and `lines`, the file of line numbers of copied records, None if the annotations are
    linked.
    """

    data_set: str
    data_augment: bool
    max_tiles: int | None
    label: str = ""
    root: str = ""
    lines: str | None = None

    @property
    def sharded(self) -> bool:
        """Whether the part is in shards."""
        return not self.label

    def image_root(self, out: Path) -> str:
        """Folder or URL of the images."""
        return self.root if is_url(self.root) else str(out / self.root)

    def to_dict(self) -> dict[str, Any]:
        """Entry for `metadataset.yaml` and `prepared.json`."""
        files: dict[str, Any] = {"shards": True}
        if not self.sharded:
            files = {"label": self.label, "root": self.root, "lines": self.lines}
        return {
            "set": self.data_set,
            **files,
            "data_augment": self.data_augment,
            "max_tiles": self.max_tiles,
        }

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Flavors:
        """Inverse of `to_dict`."""
        common = (entry["set"], entry["data_augment"], entry["max_tiles"])
        if entry.get("shards"):
            return cls(*common)
        return cls(*common, entry["label"], entry["root"], entry["lines"])


@dataclass(frozen=True)
class Part:
    """First `records` records of a JSONL file or of a folder of shards, which come `repetitions` times per epoch."""

    path: str
    """Relative to the prepared directory."""
    repetitions: int
    records: int
    flavors: Flavors

    def to_dict(self) -> dict[str, Any]:
        """Entry for `metadataset.yaml` and `prepared.json`; no object is shared, for YAML would write an alias."""
        return {
            "path": self.path,
            "repetitions": self.repetitions,
            "subset": {"range": [0, self.records]},
            "subflavors": self.flavors.to_dict(),
        }

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Part:
        """Inverse of `to_dict`."""
        _, records = entry["subset"]["range"]
        return cls(entry["path"], entry["repetitions"], records, Flavors.from_dict(entry["subflavors"]))


@dataclass(frozen=True)
class Repeats:
    """A `repeat_time`: all records `whole` times, and the first `rest` records once more."""

    whole: int
    rest: int


def split_repeats(repeat_time: float, records: int) -> Repeats:
    """Whole and fractional repetitions; floats such as 0.29 x 100 are meant to give 29."""
    whole = int(repeat_time + 1e-9)
    return Repeats(whole, int((repeat_time - whole) * records + 1e-6))


@dataclass(frozen=True)
class PreparedSet:
    """Counts of a prepared data set (records for training and validation, images, broken ones) and its parts."""

    name: str
    train: int = 0
    validation: int = 0
    images: int = 0
    broken_images: int = 0
    broken_records: int = 0
    repeat_time: float = 1.0
    parts: tuple[Part, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Entry for `prepared.json` and `done.json`."""
        return asdict(self) | {"parts": [part.to_dict() for part in self.parts]}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> PreparedSet:
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError for any other entry."""
        return cls(**entry | {"parts": tuple(Part.from_dict(part) for part in entry["parts"])})


def is_prepared(directory: str | Path) -> bool:
    """Whether a directory was prepared to the end."""
    return (Path(directory) / MARK).is_file()


def unmark_prepared(directory: Path) -> None:
    """Declare a directory incomplete until `write_prepared_sets`."""
    (directory / MARK).unlink(missing_ok=True)


def write_prepared_sets(directory: Path, sets: Sequence[PreparedSet]) -> None:
    """Declare a directory complete."""
    mark = {"version": VERSION, "sets": [entry.to_dict() for entry in sets]}
    write_atomically(directory / MARK, json.dumps(mark, indent=1))


def prepared_sets(directory: str | Path) -> list[PreparedSet]:
    """Data sets of a prepared directory. Raises ValueError if it is not one, or is incomplete or damaged."""
    path = Path(directory) / MARK
    if not is_prepared(directory):
        raise ValueError(
            f"{directory} is not a prepared data set (it has no {MARK}): create one with "
            "tools/prepare_data.py META.json OUT, or use the simple loader with a meta.json"
        )
    try:
        return [PreparedSet.from_dict(entry) for entry in json.loads(path.read_text())["sets"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): run tools/prepare_data.py again, it continues"
        ) from error


def write_finished_set(path: Path, fingerprint: dict[str, Any], finished: PreparedSet) -> None:
    """Write a set's `done.json`, with a JSON-like fingerprint of its input."""
    write_atomically(path, json.dumps({"fingerprint": fingerprint, "report": finished.to_dict()}))


def read_finished_set(path: Path, fingerprint: dict[str, Any]) -> PreparedSet | None:
    """Result of an earlier run with the same input; None if there is none, or its file is damaged."""
    try:
        earlier = json.loads(path.read_text())
        return PreparedSet.from_dict(earlier["report"]) if earlier["fingerprint"] == fingerprint else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def write_metadataset(directory: Path, sets: Sequence[PreparedSet]) -> None:
    """Write the blend that Energon reads: all parts, those of JSONL files with their table of sizes."""
    import yaml

    blend = []
    for entry in sets:
        for part in entry.parts:
            table = {} if part.flavors.sharded else {"aux": {"sizes": f"filesystem://{entry.name}/media"}}
            blend.append(part.to_dict() | table)
    document = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {"train": {"blend_epochized": blend}},
    }
    write_atomically(directory / METADATASET, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


@dataclass(frozen=True)
class HeldOutSet:
    """Held-out records of a data set: `records` lines of OUT/validation/NAME.jsonl, with images below `root`."""

    name: str
    root: str
    records: int
    max_tiles: int | None


def write_held_out(directory: Path, sets: Sequence[HeldOutSet]) -> None:
    """Write OUT/validation/meta.json, for `--valid-data`."""
    meta: dict[str, dict[str, Any]] = {}
    for entry in sets:
        fields = {"root": entry.root, "annotation": f"{entry.name}.jsonl", "length": entry.records}
        meta[entry.name] = fields | ({"max_dynamic_patch": entry.max_tiles} if entry.max_tiles else {})
    write_atomically(directory / "validation" / "meta.json", json.dumps(meta, indent=1))


def write_broken(path: Path, rejects: Iterable[BadSample]) -> None:
    """Write a list of unreadable images, lines and records, sorted by key."""
    with path.open("w", encoding="utf-8") as log:
        for bad in sorted(rejects, key=lambda bad: (bad.key, bad.cause)):
            log.write(json.dumps({"key": bad.key, "cause": bad.cause, "detail": bad.detail}) + "\n")


def read_broken(path: Path) -> Iterator[BadSample]:
    """Entries of a list that `write_broken` wrote."""
    with path.open(encoding="utf-8") as log:
        for line in log:
            yield BadSample(**json.loads(line))
