"""The Triton kernels of one query per window, and of the gated MLP behind it; see `kernels_triton.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_FLAT = 1024
"""Elements per program of an elementwise kernel."""


@triton.jit
def _gated_silu(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_silu_backward(g_out, gate, up, g_gate, g_up, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    go = tl.load(g_out + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    tl.store(g_up + at, (go * g * sigmoid).to(g_up.dtype.element_ty), mask=inside)
    slope = sigmoid * (1 + g * (1 - sigmoid))
    tl.store(g_gate + at, (go * u * slope).to(g_gate.dtype.element_ty), mask=inside)


@triton.jit
def _window_attention(
    q, k, v, out, scale, width, heads, keys, head_dim, KEYS: tl.constexpr, DIM: tl.constexpr
):
    """One program per window and head: `[N, a*d]` and `[N, w, a*d]` with one query a window."""
    window = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, DIM)
    key = tl.arange(0, KEYS)
    real = dim < head_dim
    at = window * width + head * head_dim + dim
    at_keys = (window * keys + key)[:, None] * width + (head * head_dim + dim)[None, :]
    both = (key < keys)[:, None] & real[None, :]
    query = tl.load(q + at, mask=real, other=0.0).to(tl.float32) * scale
    scores = tl.sum(tl.load(k + at_keys, mask=both, other=0.0).to(tl.float32) * query[None, :], 1)
    scores = tl.where(key < keys, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 0))
    weights = weights / tl.sum(weights, 0)
    values = tl.load(v + at_keys, mask=both, other=0.0).to(tl.float32)
    tl.store(out + at, tl.sum(weights[:, None] * values, 0).to(out.dtype.element_ty), mask=real)


@triton.jit
def _window_attention_backward(
    g_out, q, k, v, g_q, g_k, g_v, scale, width, heads, keys, head_dim, KEYS: tl.constexpr, DIM: tl.constexpr
):
    window = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, DIM)
    key = tl.arange(0, KEYS)
    real = dim < head_dim
    at = window * width + head * head_dim + dim
    at_keys = (window * keys + key)[:, None] * width + (head * head_dim + dim)[None, :]
    both = (key < keys)[:, None] & real[None, :]
    query = tl.load(q + at, mask=real, other=0.0).to(tl.float32) * scale
    key_rows = tl.load(k + at_keys, mask=both, other=0.0).to(tl.float32)
    scores = tl.where(key < keys, tl.sum(key_rows * query[None, :], 1), float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 0))
    weights = weights / tl.sum(weights, 0)
    go = tl.load(g_out + at, mask=real, other=0.0).to(tl.float32)
    values = tl.load(v + at_keys, mask=both, other=0.0).to(tl.float32)
    tl.store(g_v + at_keys, (weights[:, None] * go[None, :]).to(g_v.dtype.element_ty), mask=both)
    g_weights = tl.sum(values * go[None, :], 1)
    g_scores = weights * (g_weights - tl.sum(weights * g_weights, 0))
    tl.store(g_k + at_keys, (g_scores[:, None] * query[None, :]).to(g_k.dtype.element_ty), mask=both)
    g_query = tl.sum(g_scores[:, None] * key_rows, 0) * scale
    tl.store(g_q + at, g_query.to(g_q.dtype.element_ty), mask=real)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """See `kernels_torch.gated_silu`."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if out.numel():
        _gated_silu[(triton.cdiv(out.numel(), _FLAT),)](gate, up, out, out.numel(), BLOCK=_FLAT)
    return out


def gated_silu_backward(g_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels_torch.gated_silu_backward`."""
    g_out, gate, up = g_out.contiguous(), gate.contiguous(), up.contiguous()
    g_gate, g_up, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    if count:
        _gated_silu_backward[(triton.cdiv(count, _FLAT),)](g_out, gate, up, g_gate, g_up, count, BLOCK=_FLAT)
    return g_gate, g_up


def _attention_sizes(q: Tensor, k: Tensor, heads: int) -> tuple[tuple, dict[str, int]]:
    windows, width = q.shape
    keys, head_dim = k.shape[1], width // heads
    sizes = {"KEYS": triton.next_power_of_2(keys), "DIM": triton.next_power_of_2(head_dim)}
    warps = 1 if sizes["KEYS"] * sizes["DIM"] <= 1024 else 4
    return (windows, (width, heads, keys, head_dim)), sizes | {"num_warps": warps}


def window_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """See `kernels_torch.window_attention`."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    (windows, numbers), sizes = _attention_sizes(q, k, heads)
    out = torch.empty_like(q)
    if windows:
        _window_attention[(windows, heads)](q, k, v, out, numbers[-1] ** -0.5, *numbers, **sizes)
    return out


def window_attention_backward(
    g_out: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels_torch.window_attention_backward`."""
    g_out, q, k, v = g_out.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    (windows, numbers), sizes = _attention_sizes(q, k, heads)
    g_q, g_k, g_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if windows:
        _window_attention_backward[(windows, heads)](
            g_out, q, k, v, g_q, g_k, g_v, numbers[-1] ** -0.5, *numbers, **sizes
        )
    return g_q, g_k, g_v
