"""The Triton kernels of the cross entropy over this rank's columns of the vocabulary; see `kernels_triton.py`.

Letters: n rows, V columns of this rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _cross_entropy(
    logits, targets, losses, maximum, total, picked, width, first, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per row, which is read once: the sum of exponentials is rescaled when a block has a new maximum."""
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * width
    column = tl.arange(0, BLOCK)
    highest = float("-inf")
    exponentials = 0.0
    for start in range(0, width, BLOCK):
        inside = start + column < width
        x = tl.load(start_of_row + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        now = tl.maximum(highest, tl.max(x, 0))
        exponentials = exponentials * tl.exp(highest - now) + tl.sum(tl.exp(x - now), 0)
        highest = now
    target = tl.load(targets + row) - first
    ours = (target >= 0) & (target < width)
    logit = tl.load(start_of_row + target, mask=ours, other=0.0).to(tl.float32)
    tl.store(losses + row, tl.log(exponentials) - (logit - highest))
    tl.store(maximum + row, highest)
    tl.store(total + row, exponentials)
    tl.store(picked + row, logit)


@triton.jit
def _cross_entropy_backward(
    g_losses, logits, targets, maximum, total, width, first, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per row and block of columns, which it replaces by their gradient."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = logits + row * width + column
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    softmax = tl.exp(x - tl.load(maximum + row)) / tl.load(total + row)
    target = tl.load(targets + row) - first
    gradient = tl.where(column == target, softmax - 1, softmax) * tl.load(g_losses + row)
    tl.store(at, gradient.to(logits.dtype.element_ty), mask=inside)


def _block(width: int, most: int) -> dict[str, int]:
    size = min(triton.next_power_of_2(width), most)
    return {"BLOCK": size, "num_warps": 16 if size >= 8192 else 8 if size >= 4096 else 4}


def cross_entropy(logits: Tensor, targets: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels_torch.cross_entropy`."""
    rows, width = logits.shape
    targets = targets.contiguous()
    losses, maximum, total, picked = (logits.new_empty(rows, dtype=torch.float32) for _ in range(4))
    if rows:
        _cross_entropy[(rows,)](
            logits, targets, losses, maximum, total, picked, width, first, **_block(width, 8192)
        )
    return losses, maximum, total, picked


def cross_entropy_backward(
    g_losses: Tensor, logits: Tensor, targets: Tensor, first: int, maximum: Tensor, total: Tensor
) -> None:
    """See `kernels_torch.cross_entropy_backward`."""
    rows, width = logits.shape
    g_losses, targets = g_losses.contiguous(), targets.contiguous()
    if rows:
        sizes = _block(width, 4096)
        grid = (rows, triton.cdiv(width, sizes["BLOCK"]))
        _cross_entropy_backward[grid](g_losses, logits, targets, maximum, total, width, first, **sizes)
