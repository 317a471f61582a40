"""The first replay of a step's CUDA graph, compared with the same step without the graph.

A graph that was recorded wrongly trains on without an error: with the lengths of the packs that it was recorded from,
with weights cast once, with memory that others have taken. So it is recorded from the micro-batches of the step
before, is replayed with the next ones, and has to give what those give without a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_internvlx.megatron_settings import Execution
from megatron_internvlx.platform.rng import keep_random_state
from megatron_internvlx.precision import Precision

LIMIT = 1e-2
"""Largest relative difference of a loss or gradient norm. Not measured on a GPU: rounding of bf16, whose sums may be
taken in another order; one pack's lengths instead of another's change both by tens of percent."""
REMEDY = "--cuda-graph-impl none trains without it"


class GraphDiffers(RuntimeError):
    """The graph of a step gives other numbers than the step."""


@dataclass(frozen=True)
class FirstReplay:
    """Rule of the comparison of the first replay.

    Args:
        limit: largest relative difference of a micro-batch's loss, or of the norm of a gradient buffer.
        skipped: reason why it is not compared at all; None if it is.
    """

    limit: float = LIMIT
    skipped: str | None = None

    @classmethod
    def of(cls, execution: Execution, precision: Precision) -> FirstReplay:
        """Return how a run of these settings compares: bit for bit in deterministic mode."""
        if precision.fp8 and precision.fp8_recipe == "delayed":
            return cls(skipped="each pass over a step changes the history of FP8's delayed scales")
        return cls(0.0 if execution.deterministic_mode else LIMIT)

    def check(self, found: Tensor, expected: Tensor) -> float:
        """Compare `numbers_of` a replay with those of the step; the same answer on all ranks.

        Returns the largest relative difference of all ranks. Raises GraphDiffers if it is more than the limit. What
        is not finite without a graph is not compared: it is the step's own and ends training there.
        """
        difference = (found - expected).abs() / expected.abs().clamp(min=torch.finfo(torch.float32).tiny)
        difference = difference.nan_to_num(nan=torch.inf, posinf=torch.inf).where(expected.isfinite(), 0.0)
        worst = int(difference.argmax())
        largest = difference.max()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        if (value := float(largest)) > self.limit:
            raise GraphDiffers(
                f"the first replay of the step's CUDA graph differs from the step without it by {value:.1e}, more than "
                f"{self.limit:g} (this rank: {float(found[worst]):.6g} and {float(expected[worst]):.6g}); nothing of "
                f"it is saved. {REMEDY}"
            )
        return value


def numbers_of(reports: list[dict[str, Tensor]], model: list[Any]) -> Tensor:
    """Losses of a step's micro-batches and norms of this rank's gradient buffers: fp32 [m + b].

    Args:
        reports: what the schedule returns, of m micro-batches: "loss", a sum and its weight.
        model: chunks in Megatron's DistributedDataParallel, with b buffers in all.
    """
    losses = [report["loss"][0].float() for report in reports]
    buffers = [buffer for chunk in model for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    norms = [torch.linalg.vector_norm(buffer.grad_data, dtype=torch.float32) for buffer in buffers]
    return torch.stack([*losses, *norms])


def start_again(model: list[Any], set_back: Callable[[], None]) -> None:
    """Forget the gradients of a pass, and draw the same random numbers in the next one."""
    for chunk in model:
        chunk.zero_grad_buffer()
    set_back()


def compared(
    check: FirstReplay,
    model: list[Any],
    plain: Callable[[], Any],
    record: Callable[[], Any],
    replay: Callable[[], Any],
) -> tuple[Any, float]:
    """Run a step without its graph, record the graph, and replay it on the step's micro-batches.

    Args:
        check: how the two are compared.
        model: chunks in Megatron's DistributedDataParallel.
        plain: function that runs the step without a graph.
        record: function that records the graph from other micro-batches and may replay it.
        replay: function that replays the graph on the step's micro-batches.

    Returns:
        The replay's reports and the largest difference. Gradients are those of the replay.
    """
    set_back = keep_random_state()
    expected = numbers_of(plain(), model)
    start_again(model, set_back)
    record()
    start_again(model, set_back)
    reports = replay()
    return reports, check.check(numbers_of(reports, model), expected)
