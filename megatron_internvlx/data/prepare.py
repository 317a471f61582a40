"""Prepare the data sets of InternVL's `meta.json` for the Energon loader.

    OUT/metadataset.yaml             Energon's MetadatasetV2: blended parts and their repetitions
    OUT/broken.jsonl                 unreadable images, lines and records: key, cause, detail
    OUT/<set>/records.jsonl(.idx)    link to the annotations, or a copy of their valid lines; and the index
    OUT/<set>/rest.jsonl(.idx)       records of the fractional part of `repeat_time`
    OUT/<set>/media/.nv-meta/        sizes of all images, upright (Energon's media metadata table)
    OUT/<set>/shards/                with `to_webdataset`: tar files instead of the two above
    OUT/validation/meta.json         records excluded from training, for `--valid-data`

Images are not copied, except into shards. Finished work is kept: the same command continues a stopped run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_internvlx.data.annotations import copy_lines, write_index
from megatron_internvlx.data.decode_pil import load_tiles
from megatron_internvlx.data.images import measure, read_image
from megatron_internvlx.data.manifest import DatasetEntry, Manifest, Record, read_json
from megatron_internvlx.data.prepared import (
    BROKEN_LIST,
    VERSION,
    Flavors,
    HeldOutSet,
    Part,
    PreparedSet,
    RecordedImage,
    SizeTable,
    read_broken,
    read_finished_set,
    size_table,
    split_repeats,
    unmark_prepared,
    write_broken,
    write_finished_set,
    write_held_out,
    write_metadataset,
    write_prepared_sets,
)
from megatron_internvlx.data.rejects import BadSample, blamed_on
from megatron_internvlx.data.sample import parse_record
from megatron_internvlx.files import atomic_path
from megatron_internvlx.paths import is_url


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of a preparation.

    `validation` is the share of each set, its last records, that is excluded from training; `verify` decodes
    every image instead of reading its header; `to_webdataset` writes tar shards of `shard_size` records.
    """

    validation: float = 0.0
    verify: bool = False
    to_webdataset: bool = False
    shard_size: int = 1000
    threads: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ValueError(f"--validation {self.validation}: must be at least 0 and below 1")
        if self.shard_size < 1 or self.threads < 1:
            raise ValueError(
                f"--shard-size {self.shard_size} and --threads {self.threads} must be at least 1"
            )


@dataclass
class _Scan:
    """Result of reading a set's lines: numbers of valid records, images, and errors."""

    good: list[int] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)
    """Each image name, with the number of the first record that uses it."""
    bad: list[BadSample] = field(default_factory=list)


