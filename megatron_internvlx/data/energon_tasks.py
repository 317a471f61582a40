"""Energon's task encoder: cook -> sample -> pack -> tiles and plan, every step stateless.

Energon saves the samples in its buffers as keys and makes them again on resume, so no step may depend on earlier
calls. A bad record passes through the buffers like a sample and leaves with the next pack: each is reported once, in an
order that does not depend on timing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon import Cooker, SavableDataset, TaskEncoder, WorkerConfig, cooker, edataclass, stateless
from megatron.energon import Sample as EnergonSample
from megatron.energon.wrappers import PackingDataset

from megatron_internvlx.data.decode import TileDecoder
from megatron_internvlx.data.encoded import EncodedImage, PackImage
from megatron_internvlx.data.images import FolderImages, ImageStore, ShardImages
from megatron_internvlx.data.manifest import Record
from megatron_internvlx.data.packing import pack
from megatron_internvlx.data.plan import PlanSettings, SequencePlan, build_plan
from megatron_internvlx.data.prepared import SHARD_JSON, Flavors, ShardRecord, SizeTable, size_table
from megatron_internvlx.data.rejects import BadSample, blamed_on
from megatron_internvlx.data.sample import ImageTiles, Sample, SampleEncoder

# Returns tiles uint8 [T, 3, S, S] of one image, or the file if a GPU will cut it. Raises BadSample if it is broken.
Decode = Callable[[bytes, ImageTiles, random.Random | None], np.ndarray | EncodedImage]


@edataclass
class Cooked(EnergonSample):
    """Record with the store of its images."""

    record: Record
    images: Any


@edataclass
class Encoded(EnergonSample):
    """Tokenized sample, or the reject in its place."""

    sample: Sample | None
    reject: BadSample | None
    images: Any
    seed: str


@dataclass
class RawPack:
    """Samples of one pack with their undecoded images, as a worker reads them."""

    samples: list[Sample] = field(default_factory=list)
    blobs: list[list[bytes]] = field(default_factory=list)
    seeds: list[str] = field(default_factory=list)
    rejects: list[BadSample] = field(default_factory=list)


@dataclass
class Batch:
    """Planned micro-batch."""

    plan: SequencePlan | None
    """None if every sample of it was bad."""
    tiles: torch.Tensor | None
    """uint8 [T, 3, S, S] in the order of the plan; None if `images` are given instead."""
    keys: list[str]
    """Names of the samples."""
    rejects: list[BadSample]
    """Bad samples before and in this micro-batch."""
    seen: int
    """Number of samples read, including bad ones."""
    dropped_tiles: int = 0
    """Tiles removed to fit the budgets."""
    dropped_tokens: int = 0
    """Tokens removed to fit the budgets."""
    pictured: int = 0
    """Number of good samples with images."""
    fallbacks: dict[str, int] = field(default_factory=dict)
    """Images that Pillow cut instead of DALI, per reason."""
    images: list[PackImage] | None = None
    """Files, and tiles of images that the GPU must not cut, in the order of the plan."""
    restore_key: Any = None
    """Key from which the loader makes this pack again."""


@edataclass
class Delivery(EnergonSample):
    """Result of a worker."""

    content: Batch


def decode_pack(
    raw: RawPack, decode: Decode
) -> tuple[list[Sample], list[np.ndarray | EncodedImage], list[BadSample]]:
    """Samples whose images are all good, these images decoded, and the rejects: one per sample with a bad image."""
    good: list[Sample] = []
    parts: list[np.ndarray | EncodedImage] = []
    rejects = list(raw.rejects)
    for sample, blobs, seed in zip(raw.samples, raw.blobs, raw.seeds, strict=True):
        rng = random.Random(seed) if sample.jpeg_augment else None
        try:
            with blamed_on(sample.key):
                tiles = [decode(blob, image, rng) for blob, image in zip(blobs, sample.images, strict=True)]
        except BadSample as bad:
            rejects.append(bad)
            continue
        good.append(sample)
        parts += tiles
    return good, parts, rejects


def finish(raw: RawPack, decode: Decode, plan: PlanSettings, tile_size: int) -> Batch:
    """Decode the images of a pack, or check that a GPU can decode them, and plan it."""
    samples, parts, rejects = decode_pack(raw, decode)
    fallbacks = decode.take_fallbacks() if isinstance(decode, TileDecoder) else {}
    keys = [sample.key for sample in samples]
    seen = len(raw.samples) + len(raw.rejects)
    if not samples:
        return Batch(None, None, keys, rejects, seen, fallbacks=fallbacks)
    planned = build_plan(
        [sample.input_ids for sample in samples],
        [sample.labels for sample in samples],
        [sample.is_visual for sample in samples],
        plan,
        [sample.number for sample in samples],
    )
    tiles, images = None, None
    if isinstance(decode, TileDecoder) and decode.travel:
        images = [part if isinstance(part, EncodedImage) else torch.from_numpy(part) for part in parts]
    else:
        cut = [part for part in parts if not isinstance(part, EncodedImage)]
        tiles = torch.from_numpy(np.concatenate([np.empty((0, 3, tile_size, tile_size), np.uint8), *cut]))
    return Batch(
        planned,
        tiles,
        keys,
        rejects,
        seen,
        sum(sample.dropped_tiles for sample in samples),
        sum(sample.dropped_tokens for sample in samples),
        sum(bool(sample.images) for sample in samples),
        fallbacks,
        images,
    )


@lru_cache(maxsize=64)
def _line_numbers(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r")


@stateless
@cooker(need_primary=True)
def _cook(sample: dict[str, Any], *, out: Path, primary: Any, sizes: Any = None) -> Cooked:
    """Record of a prepared directory, from JSONL or from a shard, with closed images."""
    flavors = Flavors.from_dict(sample["__subflavors__"])
    names = {name: sample[name] for name in ("__key__", "__restore_key__", "__subflavors__", "__sources__")}
    if flavors.sharded:
        # The index is in the tar file: `primary` finds the images of this record by their names.
        found = ShardRecord.from_json(sample[SHARD_JSON])
        record = Record(found.key, found.record, "", flavors.data_augment, flavors.max_tiles)
        return Cooked(**names, record=record, images=ShardImages(found.sizes, sample["__key__"], primary))
    index = int(sample["__key__"])
    line = index + 1 if flavors.lines is None else int(_line_numbers(str(out / flavors.lines))[index])
    key = f"{flavors.label}:{line}"
    record = Record(key, sample["json"], "", flavors.data_augment, flavors.max_tiles)
    images = FolderImages(flavors.image_root(out), _size_table(out, flavors.data_set))
    return Cooked(**names, record=record, images=images)


@lru_cache(maxsize=256)
def _size_table(out: Path, data_set: str) -> SizeTable:
    return size_table(out, data_set)


class _QuietPacking(PackingDataset):
    """Energon's packing without its progress bar in every worker."""

    def _fill_reading_buffer(self, source_iter: Any, log_progress: bool = False) -> bool:
        return super()._fill_reading_buffer(source_iter, log_progress=False)


