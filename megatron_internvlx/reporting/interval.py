"""Measurements of a log interval, over all ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_internvlx import platform
from megatron_internvlx.data.encoded import FAILED, FALLBACKS
from megatron_internvlx.data.rejects import CAUSES
from megatron_internvlx.planning.metrics import TERA, mfu
from megatron_internvlx.training.provider import DataProvider
from megatron_internvlx.training.step import ForwardStep
from megatron_internvlx.training.validation import ValidationCounts

GIB = 1 << 30


@dataclass(frozen=True)
class IntervalTotals:
    """Work of all ranks in a log interval."""

    seconds: float
    """Per step."""
    tokens_per_s: float
    """Deep rows without padding, per second."""
    tflops: float
    """Useful TFLOP/s per device."""
    mfu: float | None
    """Share of the device's peak, 0 to 1; None if the peak is not known."""
    padding: float
    """Share of deep rows, 0 to 1."""
    wait: float
    """Longest wait for data on a loading rank, as a share of the interval."""
    memory: float
    """Highest peak of any device, in GiB."""
    rejects: dict[str, int]
    """Unusable samples since the start, per cause."""
    cut_tiles: float
    """Tiles removed since the start to fit samples into their limits."""
    cut_tokens: float
    """Tokens removed since the start to fit samples into their limits."""
    images_per_s: float = 0.0
    """Images per second that ranks cut into tiles themselves; an image for two ranks counts twice."""
    fallbacks: dict[str, int] = field(default_factory=dict)
    """Images that Pillow cut instead of DALI since the start, per reason."""
    blank_images: int = 0
    """Images since the start that could not be decoded after planning, and are black."""
    packs_ready: float | None = None
    """Fewest packs waiting for a loading rank at the end of the interval; None if ranks do not decode images."""


def interval_totals(
    step: ForwardStep, data: DataProvider, *, seconds: float, steps: int, peak: float | None
) -> IntervalTotals:
    """Sum up the work since the last call; called on every rank, with two all-reduces.

    Args:
        step: the forward step of this rank, whose counters start anew.
        data: the dataset provider, with its counts of unusable samples.
        seconds: time per step on this rank.
        steps: number of steps in the interval.
        peak: peak FLOP/s of one device; None if unknown.
    """
    counters = step.take()
    flops = step.meter.take().model_flops if step.meter else 0
    world = dist.get_world_size()
    replicas = world // mpu.get_data_parallel_world_size()
    rejects, decoding = data.rejects, data.take_decoding()
    sums = torch.tensor(
        [
            flops / TERA / replicas,
            counters.rows / replicas,
            counters.padding / replicas,
            *((rejects.cut_tiles, rejects.cut_tokens) if rejects else (0, 0)),
            *((rejects.counts if rejects else {}).get(cause, 0) for cause in CAUSES),
            decoding.cut,
            decoding.blank,
            *decoding.fallbacks,
        ],
        device=platform.device(),
    )
    dist.all_reduce(sums)
    wait = counters.data_wait if data.is_loading_rank else 0.0
    lacking = -1000.0 if decoding.ready is None else -float(decoding.ready)
    peaks = torch.tensor([wait, platform.peak_memory() / GIB, lacking], device=platform.device())
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    teraflop, rows, padding, cut_tiles, cut_tokens, *counts = sums.tolist()
    rejected, (images, blank, *fallbacks) = counts[: len(CAUSES)], counts[len(CAUSES) :]
    wait, memory, lacking = peaks.tolist()
    interval = max(seconds * steps, 1e-9)
    return IntervalTotals(
        seconds=seconds,
        tokens_per_s=(rows - padding) / interval,
        tflops=teraflop / interval / world,
        mfu=mfu(teraflop * TERA, interval, world, peak),
        padding=padding / max(rows, 1),
        wait=wait / interval,
        memory=memory,
        rejects=_per_cause(rejected),
        cut_tiles=cut_tiles,
        cut_tokens=cut_tokens,
        images_per_s=images / interval,
        fallbacks={r: int(n) for r, n in zip((*FALLBACKS, FAILED), fallbacks, strict=True) if n},
        blank_images=int(blank),
        packs_ready=None if lacking < -999 else -lacking,
    )


def validation_totals(data: DataProvider) -> ValidationCounts:
    """Sum up the counts of the latest evaluation; called on every rank, with one all-reduce."""
    mine = data.evaluated()
    counts = [mine.records, mine.cut_tiles, mine.cut_tokens, *(mine.rejects.get(c, 0) for c in CAUSES)]
    sums = torch.tensor(counts, dtype=torch.int64, device=platform.device())
    dist.all_reduce(sums)
    records, tiles, tokens, *rejected = sums.tolist()
    return ValidationCounts(records, _per_cause(rejected), tiles, tokens)


def _per_cause(counts: list[float]) -> dict[str, int]:
    return {cause: int(count) for cause, count in zip(CAUSES, counts, strict=True) if count}
