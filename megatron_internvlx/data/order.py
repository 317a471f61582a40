"""The simple data path: an endless, deterministic order of samples, split over data-parallel ranks.

The sample at global position p depends only on the seed and p, not on workers, ranks or earlier positions, so that a
run resumes at any number of consumed samples and on any number of ranks.
"""

import multiprocessing
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_internvlx.data.decode import TileDecoder
from megatron_internvlx.data.encoded import EncodedImage, PackImage
from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.data.plan import PlanSettings, SequencePlan, build_plan
from megatron_internvlx.data.prefetch import WORKER_AHEAD, Prefetcher
from megatron_internvlx.data.rejects import BadSample, RejectLog, TooManyRejects, blamed_on
from megatron_internvlx.data.sample import Sample, SampleEncoder, filler_sample
from megatron_internvlx.signal_mask import keep_signal_mask

# Samples of a micro-batch, each with its tiles, uint8 tensor [T, 3, S, S] on CPU; or with its images, if files travel.
Items = list[tuple[Sample, Any]]
Finish = Callable[[Items], Any]

# Replacements tried for one position. At 50 % bad records the chance to run out is 1e-20.
MAX_ATTEMPTS = 64


class ConversationDataset(Dataset):
    """Samples by global position: epoch `position // len`, each epoch in its own order from the seed.

    An item is `(Sample, tiles)` with tiles uint8 [T, 3, S, S] as numpy array (T is 0 for text only), or a BadSample.
    With a decoder whose files travel, it is `(Sample, images)` instead: each a file or the tiles of one image.

    Args:
        manifest: records.
        encoder: converts records to samples.
        seed: seed of the order and of the JPEG augmentation.
        shuffle: False keeps the order of the files, for validation.
        records: maximum number of records without shuffling, spread evenly over all sets; None: all.
        decode: decoder of images; None: Pillow.
    """

    def __init__(
        self,
        manifest: Manifest,
        encoder: SampleEncoder,
        *,
        seed: int,
        shuffle: bool = True,
        records: int | None = None,
        decode: TileDecoder | None = None,
    ):
        if seed < 0:
            raise ValueError(f"data seed {seed} must not be negative")
        size = encoder.settings.tile_size
        self.decode = decode or TileDecoder("pillow", tile_size=size, apply_exif=encoder.apply_exif)
        self.manifest, self.encoder = manifest, encoder
        self.seed, self.shuffle = seed, shuffle
        self.records = len(manifest) if records is None else min(records, len(manifest))

    def __len__(self) -> int:
        """Samples in an epoch; positions continue beyond it without end."""
        return self.records

    def __getitem__(self, position: int) -> tuple[Sample, Any] | BadSample:
        return self.attempt(position, 0)

    def attempt(self, position: int, attempt: int) -> tuple[Sample, Any] | BadSample:
        """Item at `position`; with `attempt` 1 or more, a replacement drawn from (seed, position, attempt)."""
        number = self._number(position, attempt)
        try:
            with blamed_on(self.manifest.key(number)):
                sample = self.encoder.encode(self.manifest.record(number))
                sample.number = number
                return sample, self._tiles(sample, random.Random(f"{self.seed}/{position}/{attempt}"))
        except BadSample as bad:
            return bad

    def _number(self, position: int, attempt: int) -> int:
        if position < 0:
            raise IndexError(f"position {position} must not be negative")
        if attempt:
            return int(np.random.default_rng([self.seed, position, attempt]).integers(len(self)))
        epoch, index = divmod(position, len(self))
        if self.shuffle:
            return int(_order(self.manifest, epoch, self.seed)[index])
        return index * len(self.manifest) // self.records

    def _tiles(self, sample: Sample, rng: random.Random) -> np.ndarray | list[np.ndarray | EncodedImage]:
        augment = rng if sample.jpeg_augment else None
        images = [self.decode(image.path, image, augment) for image in sample.images]
        if self.decode.travel:
            return images
        size = self.encoder.settings.tile_size
        cut = [image for image in images if not isinstance(image, EncodedImage)]
        return np.concatenate([np.empty((0, 3, size, size), dtype=np.uint8), *cut])


@lru_cache(maxsize=2)
def _order(manifest: Manifest, epoch: int, seed: int) -> np.ndarray:
    # Cached per process and not in the data set, which is sent to every worker.
    return manifest.order(epoch, seed)


class _Slot(NamedTuple):
    """Result of a worker for one position: the sample, if any was found, and the bad ones before it.

    `fallbacks` counts per reason the images that Pillow cut although DALI was asked for.
    """

    item: tuple[Sample, Any] | None
    rejects: list[BadSample]
    fallbacks: dict[str, int]


