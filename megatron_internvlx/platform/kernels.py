"""Operations of vision encoder, PVTC and loss between matrix products, one kernel for each step and direction.

On CUDA they are Triton kernels (`kernels_triton.py`), elsewhere torch's operations (`kernels_torch.py`), with the
same backward formulas. A parameter whose gradient Transformer Engine would add to `main_grad` in its own kernels
gets it the same way here: see `Norm.accumulate`.

Shapes: `...` or n rows, C channels of a row, N windows, w keys of a window, h = heads * width of a head,
V columns of the vocabulary, of which a rank has V/TP.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from megatron_internvlx.platform import kernels_torch


class Norm(NamedTuple):
    """A norm over the last dimension."""

    weight: Tensor
    """`[C]`; its type is that of the result."""
    bias: Tensor | None
    """`[C]`: a layer norm. None: an RMS norm."""
    eps: float
    accumulate: bool = False
    """Gradients of weight and bias are added to their `main_grad`, where they have one, as Transformer
    Engine's fused accumulation does."""


def implementation(x: Tensor) -> ModuleType:
    """Module with the kernels for this tensor."""
    if not x.is_cuda:
        return kernels_torch
    from megatron_internvlx.platform import kernels_triton

    return kernels_triton


def norm_and_pass(x: Tensor, by: Norm) -> tuple[Tensor, Tensor]:
    """The norm of `x` and `x` itself, `[..., C]` each, for the residual: both gradients meet in one kernel."""
    return _AddNorm.apply(x, None, None, None, 1.0, *by)


def add_branch(
    residual: Tensor,
    branch: Tensor,
    *,
    scale: Tensor | None = None,
    keep: Tensor | None = None,
    keep_rate: float = 1.0,
    accumulate: bool = False,
) -> Tensor:
    """`residual + branch * scale * keep / keep_rate`.

    Args:
        residual: `[..., C]`.
        branch: the same.
        scale: `[C]`. None: 1.
        keep: 0 or 1 per entry of the dimension before C, shape `[1, T, 1]` or `[N, 1]`. None: all are kept.
        keep_rate: the probability of 1.
        accumulate: as in `Norm`, for `scale`.
    """
    return _AddNorm.apply(residual, branch, scale, keep, keep_rate, None, None, 0.0, accumulate)


