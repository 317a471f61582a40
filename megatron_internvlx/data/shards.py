"""WebDataset shards: tar files of records and their encoded images, indexed by Energon."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable
from contextlib import redirect_stdout
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np

from megatron_internvlx.data.images import BROKEN, SizeTable, read_image
from megatron_internvlx.data.manifest import DatasetEntry, Record
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.data.sample import parse_record
from megatron_internvlx.files import atomic_path

META = "record"
"""Extension of the JSON file of each record in a shard."""


def _add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _write_record(
    tar: tarfile.TarFile, entry: DatasetEntry, index: int, sizes: dict[str, dict[str, Any]]
) -> None:
    """Write a record: its JSON with new image names, then the unchanged images."""
    data = entry.file[index]
    record = Record(entry.file.key(index), data, "", False, None)
    names, _ = parse_record(record)
    stem, recorded, files = f"{index:09d}", {}, []
    unknown = {"width": 0, "height": 0, "format": BROKEN, "mode": "missing_image: "}
    for number, name in enumerate(names):
        part = f"{number}{Path(name).suffix.lower() or '.img'}"
        recorded[part] = sizes.get(name, unknown)
        try:
            files.append((part, read_image(entry.root, name)))
        except BadSample as bad:
            recorded[part] = {**unknown, "mode": f"{bad.cause}: {bad.detail}"}
    images = list(recorded)
    image = images[0] if isinstance(data.get("image"), str) and images else images
    document = {"key": record.key, "sizes": recorded, "record": {**data, "image": image}}
    _add_file(tar, f"{stem}.{META}.json", json.dumps(document, ensure_ascii=False).encode())
    for part, blob in files:
        _add_file(tar, f"{stem}.{part}", blob)


def write_shards(
    entry: DatasetEntry, indices: list[int], folder: Path, out: Path, table: SizeTable, size: int
) -> list[dict[str, Any]]:
    """Write a data set's records in a fixed random order; returns the parts for the metadataset.

    The fractional part of `repeat_time` uses the first records of that order. Finished shards of an earlier run
    are kept.
    """
    from tqdm import tqdm

    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    order = np.random.default_rng(0).permutation(len(indices))
    groups = list(batched((indices[i] for i in order), size))
    names = [f"shard-{number:06d}.tar" for number in range(len(groups))]
    connection = table.create()
    for name, group in zip(tqdm(names, desc=f"{entry.name}: shards", disable=None), groups, strict=True):
        if (shards / name).exists():
            continue
        with atomic_path(shards / name) as partial, tarfile.open(partial, "w") as tar:
            for index in group:
                _write_record(tar, entry, index, _image_sizes(connection, entry.file[index]))
    connection.close()
    _write_index(shards, names)
    return _blend_parts(entry, shards.relative_to(out), len(indices))


def _image_sizes(connection: Any, data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    named = data.get("image") or []
    found = {}
    for name in [named] if isinstance(named, str) else named:
        row = connection.execute(
            "SELECT metadata_json FROM media_metadata WHERE entry_key = ?", (name,)
        ).fetchone()
        if row:
            found[name] = json.loads(row[0])
    return found


def _write_index(shards: Path, names: Iterable[str]) -> None:
    """Write Energon's index of the shards, and its configuration: read only the JSON files."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    with redirect_stdout(io.StringIO()):
        BaseWebdatasetFactory.prepare_dataset(
            shards.absolute(),
            list(names),
            split_parts_ratio=[("train", 1.0)],
            shuffle_seed=None,
            workers=min(4, os.cpu_count() or 1),
        )
    (shards / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n"
        "__class__: CrudeWebdataset\n"
        # images are read later, when their pack is made, from their position in the shard
        f"part_filter: [{META}.json]\n"
    )


def _blend_parts(entry: DatasetEntry, shards: Path, train: int) -> list[dict[str, Any]]:
    whole = int(entry.repeat_time + 1e-9)
    rest = int((entry.repeat_time - whole) * train + 1e-6)
    flavors = {
        "set": entry.name,
        "shards": True,
        "data_augment": entry.data_augment,
        "max_tiles": entry.max_tiles,
    }
    wanted = [(whole, train), (1, rest)]
    return [
        # a copy each: the same object twice would become a YAML alias, which Energon does not support
        {
            "path": str(shards),
            "repetitions": times,
            "subset": {"range": [0, count]},
            "subflavors": {**flavors},
        }
        for times, count in wanted
        if times and count
    ]
