"""Figures of one log interval, over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_internvlx import platform
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
    cut_tokens: float


def interval_totals(
    step: ForwardStep, data: DataProvider, *, seconds: float, steps: int, peak: float | None
) -> IntervalTotals:
    """Figures since the last call; called on every rank, with two all-reduces.

    Args:
        step: has counted what this rank did; its counters start anew.
        data: has counted what it could not use.
        seconds: per step, of this rank.
        steps: of the interval.
        peak: FLOP/s of one device, None if unknown.
    """
    counters = step.take()
    flops = step.meter.take().model_flops if step.meter else 0
    world = dist.get_world_size()
    replicas = world // mpu.get_data_parallel_world_size()
    rejects = data.rejects
    sums = torch.tensor(
        [
            flops / TERA / replicas,
            counters.rows / replicas,
            counters.padding / replicas,
            *((rejects.cut_tiles, rejects.cut_tokens) if rejects else (0, 0)),
            *((rejects.counts if rejects else {}).get(cause, 0) for cause in CAUSES),
        ],
        device=platform.device(),
    )
    dist.all_reduce(sums)
    wait = counters.data_wait if data.is_loading_rank else 0.0
    peaks = torch.tensor([wait, platform.peak_memory() / GIB], dtype=torch.float32, device=platform.device())
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    teraflop, rows, padding, cut_tiles, cut_tokens, *rejected = sums.tolist()
    wait, memory = peaks.tolist()
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
    )


def validation_totals(data: DataProvider) -> ValidationCounts:
    """What the latest evaluation saw over all ranks; called on every rank, with one all-reduce."""
    mine = data.evaluated()
    counts = [mine.records, mine.cut_tiles, mine.cut_tokens, *(mine.rejects.get(c, 0) for c in CAUSES)]
    sums = torch.tensor(counts, dtype=torch.int64, device=platform.device())
    dist.all_reduce(sums)
    records, tiles, tokens, *rejected = sums.tolist()
    return ValidationCounts(records, _per_cause(rejected), tiles, tokens)


def _per_cause(counts: list[float]) -> dict[str, int]:
    return {cause: int(count) for cause, count in zip(CAUSES, counts, strict=True) if count}
