"""WebDataset shards as hubs publish them: tar files in which files of the same stem are one record."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_internvlx.data.manifest import read_json
from megatron_internvlx.data.sources.pictures import SUFFIXES, VIDEO_SUFFIXES
from megatron_internvlx.data.sources.record import (
    MAX_IMAGE_BYTES,
    LeftOut,
    ReadSettings,
    Records,
    SourceImage,
    SourceRecord,
)
from megatron_internvlx.data.sources.rows import DESCRIBE, USUAL, RowReader, is_conversation, one_round

_TEXTS = (".txt", ".text", ".caption")
_MOST_BYTES = 4 * MAX_IMAGE_BYTES  # of the files of one record
_DIGITS = re.compile(r"(\d+)")
Members = dict[str, bytes]


def read_shards(files: Sequence[Path], settings: ReadSettings) -> Records:
    """Records of tar files, keys `shard.tar:stem`. Members are read into memory, never unpacked to the disk.

    Links and devices are left out. A shard is read up to where it is broken, ends, or has a file over 256 MB.
    """
    for path in files:
        reader = RowReader(settings, str(path))
        for stem, members in _groups(path):
            key = f"{path.name}:{stem}"
            if isinstance(members, LeftOut):
                yield members
                continue
            try:
                yield _record(members, key, reader, settings)
            except LeftOut as left_out:
                yield left_out


def _groups(path: Path) -> Iterator[tuple[str, Members | LeftOut]]:
    """Stems and files (suffix -> bytes) of the records of a shard, in order."""
    stem, members, size = "", Members(), 0
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # a shard of a million files would fill the memory
                if member.isdir():
                    continue
                folder, _, base = member.name.rpartition("/")
                base, _, suffix = base.partition(".")
                here = f"{folder}/{base}" if folder else base
                if here != stem:
                    if members:
                        yield stem, members
                    stem, members, size = here, Members(), 0
                size += member.size
                if member.size > MAX_IMAGE_BYTES or size > _MOST_BYTES:
                    # To skip it would take as long as to read it, and a header may announce any size.
                    raise ValueError(f"{member.name} has {member.size:,} bytes, over {MAX_IMAGE_BYTES:,}")
                if not member.isfile():
                    what = "a link or device, not a file: pack the file itself"
                    yield stem, LeftOut(f"{path.name}:{member.name}", "bad_member", what)
                    continue
                file = tar.extractfile(member)
                assert file is not None
                members[f".{suffix.lower()}"] = file.read()
    except Exception as error:  # compressors raise errors of their own; the last record may lack files
        yield (
            stem,
            LeftOut(
                f"{path.name}:{stem or '(start)'}",
                "bad_member",
                f"the shard is broken or ends here; this record and what follows are lost: get it again ({error})",
            ),
        )
        return
    if members:
        yield stem, members


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key with numbers in their order: 2.jpg before 10.jpg."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _DIGITS.split(name)]


def _record(members: Members, key: str, reader: RowReader, settings: ReadSettings) -> SourceRecord:
    """Record of the files of one stem. Raises LeftOut."""
    if any(Path(f"x{name}").suffix in VIDEO_SUFFIXES for name in members):
        raise LeftOut(key, "video", "videos are not supported: save frames as images")
    images = {name: data for name, data in members.items() if Path(f"x{name}").suffix in SUFFIXES}
    ordered = [SourceImage(f"{key}{name}", images[name]) for name in sorted(images, key=_natural)]
    row = _json(members, key)
    if row is not None and is_conversation(row):
        named = row.get("images", row.get("image"))
        inside = [named] if isinstance(named, str) else named
        if isinstance(inside, list) and all(isinstance(one, str) for one in inside):
            found = [_inside(one, images, key) for one in inside]
            ordered = [image for image in found if image is not None] if all(found) else ordered
        record = reader.read({name: row[name] for name in row if name not in ("image", "images")}, key)
        record.images = [*record.images, *ordered]
        return record
    answer = next((members[name] for name in _TEXTS if name in members), None)
    question = DESCRIBE if settings.question is None else settings.question
    text = "" if answer is None else _decoded(answer, key)
    if row is not None:
        question = str(next((row[name] for name in USUAL["question"] if row.get(name)), question))
        text = text or str(next((row[name] for name in USUAL["answer"] if row.get(name) is not None), ""))
    if not ordered:
        raise LeftOut(key, "missing_image", f"no image among its files {', '.join(members)}: add it")
    return SourceRecord(key, one_round(question, text.strip(), len(ordered)), ordered)


def _inside(name: str, images: Members, key: str) -> SourceImage | None:
    """Image of the record by the name in its JSON: a suffix of the shard, or its only image; None otherwise."""
    for suffix, data in images.items():
        if name == suffix.lstrip(".") or f"{key.rpartition(':')[2]}{suffix}" == name:
            return SourceImage(f"{key}{suffix}", data)
    return None


def _json(members: Members, key: str) -> dict | None:
    if ".json" not in members:
        return None
    try:
        row = read_json(_decoded(members[".json"], key))
    except (json.JSONDecodeError, ValueError, RecursionError) as error:
        raise LeftOut(key, "malformed_json", f"its .json is not valid: {error}: repair it") from error
    if isinstance(row, list):
        return {"conversations": row}
    if not isinstance(row, dict):
        raise LeftOut(key, "malformed_json", f"its .json must hold an object, found {type(row).__name__}")
    return row


def _decoded(data: bytes, key: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LeftOut(key, "bad_encoding", f"its text is not UTF-8: {error.reason}") from error
