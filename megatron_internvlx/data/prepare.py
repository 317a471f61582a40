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
from dataclasses import asdict, dataclass, field
from itertools import batched
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_internvlx.data.annotations import copy_lines, write_index
from megatron_internvlx.data.decode_pil import load_tiles
from megatron_internvlx.data.images import BROKEN, SizeTable, measure, read_image
from megatron_internvlx.data.manifest import DatasetEntry, Manifest, Record, is_url, read_json
from megatron_internvlx.data.rejects import BadSample, blamed_on
from megatron_internvlx.data.sample import parse_record
from megatron_internvlx.files import atomic_path, write_atomically

VERSION = 1
MARK = "prepared.json"
METADATASET = "metadataset.yaml"


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
class SetReport:
    """Counts of a prepared data set: records for training and validation, images, broken images and records."""

    name: str
    train: int = 0
    validation: int = 0
    images: int = 0
    broken_images: int = 0
    broken_records: int = 0
    repeat_time: float = 1.0
    parts: list[dict[str, Any]] = field(default_factory=list)
    """Parts for the metadataset: path, repetitions, subset, subflavors."""


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


def _measure_image(root: str, name: str, verify: bool) -> tuple[str, dict[str, Any]]:
    try:
        with blamed_on(name):
            path = os.path.join(root, name)  # noqa: PTH118 (keeps URLs as written)
            # Headers are read in place; only remote images and verification need the whole file.
            source: str | bytes = read_image(root, name) if is_url(root) else path
            entry = measure(source, name)
            if verify and entry["format"] != BROKEN:
                load_tiles(source, 1, 1, thumbnail=False)
    except BadSample as bad:
        entry = {"width": 0, "height": 0, "format": BROKEN, "mode": f"{bad.cause}: {bad.detail}"[:500]}
    return name, entry


def _record_sizes(entry: DatasetEntry, found: _Scan, table: SizeTable, settings: PrepareSettings) -> int:
    """Measure the images that are not yet in the table; returns the number of broken ones, added to `found.bad`."""
    connection = table.create()
    known = {row[0] for row in connection.execute("SELECT entry_key FROM media_metadata")}
    todo = [name for name in found.images if name not in known]
    with ThreadPoolExecutor(settings.threads) as threads:
        # In chunks: a million futures at once would need gigabytes.
        results = (
            result
            for chunk in batched(todo, 512)
            for result in threads.map(lambda name: _measure_image(entry.root, name, settings.verify), chunk)
        )
        for rows in batched(_progress_bar(results, len(todo), f"{entry.name}: images"), 512):
            connection.executemany(
                "INSERT OR REPLACE INTO media_metadata VALUES (?, 'image', ?)",
                [(name, json.dumps(size)) for name, size in rows],
            )
            connection.commit()
    broken = 0
    for name, text in connection.execute(
        "SELECT entry_key, metadata_json FROM media_metadata WHERE metadata_json LIKE ?", (f'%"{BROKEN}"%',)
    ):
        size = json.loads(text)
        if size["format"] == BROKEN and name in found.images:
            cause, _, detail = size["mode"].partition(": ")
            found.bad.append(BadSample(entry.file.key(found.images[name]), cause, detail))
            broken += 1
    connection.close()
    return broken


def _relative_path(path: str, out: Path) -> str:
    """Path relative to `out`, valid if the prepared directory and the data move together; URLs are unchanged."""
    return path if is_url(path) else os.path.relpath(Path(path).absolute(), out.absolute())


def _blend_part(
    folder: Path, out: Path, entry: DatasetEntry, file: str, repetitions: int, count: int
) -> dict[str, Any]:
    copied = (folder / file).with_suffix(".lines.npy").exists()
    flavors = {
        "set": entry.name,
        "label": entry.file.label,
        "root": _relative_path(entry.root, out),
        "lines": str((folder / file).with_suffix(".lines.npy").relative_to(out)) if copied else None,
        "data_augment": entry.data_augment,
        "max_tiles": entry.max_tiles,
    }
    return {
        "path": str((folder / file).relative_to(out)),
        "repetitions": repetitions,
        "subset": {"range": [0, count]},
        "subflavors": flavors,
    }