def add_branch_and_norm(
    residual: Tensor,
    branch: Tensor,
    by: Norm,
    *,
    scale: Tensor | None = None,
    keep: Tensor | None = None,
    keep_rate: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`add_branch`, and the norm of its result: `(norm, result)`."""
    return _AddNorm.apply(residual, branch, scale, keep, keep_rate, *by)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    return _GatedSilu.apply(gate, up)


def window_attention(query_Nh: Tensor, key_Nwh: Tensor, value_Nwh: Tensor, heads: int) -> Tensor:
    """One query per window attends to the window's w keys, in `heads` heads: `[N, h]`."""
    return _WindowAttention.apply(query_Nh, key_Nwh, value_Nwh, heads)


def twin_norm(x: Tensor, a: Norm, b: Norm) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Two RMS norms of the same rows, each handed out twice.

    Two readers of a norm get an output each, so that all four gradients meet in the kernel of the backward pass.
    """
    outputs = _TwinNorm.apply(x, a.weight, b.weight, a)
    return outputs[:2], outputs[2:]


def split_packed(packed: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Views of `packed` along `dim`, which disappears; their gradients are joined without a copy if they lie so."""
    return _SplitPacked.apply(packed, dim, False)


def cut_packed(packed: Tensor, dim: int) -> tuple[Tensor, ...]:
    """`split_packed` into contiguous tensors, by one copy for all; one more joins their gradients."""
    return _SplitPacked.apply(packed, dim, True)


def vocab_parallel_cross_entropy(logits: Tensor, targets_n: Tensor, group: ProcessGroup) -> Tensor:
    """Cross entropy of each row, `[n]`, at least in fp32.

    Of the logits' size nothing is kept but the logits, which the backward pass replaces by their gradient: nothing
    else may read them then, and a second backward pass is an error.

    Args:
        logits: this rank's columns, `[n, V/TP]` or `[n, 1, V/TP]`, of finite numbers.
        targets_n: token ids, int64, from 0 to V - 1.
        group: the tensor parallel group, whose ranks have the same n.
    """
    return _VocabParallelCrossEntropy.apply(logits.flatten(0, -2).contiguous(), targets_n, group)


def _destinations(parameters: list[Tensor | None], accumulate: bool) -> tuple[list[Tensor | None], bool]:
    """Buffers for the gradients of `parameters` (None: not wanted), and whether they are added to what is there."""
    wanted = [p for p in parameters if p is not None]
    add = bool(wanted) and accumulate and all(getattr(p, "main_grad", None) is not None for p in wanted)
    if add:
        return [None if p is None else p.main_grad for p in parameters], True  # type: ignore[attr-defined]
    return [None if p is None else torch.empty_like(p) for p in parameters], False


def _gradients(
    parameters: list[Tensor | None], sums: list[Tensor | None], added: bool
) -> list[Tensor | None]:
    """Gradients of `parameters` for autograd, or stand-ins where the gradients are in `main_grad`."""
    if not added:
        return sums
    for parameter in parameters:
        if parameter is not None:
            # Megatron's hook then adds nothing; it still wants a gradient to be there.
            parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return [None if p is None else torch.empty_like(p) for p in parameters]


class _AddNorm(torch.autograd.Function):
    """`kernels_torch.add_norm`: returns (norm, out), or `out` alone without a norm."""

    @staticmethod
    def forward(ctx: Any, residual, branch, scale, keep, keep_rate, weight, bias, eps, accumulate):
        rms = bias is None
        out, y, mean, rstd = implementation(residual).add_norm(
            residual, branch, scale, keep, keep_rate, weight, bias, eps, rms
        )
        ctx.set_materialize_grads(False)
        ctx.keep_rate, ctx.rms, ctx.accumulate = keep_rate, rms, accumulate
        ctx.parameters = (scale, weight, bias)
        ctx.branch_dtype = None if branch is None else branch.dtype
        x = residual if branch is None else out
        # Only the gradient of `scale` reads the branch.
        reads_branch = scale is not None and ctx.needs_input_grad[2]
        ctx.save_for_backward(
            x.contiguous() if weight is not None else None,  # the kernels index rows
            branch if reads_branch else None,
            scale,
            keep,
            weight,
            bias,
            mean,
            rstd,
        )
        return out if weight is None else (y, x)

    @staticmethod
    def backward(ctx: Any, *gradients):
        x, branch, scale, keep, weight, bias, mean, rstd = ctx.saved_tensors
        g_y, g_out = (None, *gradients) if weight is None else gradients
        if g_y is None and g_out is None:
            return (None,) * 9
        scale_wanted, *norm_wanted = (ctx.needs_input_grad[i] for i in (2, 5, 6))
        wants = (scale_wanted, *(wanted and g_y is not None for wanted in norm_wanted))
        parameters = [p if wanted else None for p, wanted in zip(ctx.parameters, wants, strict=True)]
        sums, add = _destinations(parameters, ctx.accumulate)
        like = g_out if g_y is None else g_y
        branch_dtype = ctx.branch_dtype if ctx.needs_input_grad[1] or parameters[0] is not None else None
        g_residual, g_branch = implementation(like).add_norm_backward(
            g_y, g_out, x, branch, scale, keep, ctx.keep_rate, weight, bias, mean, rstd, ctx.rms,
            branch_dtype, sums, add,
        )  # fmt: skip
        g_scale, g_weight, g_bias = _gradients(parameters, sums, add)
        return (
            g_out if g_y is None else g_residual,
            None if branch_dtype is None else g_branch,
            g_scale,
            None,
            None,
            g_weight,
            g_bias,
            None,
            None,
        )


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate, up):
        ctx.save_for_backward(gate, up)
        return implementation(gate).gated_silu(gate, up)

    @staticmethod
    def backward(ctx: Any, g_out):
        return implementation(g_out).gated_silu_backward(g_out, *ctx.saved_tensors)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, value, heads):
        ctx.save_for_backward(query, key, value)
        ctx.heads = heads
        return implementation(query).window_attention(query, key, value, heads)

    @staticmethod
    def backward(ctx: Any, g_out):
        found = implementation(g_out).window_attention_backward(g_out, *ctx.saved_tensors, ctx.heads)
        return *found, None


