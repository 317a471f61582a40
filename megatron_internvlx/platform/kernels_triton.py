"""The kernels of `kernels.py` for CUDA, in Triton. Sums and statistics are in fp32 whatever the tensors are.

Imported at the first call with CUDA tensors. `TRITON_INTERPRET=1` runs them on CPU tensors, which the tests do.
A row is one token's channels; each backward kernel runs over rows with a fixed number of programs, whose sums
of a parameter's gradient are joined by `_join`, always in the same order.
"""

# An `if` around another is decided when the kernel is compiled, where a pointer may be absent.
# ruff: noqa: SIM102, SIM108

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_internvlx.platform.kernels_triton_loss import cross_entropy, cross_entropy_backward
from megatron_internvlx.platform.kernels_triton_windows import (
    gated_silu,
    gated_silu_backward,
    window_attention,
    window_attention_backward,
)

__all__ = [
    "add_norm",
    "add_norm_backward",
    "cross_entropy",
    "cross_entropy_backward",
    "gated_silu",
    "gated_silu_backward",
    "twin_norm",
    "twin_norm_backward",
    "window_attention",
    "window_attention_backward",
]

_ROW_PROGRAMS = 528
"""Most programs of a kernel that sums over rows: four for each multiprocessor of an H100."""


@triton.jit
def _add_norm(
    residual, branch, scale, keep, weight, bias, out, y, mean, rstd, width, tiles, eps, inverse_keep,
    BRANCH: tl.constexpr, SCALE: tl.constexpr, KEEP: tl.constexpr, NORM: tl.constexpr, RMS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < width
    at = row * width + channel
    x = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        added = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        if SCALE:
            added = added * tl.load(scale + channel, mask=inside, other=0.0).to(tl.float32)
        if KEEP:
            added = added * (tl.load(keep + row % tiles).to(tl.float32) * inverse_keep)
        stored = (x + added).to(out.dtype.element_ty)
        tl.store(out + at, stored, mask=inside)
        x = stored.to(tl.float32)  # the backward pass normalizes what was stored
    if NORM:
        w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        if RMS:
            r = 1 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
            normed = (x * r).to(y.dtype.element_ty).to(tl.float32) * w
        else:
            center = tl.sum(x, 0) / width
            x = tl.where(inside, x - center, 0.0)
            r = 1 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
            normed = x * r * w + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
            tl.store(mean + row, center)
        tl.store(rstd + row, r)
        tl.store(y + at, normed.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm_backward(
    g_y, g_out, x, branch, scale, keep, weight, mean, rstd, g_residual, g_branch, partial,
    rows, width, tiles, inverse_keep,
    BRANCH: tl.constexpr, SCALE: tl.constexpr, SCALE_WANTED: tl.constexpr, KEEP: tl.constexpr,
    NORM: tl.constexpr, RMS: tl.constexpr, PASSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    channel = tl.arange(0, BLOCK)
    inside = channel < width
    sum_scale = tl.zeros([BLOCK], tl.float32)
    sum_weight = tl.zeros([BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK], tl.float32)
    if NORM:
        w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    if SCALE:
        s = tl.load(scale + channel, mask=inside, other=0.0).to(tl.float32)
    for row in range(first, rows, programs):
        at = row * width + channel
        if PASSED:
            g = tl.load(g_out + at, mask=inside, other=0.0).to(tl.float32)
        else:
            g = tl.zeros([BLOCK], tl.float32)
        if NORM:
            gy = tl.load(g_y + at, mask=inside, other=0.0).to(tl.float32)
            normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            r = tl.load(rstd + row)
            if RMS:
                normed = normed * r
                sum_weight += gy * normed
                gx = gy * w
                inner = gx - normed * (tl.sum(gx * normed, 0) / width)
            else:
                normed = tl.where(inside, (normed - tl.load(mean + row)) * r, 0.0)
                sum_weight += gy * normed
                sum_bias += gy
                gx = gy * w
                inner = gx - tl.sum(gx, 0) / width - normed * (tl.sum(gx * normed, 0) / width)
            g = (g + inner * r).to(g_residual.dtype.element_ty)
            tl.store(g_residual + at, g, mask=inside)
            g = g.to(tl.float32)
        if BRANCH:
            if KEEP:
                g = g * (tl.load(keep + row % tiles).to(tl.float32) * inverse_keep)
            if SCALE_WANTED:  # a frozen scale's branch is not kept
                sum_scale += g * tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
            if SCALE:
                g = g * s
            tl.store(g_branch + at, g.to(g_branch.dtype.element_ty), mask=inside)
    at = first * 3 * width + channel
    if SCALE_WANTED:
        tl.store(partial + at, sum_scale, mask=inside)
    if NORM:
        tl.store(partial + at + width, sum_weight, mask=inside)
        if not RMS:
            tl.store(partial + at + 2 * width, sum_bias, mask=inside)


@triton.jit
def _join(
    partial, first_out, second_out, third_out, programs, width,
    FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums `[programs, 3, width]` over the programs into three vectors, or onto what they hold."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1)
    inside = channel < width
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, programs, ROWS):
        program = start + tl.arange(0, ROWS)
        at = (program * 3 + which)[:, None] * width + channel[None, :]
        total += tl.sum(
            tl.load(partial + at, mask=(program < programs)[:, None] & inside[None, :], other=0.0), 0
        )
    if FIRST:
        if which == 0:
            if ADD:
                total += tl.load(first_out + channel, mask=inside, other=0.0).to(tl.float32)
            tl.store(first_out + channel, total.to(first_out.dtype.element_ty), mask=inside)
    if SECOND:
        if which == 1:
            if ADD:
                total += tl.load(second_out + channel, mask=inside, other=0.0).to(tl.float32)
            tl.store(second_out + channel, total.to(second_out.dtype.element_ty), mask=inside)
    if THIRD:
        if which == 2:
            if ADD:
                total += tl.load(third_out + channel, mask=inside, other=0.0).to(tl.float32)
            tl.store(third_out + channel, total.to(third_out.dtype.element_ty), mask=inside)


@triton.jit
def _twin_norm(x, weight_a, weight_b, y_a, y_b, rstd, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < width
    at = row * width + channel
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(rstd + row, r)
    normed = (value * r).to(y_a.dtype.element_ty).to(tl.float32)
    w = tl.load(weight_a + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_a + at, (normed * w).to(y_a.dtype.element_ty), mask=inside)
    w = tl.load(weight_b + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_b + at, (normed * w).to(y_b.dtype.element_ty), mask=inside)


@triton.jit
def _twin_norm_backward(
    g_a, g_a2, g_b, g_b2, x, weight_a, weight_b, rstd, g_x, partial, rows, width, BLOCK: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < width
    sum_a = tl.zeros([BLOCK], tl.float32)
    sum_b = tl.zeros([BLOCK], tl.float32)
    w_a = tl.load(weight_a + channel, mask=inside, other=0.0).to(tl.float32)
    w_b = tl.load(weight_b + channel, mask=inside, other=0.0).to(tl.float32)
    for row in range(first, rows, tl.num_programs(0)):
        at = row * width + channel
        r = tl.load(rstd + row)
        normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * r
        ga = tl.load(g_a + at, mask=inside, other=0.0).to(tl.float32)
        ga += tl.load(g_a2 + at, mask=inside, other=0.0).to(tl.float32)
        gb = tl.load(g_b + at, mask=inside, other=0.0).to(tl.float32)
        gb += tl.load(g_b2 + at, mask=inside, other=0.0).to(tl.float32)
        sum_a += ga * normed
        sum_b += gb * normed
        gx = ga * w_a + gb * w_b
        gx = (gx - normed * (tl.sum(gx * normed, 0) / width)) * r
        tl.store(g_x + at, gx.to(g_x.dtype.element_ty), mask=inside)
    at = first * 3 * width + channel
    tl.store(partial + at, sum_a, mask=inside)
    tl.store(partial + at + width, sum_b, mask=inside)


def _block(width: int) -> dict[str, int]:
    """A power of two that covers a row, and its warps."""
    size = triton.next_power_of_2(width)
    return {"BLOCK": size, "num_warps": 4 if size <= 2048 else 8 if size <= 4096 else 16}


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _row_programs(rows: int, width: int) -> int:
    """Fewer for wide rows, which keep a multiprocessor busy; one for no rows, which writes sums of 0."""
    return max(1, min(rows, _ROW_PROGRAMS if width <= 2048 else _ROW_PROGRAMS // 2))


def add_norm(
    residual: Tensor, branch: Tensor | None, scale: Tensor | None, keep: Tensor | None, keep_rate: float,
    weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `kernels_torch.add_norm`."""
    residual = residual.contiguous()
    branch = None if branch is None else branch.contiguous()
    rows, none = _rows(residual), residual.new_empty(0)
    statistics = residual.new_empty(rows, dtype=torch.float32) if weight is not None else none
    out = none if branch is None else torch.empty_like(residual)
    y = none if weight is None else torch.empty_like(residual, dtype=weight.dtype)
    mean = torch.empty_like(statistics) if weight is not None and not rms else none
    if rows:
        _add_norm[(rows,)](
            residual, branch, scale, keep, weight, bias, out, y, mean, statistics, residual.shape[-1],
            1 if keep is None else keep.numel(), eps, 1 / keep_rate,
            BRANCH=branch is not None, SCALE=scale is not None, KEEP=keep is not None,
            NORM=weight is not None, RMS=rms, **_block(residual.shape[-1]),
        )  # fmt: skip
    return out, y, mean, statistics


def add_norm_backward(
    g_y: Tensor | None, g_out: Tensor | None, x: Tensor, branch: Tensor | None, scale: Tensor | None,
    keep: Tensor | None, keep_rate: float, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    rstd: Tensor, rms: bool, branch_dtype: torch.dtype | None, sums: list[Tensor | None], add: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `kernels_torch.add_norm_backward`."""
    norm = g_y is not None
    g_y = None if g_y is None else g_y.contiguous()
    g_out = None if g_out is None else g_out.contiguous()
    branch = None if branch is None else branch.contiguous()
    like = g_y if g_out is None else g_out
    assert like is not None
    rows, width = _rows(like), like.shape[-1]
    g_residual = torch.empty_like(x) if norm else like.new_empty(0)
    g_branch = like.new_empty(0) if branch_dtype is None else torch.empty_like(like, dtype=branch_dtype)
    programs = _row_programs(rows, width)
    summed = any(s is not None for s in sums)
    # The kernel writes its sums whether or not anybody wants them.
    partial = like.new_empty((programs, 3, width), dtype=torch.float32)
    _add_norm_backward[(programs,)](
        g_y, g_out, x, branch, scale, keep, weight, mean, rstd, g_residual, g_branch, partial,
        rows, width, 1 if keep is None else keep.numel(), 1 / keep_rate,
        BRANCH=branch_dtype is not None, SCALE=scale is not None, SCALE_WANTED=sums[0] is not None,
        KEEP=keep is not None, NORM=norm, RMS=rms, PASSED=g_out is not None, **_block(width),
    )  # fmt: skip
    if summed:
        _sum_programs(partial, sums, add)
    return g_residual, g_branch


def _sum_programs(partial: Tensor, sums: list[Tensor | None], add: bool) -> None:
    first, second, third = sums
    programs, _, width = partial.shape
    _join[(triton.cdiv(width, 64), 3)](
        partial, first, second, third, programs, width,
        FIRST=first is not None, SECOND=second is not None, THIRD=third is not None, ADD=add,
        ROWS=64, BLOCK=64, num_warps=4,
    )  # fmt: skip


def twin_norm(x: Tensor, weight_a: Tensor, weight_b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels_torch.twin_norm`."""
    x = x.contiguous()
    y_a, y_b = torch.empty_like(x), torch.empty_like(x)
    rstd = x.new_empty(_rows(x), dtype=torch.float32)
    if len(rstd):
        _twin_norm[(len(rstd),)](
            x, weight_a, weight_b, y_a, y_b, rstd, x.shape[-1], eps, **_block(x.shape[-1])
        )
    return y_a, y_b, rstd


def twin_norm_backward(
    g_a: Tensor, g_a2: Tensor, g_b: Tensor, g_b2: Tensor, x: Tensor, weight_a: Tensor, weight_b: Tensor,
    rstd: Tensor, sums: list[Tensor | None], add: bool,
) -> Tensor:  # fmt: skip
    """See `kernels_torch.twin_norm_backward`."""
    g_a, g_a2, g_b, g_b2 = (g.contiguous() for g in (g_a, g_a2, g_b, g_b2))
    g_x, rows, width = torch.empty_like(x), len(rstd), x.shape[-1]
    programs = _row_programs(rows, width)
    partial = x.new_empty((programs, 3, width), dtype=torch.float32)
    _twin_norm_backward[(programs,)](
        g_a, g_a2, g_b, g_b2, x, weight_a, weight_b, rstd, g_x, partial, rows, width, **_block(width)
    )
    _sum_programs(partial, [*sums, None], add)
    return g_x
