"""Self-attention on the packed output of one query-key-value projection, without cutting or joining copies.

Shapes: S tokens, T tiles, N heads, D width of a head.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_internvlx.platform.kernels import split_packed

_TE_MODULE = "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention"


def attend_packed(core: nn.Module, qkv_STN3D: Tensor) -> Tensor:
    """Unmasked attention by Megatron's core attention module, local or Transformer Engine's.

    Args:
        core: the module; it has no parameters.
        qkv_STN3D: `[S, T, N, 3, D]`, last dimension contiguous.

    Returns:
        `[S, T, N*D]`.
    """
    attention = _te_attention(core)
    if attention is None:
        return core(*split_packed(qkv_STN3D, -2), None)
    # Megatron's wrapper takes queries, keys and values apart, whose layout Transformer Engine then finds out by
    # pointers, which is deprecated.
    return attention.forward(core, qkv_layer=qkv_STN3D, qkv_interleave_dim=-2, attn_mask_type="no_mask")


def graph_safe_kernels(device: torch.device) -> AbstractContextManager:
    """On CUDA, torch's fused attention runs by its flash or its memory-efficient kernel, never by cuDNN's.

    cuDNN's attention is known to fail inside a CUDA graph for more than 1,024 keys without a mask in some versions.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])


def _te_attention(core: nn.Module) -> Any:
    """Transformer Engine's attention class if `core` is one; None otherwise."""
    if not any(cls.__module__ == _TE_MODULE for cls in type(core).__mro__):
        return None
    module = importlib.import_module(_TE_MODULE)
    _join_packed_gradients(module)
    return module.DotProductAttention


def _join_packed_gradients(module: Any) -> None:
    """The gradients of a packed buffer's slices become that of the buffer without a copy.

    Transformer Engine takes the slices with `select`, whose three gradients autograd fills up with zeros to the
    buffer's size and adds, though its attention has written them as the slices of one buffer. Seen on 2.20.2.
    """
    cut = module._unpack_packed_qkv
    if getattr(cut, "joins", False):
        return

    def unpack(qkv_layer, kv_layer, query, key, value, qkv_format, interleave_dim, inference_params):
        found = cut(qkv_layer, kv_layer, query, key, value, qkv_format, interleave_dim, inference_params)
        if qkv_layer is None:
            return found
        return *split_packed(qkv_layer, interleave_dim), found[-1]

    unpack.joins = True  # type: ignore[attr-defined]
    module._unpack_packed_qkv = unpack
