"""The kernels of `kernels.py` in torch's own operations, for the CPU: what each computes, forward and backward.

Shapes: `...` rows, C channels of a row, N windows, w keys of a window, a heads of d channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def _wide(x: Tensor) -> Tensor:
    """At least fp32, in which statistics are taken."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _keep_factor(keep: Tensor, keep_rate: float) -> Tensor:
    return keep / keep_rate


def _put(sums: Sequence[Tensor | None], gradients: Sequence[Tensor | None], add: bool) -> None:
    for total, gradient in zip(sums, gradients, strict=True):
        if total is not None:
            assert gradient is not None
            if add:
                total.add_(gradient)
            else:
                total.copy_(gradient)


def add_norm(
    residual: Tensor, branch: Tensor | None, scale: Tensor | None, keep: Tensor | None, keep_rate: float,
    weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`out = residual + branch * scale * keep / keep_rate`, and its norm; each part may be absent.

    Args:
        residual: `[..., C]`.
        branch: the same; absent: no `out`.
        scale: `[C]`.
        keep: 0 or 1 per entry of the dimension before C.
        weight: `[C]`; absent: no norm.
        bias: `[C]`, of a layer norm.
        rms: an RMS norm, cast to the weight's type before the weight is applied; False: a layer norm.

    Returns:
        out and its norm, `[..., C]`, and the means and inverse deviations of the rows; empty where absent.
    """
    none = residual.new_empty(0)
    x = residual
    if branch is not None:
        added = branch if scale is None else branch * scale
        x = residual + (added if keep is None else added * _keep_factor(keep, keep_rate))
    out = none if branch is None else x
    if weight is None:
        return out, none, none, none
    if not rms:
        x = x if x.dtype == weight.dtype else x.to(weight.dtype)
        y, mean, rstd = torch.native_layer_norm(x, list(weight.shape), weight, bias, eps)
        return out, y, mean, rstd
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return out, weight * (wide * rstd).to(weight.dtype), none, rstd


def add_norm_backward(
    g_y: Tensor | None, g_out: Tensor | None, x: Tensor, branch: Tensor | None, scale: Tensor | None,
    keep: Tensor | None, keep_rate: float, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    rstd: Tensor, rms: bool, branch_dtype: torch.dtype | None, sums: list[Tensor | None], add: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The backward pass of `add_norm`.

    Args:
        g_y: gradient of the norm; absent: none.
        g_out: gradient of `out`; absent: none.
        x: what was normalized.
        branch: as in the forward pass, needed with `scale`.
        branch_dtype: type of the branch; absent: there was none, or its gradient is not wanted.
        sums: where the gradients of scale, weight and bias go, `[C]` each; absent: not wanted.
        add: add them to what is there.

    Returns:
        gradients of residual (empty without a norm: then it is `g_out`) and of branch (empty without one).
    """
    none = rstd.new_empty(0)
    g = g_out
    gradients: list[Tensor | None] = [None, None, None]
    if g_y is not None:
        g, *gradients[1:] = _norm_backward(g_y, x, weight, bias, mean, rstd, rms)
        g = g if g_out is None else g_out + g
    assert g is not None
    g_branch = none
    if branch_dtype is not None:
        kept = g if keep is None else g * _keep_factor(keep, keep_rate)
        if scale is not None and sums[0] is not None:
            assert branch is not None
            gradients[0] = (kept * branch).flatten(0, -2).sum(0)
        g_branch = (kept if scale is None else kept * scale).to(branch_dtype)
        g_branch = g_branch.clone() if g_branch is g_out else g_branch
    _put(sums, gradients, add)
    return (g if g_y is not None else none), g_branch


def _norm_backward(g_y, x, weight, bias, mean, rstd, rms) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the input, the weight and the bias of a norm."""
    if not rms:
        same = x.to(weight.dtype)
        found = torch.ops.aten.native_layer_norm_backward(
            g_y, same, list(weight.shape), mean, rstd, weight, bias, [True, True, True]
        )
        return found[0].to(x.dtype), found[1], found[2]
    normed = _wide(x) * rstd
    g_weight = (g_y * normed.to(g_y.dtype)).flatten(0, -2).sum(0)
    g_normed = _wide(g_y * weight)
    g_x = (g_normed - normed * (g_normed * normed).mean(-1, keepdim=True)) * rstd
    return g_x.to(x.dtype), g_weight, None


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise."""
    return F.silu(gate) * up


def gated_silu_backward(g_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    return torch.ops.aten.silu_backward(g_out * up, gate), g_out * F.silu(gate)


def _attention(q: Tensor, k: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries `[N, 1, a, d]`, keys `[N, w, a, d]` and weights `[N, w, a, 1]`."""
    q_N1ad = q.unflatten(-1, (heads, -1)).unsqueeze(1)
    q_N1ad = q_N1ad * q_N1ad.shape[-1] ** -0.5
    k_Nwad = k.unflatten(-1, (heads, -1))
    # One query and a handful of keys: elementwise products beat N*a matrix products of 1 x w.
    return q_N1ad, k_Nwad, (q_N1ad * k_Nwad).sum(-1).softmax(dim=1).unsqueeze(-1)


def window_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of one query per window, `[N, a*d]`, to the window's keys and values `[N, w, a*d]`: `[N, a*d]`."""
    _, _, weights_Nwa1 = _attention(q, k, heads)
    return (weights_Nwa1 * v.unflatten(-1, (heads, -1))).sum(1).flatten(1)


def window_attention_backward(
    g_out: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    q_N1ad, k_Nwad, weights_Nwa1 = _attention(q, k, heads)
    g_N1ad = g_out.unflatten(-1, (heads, -1)).unsqueeze(1)
    g_v = weights_Nwa1 * g_N1ad
    g_weights = (v.unflatten(-1, (heads, -1)) * g_N1ad).sum(-1, keepdim=True)
    g_scores = weights_Nwa1 * (g_weights - (weights_Nwa1 * g_weights).sum(1, keepdim=True))
    g_q = (g_scores * k_Nwad).sum(1) * q_N1ad.shape[-1] ** -0.5
    return g_q.flatten(1), (g_scores * q_N1ad).flatten(2), g_v.flatten(2)


def twin_norm(x: Tensor, weight_a: Tensor, weight_b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Two RMS norms of the same rows `[..., C]`, which share all but the weight, and the inverse deviations."""
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = (wide * rstd).to(x.dtype)
    return weight_a * normed, weight_b * normed, rstd


def twin_norm_backward(
    g_a: Tensor, g_a2: Tensor, g_b: Tensor, g_b2: Tensor, x: Tensor, weight_a: Tensor, weight_b: Tensor,
    rstd: Tensor, sums: list[Tensor | None], add: bool,
) -> Tensor:  # fmt: skip
    """Gradient of `x`, where each norm was read twice; `sums` and `add` as in `add_norm_backward`."""
    normed = _wide(x) * rstd
    g_a, g_b = g_a + g_a2, g_b + g_b2
    rows: list[Tensor | None] = [(g * normed.to(g.dtype)).flatten(0, -2).sum(0) for g in (g_a, g_b)]
    _put(sums, rows, add)
    g = _wide(g_a * weight_a) + _wide(g_b * weight_b)
    return ((g - normed * (g * normed).mean(-1, keepdim=True)) * rstd).to(x.dtype)


def _in_shard(targets: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Mask of the targets in the columns from `first` to `first + width`, and their columns there, 0 elsewhere."""
    column = targets - first
    inside = (column >= 0) & (column < width)
    return inside, torch.where(inside, column, 0)


def cross_entropy(logits: Tensor, targets: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross entropy and its statistics over this rank's columns of the vocabulary.

    Args:
        logits: `[n, V]`.
        targets: `[n]`, token ids.
        first: the id of the first column.

    Returns:
        `[n]` each, at least in fp32: the losses if these are all columns, the maximum, the sum of the exponentials
        below it, and the target's logit, 0 if it lies in other columns.
    """
    wide = _wide(logits)
    maximum = wide.amax(-1)
    total = (wide - maximum[:, None]).exp_().sum(-1)
    inside, column = _in_shard(targets, first, logits.shape[-1])
    picked = torch.where(inside, wide.gather(1, column[:, None]).squeeze(1), 0)
    return total.log() - (picked - maximum), maximum, total, picked


def cross_entropy_backward(
    g_losses: Tensor, logits: Tensor, targets: Tensor, first: int, maximum: Tensor, total: Tensor
) -> None:
    """Gradient of the logits, `(softmax - one_hot) * g_losses`, written in their place.

    `maximum` and `total` are of all columns of the vocabulary.
    """
    gradient = (_wide(logits) - maximum[:, None]).exp_().div_(total[:, None])
    inside, column = _in_shard(targets, first, logits.shape[-1])
    rows = torch.arange(len(logits), device=logits.device)
    gradient[rows, column] -= inside.to(gradient.dtype)
    logits.copy_(gradient.mul_(g_losses[:, None]))