class _Slots(Dataset):
    """ConversationDataset that replaces bad samples inside the worker.

    Positions have no end, and a bad sample is replaced; with `once`, positions beyond the first epoch are empty, and
    bad samples are not replaced.
    """

    def __init__(self, dataset: ConversationDataset, *, once: bool = False):
        self.dataset, self.once = dataset, once

    def __getitem__(self, position: int) -> _Slot:
        rejects: list[BadSample] = []
        if self.once and position >= len(self.dataset):
            return _Slot(None, rejects, {})
        for attempt in range(1 if self.once else MAX_ATTEMPTS):
            item = self.dataset.attempt(position, attempt)
            if not isinstance(item, BadSample):
                return _Slot(item, rejects, self.dataset.decode.take_fallbacks())
            rejects.append(item)
        return _Slot(None, rejects, self.dataset.decode.take_fallbacks())


def _positions(start: int, size: int, rank: int, ranks: int, limit: int | None) -> Iterator[list[int]]:
    """Positions of this rank's micro-batches: ranks take consecutive blocks of `size` in turn."""
    number = 0
    while limit is None or number < limit:
        first = start + (number * ranks + rank) * size
        yield list(range(first, first + size))
        number += 1


class _Delivery(NamedTuple):
    """Result of a worker for a micro-batch.

    `content` is None if a position has no sample, and a ValueError if the samples do not fit together: raised in the
    worker, its message would be lost in a traceback. It has `good` samples, `pictured` of them with images; `cut`
    (tiles, tokens) was removed from them to fit, and Pillow cut the `fallbacks`, counted per reason.
    """

    content: Any
    rejects: list[list[BadSample]]
    good: int
    pictured: int
    cut: tuple[int, int]
    fallbacks: Counter[str]


class _Finish:
    """Last step inside the worker: converts the slots of a micro-batch to its final form.

    `filler` replaces a micro-batch without any sample; None: every position must have one.
    """

    def __init__(self, finish: Finish, filler: tuple[Sample, Any] | None = None):
        self.finish, self.filler = finish, filler

    def __call__(self, slots: list[_Slot]) -> _Delivery:
        items = [(slot.item[0], _as_tensors(slot.item[1])) for slot in slots if slot.item is not None]
        cut = (sum(s.dropped_tiles for s, _ in items), sum(s.dropped_tokens for s, _ in items))
        good, pictured, content = len(items), sum(bool(sample.images) for sample, _ in items), None
        if self.filler is not None and not items:
            items = [self.filler]
        if self.filler is not None or good == len(slots):
            try:
                content = self.finish(items)
            except ValueError as error:
                content = error
        fallbacks: Counter[str] = Counter()
        for slot in slots:
            fallbacks.update(slot.fallbacks)
        return _Delivery(content, [slot.rejects for slot in slots], good, pictured, cut, fallbacks)


def _as_tensors(images: np.ndarray | list[np.ndarray | EncodedImage]) -> torch.Tensor | list[PackImage]:
    if isinstance(images, np.ndarray):
        return torch.from_numpy(images)
    return [image if isinstance(image, EncodedImage) else torch.from_numpy(image) for image in images]


def plan_micro_batch(
    items: Items, settings: PlanSettings
) -> tuple[SequencePlan, torch.Tensor | None, list[PackImage] | None]:
    """Plan of a micro-batch, and its tiles, uint8 [T, 3, S, S], or its images, in the order of the plan."""
    plan = build_plan(
        [sample.input_ids for sample, _ in items],
        [sample.labels for sample, _ in items],
        [sample.is_visual for sample, _ in items],
        settings,
        [sample.number for sample, _ in items],
    )
    if any(isinstance(images, list) for _, images in items):
        return plan, None, [image for _, images in items for image in images]
    return plan, torch.cat([tiles for _, tiles in items]), None


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)  # each worker has one core; more threads would fight over it
    threading.Thread(target=_end_with_training, name="training process", daemon=True).start()


def _end_with_training() -> None:
    """Exit with the training process. Torch's workers watch the forkserver instead, which outlives it."""
    training = multiprocessing.parent_process()
    assert training is not None
    training.join()
    os._exit(1)


