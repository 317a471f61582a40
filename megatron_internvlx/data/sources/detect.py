"""Find out what a path holds, and open it as data sets of records."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

from megatron_internvlx.data.manifest import Manifest, read_json
from megatron_internvlx.data.sources.columnar import read_parquet
from megatron_internvlx.data.sources.pictures import SUFFIXES
from megatron_internvlx.data.sources.record import LeftOut, ReadSettings, Records, SetEntry, Source
from megatron_internvlx.data.sources.rows import RowReader, column_notes, is_conversation
from megatron_internvlx.data.sources.tables import caption_of, read_captions, read_table
from megatron_internvlx.data.sources.text_files import Piece, encoding_of, json_array, json_lines, open_text
from megatron_internvlx.data.sources.webdataset import read_shards
from megatron_internvlx.paths import is_url

MARK = "ivlx_prepare.json"
"""File that marks a directory as written by `ivlx prepare`."""
FORMATS = ("auto", "table", "captions", "json", "parquet", "webdataset", "meta")
_ENDINGS = {
    "table": (".csv", ".tsv"),
    "json": (".json", ".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
}
# JSON files beside data sets that hold no records.
_PASSED_OVER = {
    "dataset_info.json", "dataset_infos.json", "config.json", "state.json", "left_out.jsonl", MARK,
    "meta_val.json",
}  # fmt: skip
_MOST_SUBFOLDERS = 50
_PEEK = 16  # records by which a JSON file is described


def find_sources(
    path: Path, settings: ReadSettings, kind: str = "auto", root: Path | None = None, out: Path | None = None
) -> list[Source]:
    """Data sets at a path, a file or folder. Raises ValueError that says what is there and what to do.

    Args:
        path: what the user named.
        settings: choices about reading.
        kind: one of `FORMATS`.
        root: folder of the images; None: found by looking.
        out: directory to be written, which is not read.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_dir():
        kind, files, notes = _look_into(path, kind, out)
    else:
        notes = []
        kind, files = (_kind_of(path) if kind == "auto" else kind), [path]
    if kind == "meta":
        return _meta_sources(files[0], settings, root)
    name = path.resolve().name if path.is_dir() else path.name.partition(".")[0]
    base = path if path.is_dir() else path.parent
    if kind == "captions":
        if not path.is_dir():
            raise ValueError(f"{path}: captions are in a folder: name the folder of the images")
        if root is not None:
            raise ValueError(
                "--root is for images that are elsewhere than what names them: captions lie beside"
            )
        return [
            Source(
                name,
                "images with captions",
                [path],
                [path],
                iter(read_captions(path, files, settings)),
                beside=[*files, *filter(None, map(caption_of, files))],
            )
        ]
    described, records, more = _open(kind, files, settings)
    roots = [root] if root is not None else _likely_roots(files[0].parent, base)
    return [Source(name, described, files, roots, records, notes=[*notes, *more])]


def _ending(path: Path) -> str | None:
    lower = path.name.lower()
    return next((kind for kind, ends in _ENDINGS.items() if lower.endswith(ends)), None)


