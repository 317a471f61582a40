"""The first replay of a step's CUDA graph, compared with the same step without the graph.

A graph that was recorded wrongly trains on without an error: with the lengths of the packs that it was recorded from,
with random numbers fixed at that moment, without what the host should have done. So it is recorded from the
micro-batches of the step before, is replayed with the next ones, and has to give what those give without a graph. What
goes wrong only later is not seen: memory that something takes after this step, or weights that change.
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
EXACT_LIMIT = 1e-4
"""The same in deterministic mode, where only a collective may sum in another order; less is a warning."""
LEAST_LOSS = 1e-3
"""Loss per token below which differences count relative to this: of a memorised answer only rounding is left."""
REMEDY = "--cuda-graph-impl none trains without it"


class GraphDiffers(RuntimeError):
    """The graph of a step gives other numbers than the step."""


@dataclass(frozen=True)
class FirstReplay:
    """Rule of the comparison of the first replay.

    Args:
        limit: largest relative difference of a micro-batch's loss, or of the norm of a gradient buffer.
        exact: whether any difference is worth a warning, as in deterministic mode.
        skipped: reason why it is not compared at all; None if it is.
    """

    limit: float = LIMIT
    exact: bool = False
    skipped: str | None = None

    @classmethod
    def of(cls, execution: Execution, precision: Precision) -> FirstReplay:
        """Return the rule for a run of these settings."""
        if precision.fp8 and precision.fp8_recipe == "delayed":
            return cls(skipped="each pass over a step changes the history of FP8's delayed scales")
        exact = execution.deterministic_mode
        return cls(EXACT_LIMIT if exact else LIMIT, exact)

    def check(self, found: Tensor, expected: Tensor) -> float:
        """Compare `numbers_of` a replay with those of the step; the same answer on all ranks.

        Returns the largest relative difference of all ranks. Raises GraphDiffers if it is more than the limit. What
        is not finite without a graph is not compared: it is the step's own and ends training there.
        """
        value, least = expected.unbind()
        size = torch.maximum(value.abs(), least).clamp(min=torch.finfo(torch.float32).tiny)
        difference = ((found[0] - value).abs() / size).nan_to_num(nan=torch.inf, posinf=torch.inf)
        difference = difference.where(value.isfinite(), 0.0)
        worst = int(difference.argmax())
        largest = difference.max()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        if (most := float(largest)) > self.limit:
            raise GraphDiffers(
                f"the first replay of the step's CUDA graph differs from the step without it by {most:.1e}, more than "
                f"{self.limit:g} (this rank: {float(found[0, worst]):.6g} and {float(value[worst]):.6g}); nothing of "
                f"it is saved. {REMEDY}"
            )
        return most

    def describe(self, difference: float | None) -> str:
        """Describe the outcome in the line that says that a graph was recorded."""
        if difference is None:
            return f"not compared with steps without it: {self.skipped}"
        if self.exact and difference:
            return (
                f"WARNING: its first replay differs by {difference:.1e} from the step without it, which "
                "--deterministic-mode does not promise but is worth a look"
            )
        return (
            "its first replay gives the losses and gradient norms of the step without it (largest difference "
            f"{difference:.1e})"
        )


def numbers_of(reports: list[dict[str, Tensor]], model: list[Any]) -> Tensor:
    """Losses of a step's micro-batches and norms of this rank's gradient buffers: fp32 [2, m + b].

    The second row is the least value that differences count relative to: for a loss, that of its tokens at LEAST_LOSS.

    Args:
        reports: what the schedule returns, of m micro-batches: "loss", a sum and its weight.
        model: chunks in Megatron's DistributedDataParallel, with b buffers in all.
    """
    losses = [report["loss"].float() for report in reports]
    buffers = [buffer for chunk in model for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    norms = [torch.linalg.vector_norm(buffer.grad_data, dtype=torch.float32) for buffer in buffers]
    values = torch.stack([*(loss[0] for loss in losses), *norms])
    least = torch.stack(
        [*(LEAST_LOSS * loss[1] for loss in losses), *(torch.zeros_like(norm) for norm in norms)]
    )
    return torch.stack([values, least])


def zero_gradients(model: list[Any]) -> None:
    """Forget the gradients of a pass."""
    for chunk in model:
        chunk.zero_grad_buffer()


def gather_again(model: list[Any]) -> None:
    """Make the next forward pass gather the parameters of a sharded optimizer, as the ones after it have to.

    After a save or an evaluation, which gather them at once, Megatron's next pass leaves it out: recorded like this, a
    graph would never gather, and train with what the other ranks had then.
    """
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.reset_param_sync_dispatch_state()


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
    zero_gradients(model)
    record()  # further on in the random numbers than `plain` began: none of them may be fixed here
    zero_gradients(model)
    set_back()
    reports = replay()
    return reports, check.check(numbers_of(reports, model), expected)