def _check_split(start: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> None:
    if start < 0 or micro_batch_size < 1 or not 0 <= dp_rank < dp_size:
        raise ValueError(
            f"start {start} must not be negative, micro_batch_size {micro_batch_size} must be at least 1 and "
            f"dp_rank {dp_rank} must be in 0..{dp_size - 1}"
        )


def batches(
    dataset: ConversationDataset,
    *,
    start: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int,
    reject_log: RejectLog,
    finish: Finish = list,
    limit: int | None = None,
    prefetch_factor: int = WORKER_AHEAD,
    start_method: str = "forkserver",
) -> Iterator[Any]:
    """Micro-batches of this rank: `finish(items)`, called in the worker; by default the items themselves.

    `start`: samples that earlier runs consumed, over all ranks. `limit`: number of micro-batches; None: no end. A bad
    sample is counted in `reject_log` and replaced by one that depends only on its position, so that other positions
    and ranks do not change. Rejects and removed tiles and tokens are counted in the order of the batches, however far
    ahead the workers are.

    Raises ValueError for an impossible split and TooManyRejects when `reject_log` is over its limit or
    no replacement can be found. Close the generator (or let it go) to stop the workers.
    """
    _check_split(start, micro_batch_size, dp_rank, dp_size)
    positions = _positions(start, micro_batch_size, dp_rank, dp_size, limit)
    loader = _loader(_Slots(dataset), positions, _Finish(finish), num_workers, prefetch_factor, start_method)
    yield from _counted(loader, num_workers, reject_log)


def held_out_batches(
    dataset: ConversationDataset,
    *,
    micro_batches: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int,
    reject_log: RejectLog,
    finish: Finish = list,
    fallbacks: Counter[str] | None = None,
) -> Iterator[Any]:
    """One evaluation: this rank's share of the data set's records, each exactly once over all ranks.

    Every rank gives `micro_batches` of them. A bad record is counted in `reject_log` and left out, not replaced; a
    micro-batch without any record is the filler of `sample.filler_sample`, whose weight is 0. Images that Pillow cut
    instead of DALI are added to `fallbacks`, per reason.

    Raises ValueError if the micro-batches are too few for all records.
    """
    _check_split(0, micro_batch_size, dp_rank, dp_size)
    records = len(dataset)
    if micro_batches * micro_batch_size * dp_size < records:
        raise ValueError(
            f"{micro_batches} micro-batches of {micro_batch_size} on {dp_size} ranks are too few for {records} records"
        )
    size = dataset.encoder.settings.tile_size
    nothing: Any = [] if dataset.decode.travel else torch.empty((0, 3, size, size), dtype=torch.uint8)
    positions = _positions(0, micro_batch_size, dp_rank, dp_size, micro_batches)
    loader = _loader(
        _Slots(dataset, once=True), positions, _Finish(finish, (filler_sample(), nothing)), num_workers
    )
    yield from _counted(loader, num_workers, reject_log, fallbacks)


def _loader(
    slots: _Slots,
    positions: Iterator[list[int]],
    finish: _Finish,
    num_workers: int,
    prefetch_factor: int = WORKER_AHEAD,
    start_method: str = "forkserver",
) -> DataLoader:
    options: dict[str, Any] = {}
    if num_workers:
        context: Any = multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            context.set_forkserver_preload([__name__])  # imports once, not once per worker
        options = {"multiprocessing_context": context, "prefetch_factor": prefetch_factor}
    return DataLoader(
        slots,
        batch_sampler=positions,
        collate_fn=finish,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        **options,
    )


def _counted(
    loader: DataLoader, num_workers: int, reject_log: RejectLog, fallbacks: Counter[str] | None = None
) -> Iterator[Any]:
    """Contents in order; the rejects of each are counted before it is given."""
    # Receiving from a worker takes milliseconds; a thread does it while the model computes.
    with keep_signal_mask():  # workers block the signals that this process blocks
        batches_of_workers = iter(loader)
    deliveries = Prefetcher(batches_of_workers, depth=1) if num_workers else batches_of_workers
    try:
        for delivery in deliveries:
            if fallbacks is not None:
                fallbacks.update(delivery.fallbacks)
            yield _checked(delivery, reject_log)
    finally:
        if isinstance(deliveries, Prefetcher):
            deliveries.close()


def _checked(delivery: _Delivery, reject_log: RejectLog) -> Any:
    """Content of a delivery, after counting its samples. Raises the error that it contains."""
    bad = [reject for rejects in delivery.rejects for reject in rejects]
    for reject in bad:
        reject_log.add(reject)
    reject_log.count_samples(delivery.good, len(bad), delivery.pictured)
    reject_log.count_removed(*delivery.cut)
    if delivery.content is None:
        raise TooManyRejects(reject_log.nothing_found(f"{MAX_ATTEMPTS} tries"))
    if isinstance(delivery.content, ValueError):
        raise delivery.content
    return delivery.content