def _kind_of(path: Path) -> str:
    """Format of a file, by its first bytes, then by its name. Raises ValueError with the remedy."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head.strip():
        raise ValueError(f"{path}: the file is empty")
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path}: a zip or Excel file: unpack it, or save the table as CSV (UTF-8)")
    if _ending(path) in ("table", "webdataset"):
        return str(_ending(path))
    if head[257:262] == b"ustar":
        return "webdataset"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"[", b"{"):
        return "meta" if _is_meta(path) else "json"
    if _ending(path) is not None:
        return str(_ending(path))
    raise ValueError(f"{path}: of no known format: name it, --format {', '.join(FORMATS[1:])}")


def _is_meta(path: Path) -> bool:
    """Whether a JSON file is InternVL's `meta.json`: an object of data sets with root and annotation."""
    if path.stat().st_size > 1 << 22:
        return False
    try:
        content = read_json(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    sets = [entry for name, entry in content.items() if name[:1] != "_"] if isinstance(content, dict) else []
    return bool(sets) and all(isinstance(entry, dict) and "annotation" in entry for entry in sets)


def _look_into(folder: Path, kind: str, out: Path | None) -> tuple[str, list[Path], list[str]]:
    """Format and files of a folder, and notes on files that are passed over.

    Raises ValueError if there are none, or several that could be meant.
    """
    here = [path for path in sorted(folder.iterdir()) if path.name[:1] != "." and path.is_file()]
    here = [path for path in here if path.name not in _PASSED_OVER]
    by_kind: dict[str, list[Path]] = {}
    for path in here:
        if (ending := _ending(path)) is not None:
            by_kind.setdefault(ending, []).append(path)
    for ending in ("parquet", "webdataset"):  # hubs put shards into data/
        if ending not in by_kind and (folder / "data").is_dir() and folder / "data" != out:
            found = [path for path in sorted((folder / "data").iterdir()) if _ending(path) == ending]
            by_kind |= {ending: found} if found else {}
    if kind in ("auto", "meta"):
        metas = [path for path in by_kind.get("json", ()) if path.suffix == ".json" and _is_meta(path)]
        if len(metas) == 1:
            return "meta", metas, []
        if kind == "meta":
            raise ValueError(f"{folder}: {len(metas)} meta files in it: name the one to read")
    texts = [path for one in ("table", "json") if kind in ("auto", one) for path in by_kind.get(one, ())]
    if len(texts) > 1:
        raise ValueError(
            f"{folder}: {len(texts)} files could be meant: {', '.join(path.name for path in texts[:8])}. Name them "
            f"one by one, e.g. {texts[0]}"
        )
    if texts:
        others = [path for one in ("parquet", "webdataset") for path in by_kind.get(one, ())]
        passed = (
            [f"not read: {len(others):,} Parquet and tar files, such as {others[0].name}"] if others else []
        )
        return ("table" if texts[0] in by_kind.get("table", ()) else "json"), texts, passed
    for one in ("parquet", "webdataset"):
        if kind in ("auto", one) and one in by_kind:
            return one, *_one_split(folder, by_kind[one])
    if kind not in ("auto", "captions"):
        raise ValueError(f"{folder}: no {kind} file in it ({', '.join(_ENDINGS[kind])})")
    return "captions", _images_with_captions(folder, out), []


def _one_split(folder: Path, files: list[Path]) -> tuple[list[Path], list[str]]:
    """Shards of the training split, and a note on the others. Raises ValueError if several splits could be meant."""
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(path.name.partition(".")[0].rstrip("0123456789-of"), []).append(path)
    if len(splits) == 1:
        return files, []
    if trains := [name for name in splits if name.startswith("train")]:
        read = [path for name in trains for path in splits[name]]
        others = [path.name for path in files if path not in set(read)]
        more = ", ..." if len(others) > 3 else ""
        remedy = "name them as inputs to read them too"
        return read, [
            f"not read: {len(others):,} shards of other splits ({', '.join(others[:3])}{more}): {remedy}"
        ]
    raise ValueError(
        f"{folder}: shards of several sets ({', '.join(sorted(splits)[:8])}): name the files of one, e.g. "
        f"{splits[min(splits)][0]}"
    )


def _images_with_captions(folder: Path, out: Path | None) -> list[Path]:
    """Image files below a folder, in order. Raises ValueError if there are none, or no caption beside any."""
    images, texts = [], 0
    for place, below, names in os.walk(folder):
        inside = Path(place)
        below[:] = sorted(
            name
            for name in below
            if name[0] != "."
            and (out is None or (inside / name).resolve() != out)
            and not (inside / name / MARK).is_file()
        )
        texts += sum(name.lower().endswith(".txt") for name in names)
        images += [inside / name for name in sorted(names) if Path(name).suffix.lower() in SUFFIXES]
    if not images:
        raise ValueError(
            f"{folder}: nothing to read in it: no table (CSV), JSON, Parquet or tar file, and no images"
        )
    if not texts:
        raise ValueError(
            f"{folder}: {len(images):,} images and nothing about them. Write {folder / 'questions.csv'} with the "
            "columns image,question,answer, or a caption beside each image (photo.jpg: photo.txt)"
        )
    return images


def _likely_roots(folder: Path, base: Path) -> list[Path]:
    """Folders in which the images of a file are looked for, the likeliest first."""
    below = [path for path in sorted(base.iterdir()) if path.is_dir() and path.name[:1] != "."]
    first = [path for path in below if "image" in path.name.lower() or "photo" in path.name.lower()]
    roots = [folder, base, *first, *below[:_MOST_SUBFOLDERS], base.absolute().parent, Path.cwd()]
    return list(dict.fromkeys(path.absolute() for path in roots))


def _open(kind: str, files: list[Path], settings: ReadSettings) -> tuple[str, Records, list[str]]:
    """Description, records and notes of files. Raises ValueError."""
    if kind == "table":
        return read_table(files[0], settings)
    if kind == "parquet":
        return read_parquet(files, settings)
    if kind == "webdataset":
        shards = f"{len(files)} WebDataset shards" if len(files) > 1 else "WebDataset shard"
        return shards, read_shards(files, settings), []
    return read_json_file(files[0], files[0].name, settings)


def read_json_file(path: Path, label: str, settings: ReadSettings) -> tuple[str, Records, list[str]]:
    """Description, records and notes of a JSON array or JSONL file; the content decides which, not the name.

    Raises ValueError for files of one JSON object that is not a record.
    """
    encoding = encoding_of(path, settings.encoding)
    with open_text(path, encoding) as file:
        head = file.read(4096).lstrip()
    reading: Callable[..., Iterable[Piece]] = json_array if head.startswith("[") else json_lines
    shape = "JSON array" if head.startswith("[") else "JSONL"
    if shape == "JSONL" and path.suffix == ".json":
        _refuse_single_object(path)
    pieces = iter(reading(path, label, settings.encoding))
    first = list(islice(pieces, _PEEK))
    rows = [piece[1] for piece in first if not isinstance(piece, LeftOut) and isinstance(piece[1], dict)]
    if shape != {".json": "JSON array", ".jsonl": "JSONL", ".ndjson": "JSONL"}.get(
        path.suffix.lower(), shape
    ):
        shape = f"{shape}, in spite of its name"
    reader = RowReader(settings, str(path))
    notes: list[str] = []
    tables = [
        row for row in rows if row and not is_conversation(row) and not (row.keys() & {"video", "videos"})
    ]
    if tables and len(tables) == len(rows) and len({tuple(row) for row in rows}) == 1:
        # A wrong name of a column is one mistake, not one of every record.
        notes = column_notes(reader.columns(rows[0]), rows[0], settings)
    records = _records(chain(first, pieces), reader)
    return f"{shape} ({_dialect(next(iter(rows), None))})", records, notes


def _records(pieces: Iterable[Piece], reader: RowReader) -> Records:
    for piece in pieces:
        if isinstance(piece, LeftOut):
            yield piece
            continue
        try:
            yield reader.read(piece[1], piece[0])
        except LeftOut as left_out:
            yield left_out


def _refuse_single_object(path: Path) -> None:
    """Raises ValueError for a JSON file that is one object spread over lines, such as COCO's annotations."""
    with path.open("rb") as file:
        line = file.readline(1 << 20)
    try:
        json.loads(line)
    except ValueError:
        pass
    else:
        return
    try:
        content = read_json(path.read_bytes()) if path.stat().st_size < 1 << 26 else {}
    except (ValueError, RecursionError):
        return
    lists = [name for name, value in content.items() if isinstance(value, list)]
    raise ValueError(
        f"{path}: one JSON object with the keys {', '.join(list(content)[:8])}; expected an array of records or one "
        "record per line" + (f". Write the list under {lists[0]!r} as a file of its own" if lists else "")
    )


def _dialect(row: Any) -> str:
    """Name of the format of a record."""
    if not isinstance(row, dict):
        return "unknown records"
    if "messages" in row:
        return "messages"
    if isinstance(row.get("conversations"), list):
        turn = next(iter(row["conversations"]), None)
        return (
            "conversations" if isinstance(turn, dict) and "from" in turn else "conversations of role, content"
        )
    return "texts" if "texts" in row else "fields " + ", ".join(list(row)[:6])


def _meta_sources(path: Path, settings: ReadSettings, root: Path | None) -> list[Source]:
    """Data sets of InternVL's `meta.json`, with their settings. Raises ValueError."""
    if root is not None:
        raise ValueError("--root and a meta.json, which has a root for each set: change them there")
    sources = []
    for entry in Manifest(path).entries:
        if is_url(entry.root):
            raise ValueError(
                f"{path}: the images of {entry.name!r} are at {entry.root}: prepare_data reads object stores"
            )
        kind, records, notes = read_json_file(entry.file.path, entry.file.path.name, settings)
        kept = SetEntry(entry.data_augment, entry.repeat_time, entry.max_tiles)
        sources.append(
            Source(entry.name, kind, [entry.file.path], [Path(entry.root)], records, kept, notes, [path])
        )
    return sources