def _index_set(
    entry: DatasetEntry, good: list[int], folder: Path, out: Path, train: int
) -> list[dict[str, Any]]:
    """Write the JSONL parts of a data set: all records, and those of the fractional repeat."""
    records = folder / "records.jsonl"
    parts = []
    whole = int(entry.repeat_time + 1e-9)
    if whole:
        _link_or_copy(entry, good, records)
        parts.append(_blend_part(folder, out, entry, records.name, whole, train))
    rest = int((entry.repeat_time - whole) * train + 1e-6)
    if rest:
        chosen = [good[i * train // rest] for i in range(rest)]
        copy_lines(entry, chosen, folder / "rest.jsonl")
        parts.append(_blend_part(folder, out, entry, "rest.jsonl", 1, rest))
    return parts


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


def _earlier_report(done: Path, mark: dict[str, Any]) -> SetReport | None:
    """Report of an earlier run with the same input; None if there is none, or its file is damaged."""
    try:
        earlier = json.loads(done.read_text())
        return SetReport(**earlier["report"]) if earlier["fingerprint"] == mark else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def _forget_repaired_images(entry: DatasetEntry, table: SizeTable, settings: PrepareSettings) -> bool:
    """Remove images from the table that were broken and can now be read; returns whether there are any."""
    connection = table.create()
    rows = connection.execute(
        "SELECT entry_key FROM media_metadata WHERE json_extract(metadata_json, '$.format') = ?", (BROKEN,)
    ).fetchall()
    sizes = (_measure_image(entry.root, name, settings.verify) for (name,) in rows)
    names = [name for name, size in sizes if size["format"] != BROKEN]
    connection.executemany("DELETE FROM media_metadata WHERE entry_key = ?", [(name,) for name in names])
    connection.commit()
    connection.close()
    return bool(names)


def _prepare_set(entry: DatasetEntry, out: Path, settings: PrepareSettings) -> SetReport:
    """Prepare one data set; returns the earlier report if the input is unchanged."""
    folder = out / entry.name
    done, mark = folder / "done.json", _fingerprint(entry, settings)
    table = SizeTable(folder / "media")
    earlier = _earlier_report(done, mark)
    if earlier and not (earlier.broken_images and _forget_repaired_images(entry, table, settings)):
        return earlier
    # Until the new marks are written, the directory is incomplete.
    for stale in (done, out / MARK):
        stale.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    found = _scan(entry)
    broken = _record_sizes(entry, found, table, settings)
    kept_out = round(len(found.good) * settings.validation)
    train = len(found.good) - kept_out
    report = SetReport(entry.name, train, kept_out, len(found.images), broken)
    report.broken_records = len(entry.file) - len(found.good)
    report.repeat_time = entry.repeat_time
    if settings.to_webdataset and train and entry.repeat_time > 0:
        from megatron_internvlx.data.shards import write_shards

        report.parts = write_shards(entry, found.good[:train], folder, out, table, settings.shard_size)
    elif train:
        report.parts = _index_set(entry, found.good, folder, out, train)
    with (folder / "broken.jsonl").open("w", encoding="utf-8") as log:
        for bad in sorted(found.bad, key=lambda bad: (bad.key, bad.cause)):
            log.write(json.dumps({"key": bad.key, "cause": bad.cause, "detail": bad.detail}) + "\n")
    if kept_out:
        (out / "validation").mkdir(exist_ok=True)
        copy_lines(entry, found.good[train:], out / "validation" / f"{entry.name}.jsonl")
    write_atomically(done, json.dumps({"fingerprint": mark, "report": asdict(report)}))
    return report


def prepare(meta_path: str | Path, out: str | Path, settings: PrepareSettings) -> list[SetReport]:
    """Prepare every data set of `meta.json`; returns a report for each. Safe to stop and repeat.

    Raises ValueError for an invalid meta file, names that cannot be folder names, or no records.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(_download_annotations(meta_path, out))
    for entry in manifest.entries:
        name = entry.name
        if not name or "/" in name or name.startswith(".") or name in ("validation", "annotations"):
            raise ValueError(f"data set {name!r} must be a valid folder name: rename it in {meta_path}")
    reports = [_prepare_set(entry, out, settings) for entry in manifest.entries]
    with atomic_path(out / "broken.jsonl") as partial, partial.open("wb") as log:
        for report in reports:
            log.write((out / report.name / "broken.jsonl").read_bytes())
    for entry, report in zip(manifest.entries, reports, strict=True):
        listed = (out / entry.name / "broken.jsonl").read_text(encoding="utf-8")
        if report.images and listed.count('"cause": "missing_image"') == report.images:
            raise ValueError(
                f"data set {entry.name!r}: none of its {report.images} images found in {entry.root}: "
                f"check its root in {meta_path}; {out / 'broken.jsonl'} lists the images"
            )
    _write_metadataset(out, reports, settings)
    if settings.validation:
        _write_validation(out, manifest, reports)
    mark = {"version": VERSION, "sets": [asdict(report) for report in reports]}
    write_atomically(out / MARK, json.dumps(mark, indent=1))
    return reports


def prepared_sets(directory: str | Path) -> list[dict[str, Any]]:
    """Reports of the data sets in a prepared directory. Raises ValueError if it is not one."""
    path = Path(directory) / MARK
    if not path.is_file():
        raise ValueError(
            f"{directory} is not a prepared data set (it has no {MARK}): create one with "
            "tools/prepare_data.py META.json OUT, or use the simple loader with a meta.json"
        )
    try:
        return json.loads(path.read_text())["sets"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): run tools/prepare_data.py again, it continues"
        ) from error


def _write_metadataset(out: Path, reports: list[SetReport], settings: PrepareSettings) -> None:
    import yaml

    blend = []
    for report in reports:
        for part in report.parts:
            # a dict each: the same one twice would become a YAML alias, which Energon does not support
            sizes = {"sizes": f"filesystem://{report.name}/media"}
            blend.append(part if settings.to_webdataset else part | {"aux": sizes})
    if not blend:
        records = sum(report.broken_records for report in reports)
        raise ValueError(
            f"no records to train on ({records} broken): see {out / 'broken.jsonl'}, and check repeat_time"
        )
    document = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {"train": {"blend_epochized": blend}},
    }
    write_atomically(out / METADATASET, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def _write_validation(out: Path, manifest: Manifest, reports: list[SetReport]) -> None:
    meta: dict[str, dict[str, Any]] = {}
    for entry, report in zip(manifest.entries, reports, strict=True):
        if report.validation:
            root = entry.root if is_url(entry.root) else str(Path(entry.root).absolute())
            meta[entry.name] = {
                "root": root,
                "annotation": f"{entry.name}.jsonl",
                "length": report.validation,
            }
            if entry.max_tiles:
                meta[entry.name]["max_dynamic_patch"] = entry.max_tiles
    write_atomically(out / "validation" / "meta.json", json.dumps(meta, indent=1))
