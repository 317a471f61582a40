"""Sums of gradients and of loss weights that Megatron does not make."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_attr_wrapped_model


def sum_vision_gradients(model: list[torch.nn.Module], group: torch.distributed.ProcessGroup) -> None:
    """Sum the tile-parallel vision encoder's gradients over the tensor-parallel group.

    Every TP rank encoded its own tiles with the same weights, so the gradient of the whole micro-batch is the sum.
    `main_grad` is Megatron's accumulation buffer.
    """
    if group.size() == 1:
        return
    for chunk in model:
        parameters = get_attr_wrapped_model(chunk, "parameters")()
        grads = [p.main_grad for p in parameters if p.requires_grad and getattr(p, "tile_parallel", False)]
        if not grads:
            continue
        flat = torch.cat([g.reshape(-1) for g in grads])
        torch.distributed.all_reduce(flat, group=group)
        for grad, summed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(summed.view_as(grad))


class WeightSum:
    """Sum of the loss weights of a global batch on this rank, by which its gradients are divided.

    Megatron counts in a 32-bit integer, which can represent neither square roots nor their sum. The sum stays on the
    device at one address, so that a replayed CUDA graph adds to it and reads it like the recorded step.
    """

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None

    def _sum(self, device: torch.device) -> torch.Tensor:
        if self._total is None:
            self._total = torch.zeros(1, dtype=torch.float64, device=device)
        return self._total

    def add(self, weight: torch.Tensor) -> None:
        """Add the loss weight of a micro-batch, fp64 [1]; on the last stage."""
        self._sum(weight.device).add_(weight)

    def take(self, device: torch.device) -> torch.Tensor:
        """Return the sum since the last call, fp32 scalar, and reset it; 0 on all stages but the last."""
        total = self._sum(device)
        taken = total[0].float()
        total.zero_()
        return taken


def finalize_gradients(
    model: list[torch.nn.Module],
    num_tokens: torch.Tensor | None = None,
    *args: Any,
    group: torch.distributed.ProcessGroup,
    weights: WeightSum | None,
    **kwargs: Any,
) -> None:
    """Run Megatron's `finalize_model_grads`, then sum the vision encoder's gradients over TP.

    Both are linear, so the order does not matter. After Megatron's data-parallel reduction the buffers are complete;
    with the distributed optimizer, they are complete in this rank's shard, which is the same on every TP rank.
    Megatron sends the divisor from the last stage to the other stages and sums it over the data-parallel ranks.
    """
    assert num_tokens is not None, "--calculate-per-token-loss is off"
    assert weights is not None, "the model provider was made without the forward step's weights"
    finalize_model_grads(model, weights.take(num_tokens.device), *args, **kwargs)
    sum_vision_gradients(model, group)


def finalize_hook(group: torch.distributed.ProcessGroup, weights: WeightSum | None):
    """Create the function for `config.finalize_model_grads_func`; it must not be called if `weights` is None."""
    return partial(finalize_gradients, group=group, weights=weights)