class PackEncoder(TaskEncoder):
    """Encoder from records to planned micro-batches.

    Args:
        out: prepared directory.
        encoder: converts records to samples.
        plan: grids, alignment and static budgets.
        micro_batch_size: samples of a micro-batch; None: packs under the encoder's budget.
        buffer_size: samples from which packs are chosen.
        decode: decoder of the workers.
        seed: seed of the JPEG augmentation.
    """

    decoder = None

    def __init__(
        self,
        out: Path,
        encoder: SampleEncoder,
        plan: PlanSettings,
        *,
        micro_batch_size: int | None,
        buffer_size: int,
        decode: Decode,
        seed: int,
    ):
        from functools import partial

        self.encoder, self.plan, self.decode = encoder, plan, decode
        self.micro_batch_size, self.buffer_size, self.seed = micro_batch_size, buffer_size, seed
        cook = partial(_cook, out=out)
        for mark in ("__stateless__", "__cooker_need_cache__", "__cooker_need_primary__"):
            setattr(cook, mark, getattr(_cook, mark))
        self.cookers = [Cooker(cook)]

    @stateless
    def encode_sample(self, sample: Cooked) -> Encoded:
        """Tokenize a record and choose the grids of its images from their recorded sizes."""
        names = {name: getattr(sample, name) for name in ("__key__", "__restore_key__", "__sources__")}
        exif = self.encoder.apply_exif
        images: ImageStore = sample.images
        result, reject = None, None
        try:
            with blamed_on(sample.record.key):
                result = self.encoder.encode(sample.record, lambda name: images.size(name, apply_exif=exif))
                result.number = int(sample.__key__.rsplit("/", 1)[-1].split(".")[0])
        except BadSample as bad:
            result, reject = None, bad
        config = WorkerConfig.active_worker_config
        assert config is not None
        # Number of this sample in its worker; independent of the rank that the worker belongs to.
        number = self.current_sample_index // max(config.num_workers, 1)
        seed = f"{self.seed}/{config.global_worker_id()}/{number}/{sample.record.key}"
        return Encoded(**names, sample=result, reject=reject, images=images, seed=seed)

    def select_samples_to_pack(self, samples: list[Encoded]) -> list[list[Encoded]]:
        """Packs under the budgets, or micro-batches in order; rejects are added to the first."""
        good = [sample for sample in samples if sample.sample is not None]
        bad = [sample for sample in samples if sample.sample is None]
        budget, size = self.encoder.settings.budget, self.micro_batch_size
        groups: list[list[Encoded]]
        if size is None:
            assert budget is not None
            costs = [self.encoder.cost(sample.sample) for sample in good if sample.sample is not None]
            groups = [[good[i] for i in rows] for rows in pack(costs, budget)]
        else:
            groups = [good[i : i + size] for i in range(0, len(good), size)]
        if bad:
            groups = [[*(groups[0] if groups else []), *bad], *groups[1:]]
        return groups

    @stateless
    def pack_selected_samples(self, samples: list[Encoded]) -> Delivery:
        """Read the images of a pack, decode them or check that they are whole, and plan it."""
        raw = RawPack()
        for item in samples:
            if item.sample is None:
                assert item.reject is not None
                raw.rejects.append(item.reject)
                continue
            try:
                with blamed_on(item.sample.key):
                    blobs = [item.images.read(image.path) for image in item.sample.images]
            except BadSample as bad:
                raw.rejects.append(bad)
                continue
            raw.samples.append(item.sample)
            raw.blobs.append(blobs)
            raw.seeds.append(item.seed)
        content = finish(raw, self.decode, self.plan, self.encoder.settings.tile_size)
        return Delivery(__key__="", __restore_key__=(), content=content)

    def build_batch(
        self, dataset: SavableDataset, *, worker_config: WorkerConfig, **_: Any
    ) -> SavableDataset:
        """Hook of Energon for the last steps: only packing, because a pack is a micro-batch."""
        return _QuietPacking(
            dataset,
            buffer_size=self.buffer_size,
            pre_packer=self.select_samples_to_pack,
            final_packer=self.pack_selected_samples,
            final_packer_stateless=True,
            worker_config=worker_config,
        )
