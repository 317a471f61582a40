"""Gradient sums that Megatron does not know about."""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_attr_wrapped_model


def sum_vision_gradients(model: list[torch.nn.Module], group: torch.distributed.ProcessGroup) -> None:
    """Sum the tile-parallel vision encoder's gradients over the tensor-parallel group.

    Every TP rank encoded its own tiles with the same weights, so the gradient of the whole
    micro-batch is the sum. `main_grad` is Megatron's accumulation buffer.
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


def finalize_gradients(model, *args, group: torch.distributed.ProcessGroup, **kwargs) -> None:
    """Megatron's finalize_model_grads, then the sum over TP of the vision encoder's gradients.

    Both are linear, so the order does not matter; after Megatron's data-parallel reduction the
    buffers are complete (or, with the distributed optimizer, complete in this rank's shard, which
    is the same shard on every TP rank).
    """
    finalize_model_grads(model, *args, **kwargs)
    sum_vision_gradients(model, group)


def finalize_hook(group: torch.distributed.ProcessGroup):
    """The function to install as `config.finalize_model_grads_func`."""
    return partial(finalize_gradients, group=group)