class _TwinNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight_a, weight_b, by):
        y_a, y_b, rstd = implementation(x).twin_norm(x, weight_a, weight_b, by.eps)
        ctx.accumulate, ctx.parameters = by.accumulate, (weight_a, weight_b)
        ctx.save_for_backward(x.contiguous(), weight_a, weight_b, rstd)  # the kernels index rows
        return y_a, y_a.view_as(y_a), y_b, y_b.view_as(y_b)

    @staticmethod
    def backward(ctx: Any, *gradients):
        x, weight_a, weight_b, rstd = ctx.saved_tensors
        wanted = zip(ctx.parameters, ctx.needs_input_grad[1:3], strict=True)
        parameters = [p if wants else None for p, wants in wanted]
        sums, add = _destinations(parameters, ctx.accumulate)
        g_x = implementation(x).twin_norm_backward(*gradients, x, weight_a, weight_b, rstd, sums, add)
        return g_x, *_gradients(parameters, sums, add), None


class _SplitPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed, dim, copied):
        ctx.dim = dim % packed.dim()
        ctx.shape, ctx.stride = packed.shape, packed.stride()
        parts = packed.movedim(ctx.dim, 0).contiguous() if copied else packed.movedim(ctx.dim, 0)
        return tuple(parts.select(0, i) for i in range(len(parts)))

    @staticmethod
    def backward(ctx: Any, *gradients):
        first, step = gradients[0], ctx.stride[ctx.dim]
        strides = tuple(s for i, s in enumerate(ctx.stride) if i != ctx.dim)
        # Attention writes the three gradients as the slices of one buffer when its inputs were that.
        together = all(
            g.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and g.storage_offset() == first.storage_offset() + i * step
            and g.stride() == strides
            for i, g in enumerate(gradients)
        )
        if together:
            return first.as_strided(ctx.shape, ctx.stride), None, None
        return torch.stack(gradients, ctx.dim), None, None


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, targets, group):
        ctx.first = group.rank() * logits.shape[1]
        losses, maximum, total, picked = implementation(logits).cross_entropy(logits, targets, ctx.first)
        if group.size() > 1 and len(logits):
            losses, maximum, total = _join_shards(maximum, total, picked, group)
        ctx.save_for_backward(logits, targets, maximum, total)
        return losses

    @staticmethod
    def backward(ctx: Any, g_losses):
        logits, targets, maximum, total = ctx.saved_tensors
        gradient = logits.detach()
        numbers = (ctx.first, maximum, total)
        implementation(g_losses).cross_entropy_backward(g_losses, gradient, targets, *numbers)
        # Autograd sees no write of a Triton kernel, and would take the gradient for logits in a second pass.
        torch.autograd.graph.increment_version(logits)
        return gradient, None, None


def _join_shards(
    maximum: Tensor, total: Tensor, picked: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, maxima and sums of exponentials of whole rows, `[n]` each, from those of this rank's columns."""
    highest = maximum.clone()
    all_reduce(highest, ReduceOp.MAX, group=group)
    sums = torch.stack([total * (maximum - highest).exp(), picked])
    all_reduce(sums, group=group)
    total, picked = sums.unbind()
    return total.log() - (picked - highest), highest, total
