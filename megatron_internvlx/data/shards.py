"""WebDataset shards: tar files of records and their encoded images, indexed by Energon."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from contextlib import redirect_stdout
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np

from megatron_internvlx.data.images import read_image
from megatron_internvlx.data.manifest import DatasetEntry, Record
from megatron_internvlx.data.prepared import (
    SHARD_JSON,
    Flavors,
    Part,
    RecordedImage,
    ShardRecord,
    SizeTable,
    SizeTableEditor,
    split_repeats,
)
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.data.sample import parse_record
from megatron_internvlx.files import atomic_path


def _add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _write_record(
    tar: tarfile.TarFile, entry: DatasetEntry, index: int, sizes: dict[str, RecordedImage]
) -> None:
    """Write a record: its JSON with new image names, then the unchanged images."""
    data = entry.file[index]
    record = Record(entry.file.key(index), data, "", False, None)
    names, _ = parse_record(record)
    stem, recorded, files = f"{index:09d}", {}, []
    unknown = RecordedImage.unreadable("missing_image", "")
    for number, name in enumerate(names):
        part = f"{number}{Path(name).suffix.lower() or '.img'}"
        recorded[part] = sizes.get(name, unknown)
        try:
            files.append((part, read_image(entry.root, name)))
        except BadSample as bad:
            recorded[part] = RecordedImage.unreadable(bad.cause, bad.detail)
    images = list(recorded)
    image = images[0] if isinstance(data.get("image"), str) and images else images
    document = ShardRecord(record.key, recorded, {**data, "image": image})
    _add_file(tar, f"{stem}.{SHARD_JSON}", document.to_json())
    for part, blob in files:
        _add_file(tar, f"{stem}.{part}", blob)


def write_shards(
    entry: DatasetEntry, indices: list[int], folder: Path, out: Path, table: SizeTable, size: int
) -> tuple[Part, ...]:
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
    progress = tqdm(names, desc=f"{entry.name}: shards", disable=None)
    with table.edit() as sizes:
        for name, group in zip(progress, groups, strict=True):
            if (shards / name).exists():
                continue
            with atomic_path(shards / name) as partial, tarfile.open(partial, "w") as tar:
                for index in group:
                    _write_record(tar, entry, index, _image_sizes(sizes, entry.file[index]))
    _write_index(shards, names)
    return _blend_parts(entry, shards.relative_to(out), len(indices))


def _image_sizes(sizes: SizeTableEditor, data: dict[str, Any]) -> dict[str, RecordedImage]:
    named = data.get("image") or []
    found = {name: sizes.find(name) for name in ([named] if isinstance(named, str) else named)}
    return {name: image for name, image in found.items() if image is not None}


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
        f"part_filter: [{SHARD_JSON}]\n"
    )


def _blend_parts(entry: DatasetEntry, shards: Path, train: int) -> tuple[Part, ...]:
    repeats = split_repeats(entry.repeat_time, train)
    flavors = Flavors(entry.name, entry.data_augment, entry.max_tiles)
    return tuple(
        Part(str(shards), times, count, flavors)
        for times, count in ((repeats.whole, train), (1, repeats.rest))
        if times and count
    )