def _progress_bar(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
    return iter(tqdm(items, total=total, desc=what, unit="", disable=not sys.stderr.isatty()))


def _download_annotations(meta_path: str | Path, out: Path) -> Path:
    """Path of a `meta.json` with local annotations; those at URLs are downloaded to `out`, images are not."""
    path = Path(meta_path)
    try:
        meta = read_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    entries = meta.values() if isinstance(meta, dict) else ()
    remote = [e for e in entries if isinstance(e, dict) and is_url(str(e.get("annotation")))]
    if not remote:
        return path
    from megatron.energon.epathlib import EPath

    for number, entry in enumerate(remote):
        local = out / "annotations" / f"{number}-{entry['annotation'].rsplit('/', 1)[-1]}"
        if not local.exists():
            with atomic_path(local) as partial:
                partial.write_bytes(EPath(entry["annotation"]).read_bytes())
        entry["annotation"] = str(local.absolute())
        if not is_url(entry["root"]) and not Path(entry["root"]).is_absolute():
            entry["root"] = str((path.parent / entry["root"]).absolute())
    copy = out / "annotations" / "meta.json"
    copy.write_text(json.dumps(meta))
    return copy


def _scan(entry: DatasetEntry) -> _Scan:
    """Read every line of a data set, and collect valid records, image names and errors."""
    found = _Scan()
    for index in _progress_bar(range(len(entry.file)), len(entry.file), f"{entry.name}: lines"):
        key = entry.file.key(index)
        try:
            with blamed_on(key):
                paths, _ = parse_record(Record(key, entry.file[index], "", False, None))
        except BadSample as bad:
            found.bad.append(bad)
            continue
        found.good.append(index)
        for path in paths:
            found.images.setdefault(path, index)
    return found


def _measure_image(root: str, name: str, verify: bool) -> tuple[str, RecordedImage]:
    try:
        with blamed_on(name):
            path = os.path.join(root, name)  # noqa: PTH118 (keeps URLs as written)
            # Headers are read in place; only remote images and verification need the whole file.
            source: str | bytes = read_image(root, name) if is_url(root) else path
            entry = measure(source, name)
            if verify and not entry.broken:
                load_tiles(source, 1, 1, thumbnail=False)
    except BadSample as bad:
        entry = RecordedImage.unreadable(bad.cause, bad.detail)
    return name, entry


def _record_sizes(entry: DatasetEntry, found: _Scan, table: SizeTable, settings: PrepareSettings) -> int:
    """Measure the images that are not yet in the table; returns the number of broken ones, added to `found.bad`."""
    with table.edit() as sizes:
        known = sizes.names()
        todo = [name for name in found.images if name not in known]
        with ThreadPoolExecutor(settings.threads) as threads:
            # In chunks: a million futures at once would need gigabytes.
            results = (
                result
                for chunk in batched(todo, 512)
                for result in threads.map(
                    lambda name: _measure_image(entry.root, name, settings.verify), chunk
                )
            )
            for rows in batched(_progress_bar(results, len(todo), f"{entry.name}: images"), 512):
                sizes.add(rows)
        broken = [(name, image) for name, image in sizes.broken() if name in found.images]
    found.bad += [image.reject(entry.file.key(found.images[name])) for name, image in broken]
    return len(broken)


def _relative_path(path: str, out: Path) -> str:
    """Path relative to `out`, valid if the prepared directory and the data move together; URLs are unchanged."""
    return path if is_url(path) else os.path.relpath(Path(path).absolute(), out.absolute())


def _blend_part(
    folder: Path, out: Path, entry: DatasetEntry, file: str, repetitions: int, count: int
) -> Part:
    lines = (folder / file).with_suffix(".lines.npy")
    flavors = Flavors(
        entry.name,
        entry.data_augment,
        entry.max_tiles,
        entry.file.label,
        _relative_path(entry.root, out),
        str(lines.relative_to(out)) if lines.exists() else None,
    )
    return Part(str((folder / file).relative_to(out)), repetitions, count, flavors)


def _index_set(entry: DatasetEntry, good: list[int], folder: Path, out: Path, train: int) -> tuple[Part, ...]:
    """Write the JSONL parts of a data set: all records, and those of the fractional repeat."""
    parts = []
    repeats = split_repeats(entry.repeat_time, train)
    if repeats.whole:
        _link_or_copy(entry, good, folder / "records.jsonl")
        parts.append(_blend_part(folder, out, entry, "records.jsonl", repeats.whole, train))
    if repeats.rest:
        chosen = [good[i * train // repeats.rest] for i in range(repeats.rest)]
        copy_lines(entry, chosen, folder / "rest.jsonl")
        parts.append(_blend_part(folder, out, entry, "rest.jsonl", 1, repeats.rest))
    return tuple(parts)


def _link_or_copy(entry: DatasetEntry, good: list[int], records: Path) -> None:
    """Link to the annotations if every line is a valid record; otherwise copy the valid lines."""
    for old in (records, records.with_suffix(".lines.npy")):
        old.unlink(missing_ok=True)
    offsets = entry.file.offsets()
    if len(good) == len(entry.file) and offsets is not None:
        records.symlink_to(os.path.relpath(entry.file.path.absolute(), records.parent.absolute()))
        write_index(records, offsets)
    else:
        copy_lines(entry, good, records)


def _fingerprint(entry: DatasetEntry, settings: PrepareSettings) -> dict[str, Any]:
    status = entry.file.path.stat()
    return {
        "version": VERSION,
        "annotation": [str(entry.file.path.absolute()), status.st_size, status.st_mtime_ns],
        "entry": [entry.root, entry.repeat_time, entry.data_augment, entry.max_tiles],
        "settings": [settings.validation, settings.verify, settings.to_webdataset, settings.shard_size],
    }


def _forget_repaired_images(entry: DatasetEntry, table: SizeTable, settings: PrepareSettings) -> bool:
    """Remove images from the table that were broken and can now be read; returns whether there are any."""
    with table.edit() as sizes:
        measured = (_measure_image(entry.root, name, settings.verify) for name, _ in sizes.broken())
        repaired = [name for name, image in measured if not image.broken]
        sizes.remove(repaired)
    return bool(repaired)


def _prepare_set(entry: DatasetEntry, out: Path, settings: PrepareSettings) -> PreparedSet:
    """Prepare one data set; returns the earlier result if the input is unchanged."""
    folder = out / entry.name
    done, fingerprint = folder / "done.json", _fingerprint(entry, settings)
    table = size_table(out, entry.name)
    earlier = read_finished_set(done, fingerprint)
    if earlier and not (earlier.broken_images and _forget_repaired_images(entry, table, settings)):
        return earlier
    # Until the new marks are written, the directory is incomplete.
    done.unlink(missing_ok=True)
    unmark_prepared(out)
    folder.mkdir(parents=True, exist_ok=True)
    found = _scan(entry)
    broken_images = _record_sizes(entry, found, table, settings)
    held_out = round(len(found.good) * settings.validation)
    train = len(found.good) - held_out
    parts: tuple[Part, ...] = ()
    if settings.to_webdataset and train and entry.repeat_time > 0:
        from megatron_internvlx.data.shards import write_shards

        parts = write_shards(entry, found.good[:train], folder, out, table, settings.shard_size)
    elif train:
        parts = _index_set(entry, found.good, folder, out, train)
    write_broken(folder / BROKEN_LIST, found.bad)
    if held_out:
        (out / "validation").mkdir(exist_ok=True)
        copy_lines(entry, found.good[train:], out / "validation" / f"{entry.name}.jsonl")
    finished = PreparedSet(
        entry.name,
        train,
        held_out,
        len(found.images),
        broken_images,
        len(entry.file) - len(found.good),
        entry.repeat_time,
        parts,
    )
    write_finished_set(done, fingerprint, finished)
    return finished


def prepare(meta_path: str | Path, out: str | Path, settings: PrepareSettings) -> list[PreparedSet]:
    """Prepare every data set of `meta.json`; returns the result for each. Safe to stop and repeat.

    Raises ValueError for an invalid meta file, names that cannot be folder names, or no records.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(_download_annotations(meta_path, out))
    for entry in manifest.entries:
        name = entry.name
        if not name or "/" in name or name.startswith(".") or name in ("validation", "annotations"):
            raise ValueError(f"data set {name!r} must be a valid folder name: rename it in {meta_path}")
    sets = [_prepare_set(entry, out, settings) for entry in manifest.entries]
    with atomic_path(out / BROKEN_LIST) as partial, partial.open("wb") as log:
        for prepared in sets:
            log.write((out / prepared.name / BROKEN_LIST).read_bytes())
    for entry, prepared in zip(manifest.entries, sets, strict=True):
        _check_root(entry, prepared, out, meta_path)
    if not any(prepared.parts for prepared in sets):
        broken = sum(prepared.broken_records for prepared in sets)
        raise ValueError(
            f"no records to train on ({broken} broken): see {out / BROKEN_LIST}, and check repeat_time"
        )
    write_metadataset(out, sets)
    if settings.validation:
        write_held_out(out, _held_out_sets(manifest, sets))
    write_prepared_sets(out, sets)
    return sets


def _check_root(entry: DatasetEntry, prepared: PreparedSet, out: Path, meta_path: str | Path) -> None:
    """Raises ValueError if all images of a data set are missing: its root is wrong."""
    broken = read_broken(out / entry.name / BROKEN_LIST)
    if prepared.images and sum(bad.cause == "missing_image" for bad in broken) == prepared.images:
        raise ValueError(
            f"data set {entry.name!r}: none of its {prepared.images} images found in {entry.root}: "
            f"check its root in {meta_path}; {out / BROKEN_LIST} lists the images"
        )


def _held_out_sets(manifest: Manifest, sets: list[PreparedSet]) -> list[HeldOutSet]:
    found = []
    for entry, prepared in zip(manifest.entries, sets, strict=True):
        if prepared.validation:
            root = entry.root if is_url(entry.root) else str(Path(entry.root).absolute())
            found.append(HeldOutSet(entry.name, root, prepared.validation, entry.max_tiles))
    return found
