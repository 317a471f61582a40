"""Core attention of the local (CPU) spec: several samples in one pack, each attending only to itself.

Megatron's own local core attention refuses packed sequences and writes the whole score matrix; this one runs
PyTorch's fused attention once per sample. On GPU the Transformer Engine spec does the same with cu_seqlens.

Shapes: S tokens of the pack, B batch, N local query heads, G local key/value heads, D width of a head.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_internvlx.platform.packed_attention import graph_safe_kernels

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
_UNMASKED = (AttnMaskType.no_mask,)


class PackedDotProductAttention(MegatronModule):
    """Scaled dot-product attention, causal or unmasked, isolated between the segments of a pack.

    It takes the constructor arguments of Megatron's `DotProductAttention` and replaces it in a layer spec.
    It has no parameters and works under selective recompute.

    Args:
        config: Megatron's transformer settings.
        layer_number: 1-based number of the layer; unused.
        attn_mask_type: causal or no_mask (padding_causal counts as causal).
        attention_type: "self"; unused.
        attention_dropout: probability; unset: the config's.
        softmax_scale: factor of the scores; unset: D ** -0.5.
        cp_comm_type: unused.
        pg_collection: process groups; unused, the heads of the inputs are the local ones.

    Raises:
        ValueError: for context parallelism, sliding windows, softmax offsets or another mask type.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if (
            config.context_parallel_size > 1
            or config.window_size is not None
            or config.softmax_type != "vanilla"
        ):
            raise ValueError(
                "context parallelism, sliding windows and softmax offsets need "
                "--transformer-impl transformer_engine"
            )
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        _is_causal(attn_mask_type)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within each segment.

        Args:
            query: `[S, B, N, D]`, or `[S, N, D]` as Megatron passes the "thd" format.
            key: `[S, B, G, D]` or `[S, G, D]`; G divides N.
            value: like `key`.
            attention_mask: must be None; masks are `attn_mask_type` and the segments.
            attn_mask_type: overrides the constructor's.
            attention_bias: must be None.
            packed_seq_params: its attribute `segment_lengths`, a tuple of ints on the host, gives the
                samples' lengths in order; zeros are skipped. Or its attribute `allowed`, `[S, S]` of booleans,
                tells which token attends to which, causality included: one operation for any samples.
                None: all S tokens are one sample.

        Returns:
            `[S, B, N*D]`, or `[S, N*D]` for three-dimensional inputs.

        Raises:
            ValueError: if the lengths do not add up to S, or a pack comes without them.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("PackedDotProductAttention takes segment lengths, not a mask or a bias")
        causal = _is_causal(attn_mask_type or self.attn_mask_type)
        if query.dim() == 3:
            return self._attend(query[:, None], key[:, None], value[:, None], causal, packed_seq_params)[:, 0]
        return self._attend(query, key, value, causal, packed_seq_params)

    def _attend(
        self, q_SBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, causal: bool, packed: PackedSeqParams | None
    ) -> Tensor:
        size, batch, heads, width = q_SBND.shape
        if (
            q_SBND.numel() == 0
        ):  # no tiles or no tokens: keeps the graph, so that gradients are zeros, not None
            return (q_SBND + 0 * (k_SBGD.sum() + v_SBGD.sum())).reshape(size, batch, heads * width)
        allowed = getattr(packed, "allowed", None)
        lengths = [size] if allowed is not None else _segment_lengths(packed, size)
        q_BNSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_SBGD, v_SBGD))
        dropout = self.dropout if self.training else 0.0
        outputs = []
        with self._dropout_rng(dropout):
            for q, k, v in zip(*(x.split(lengths, dim=2) for x in (q_BNSD, k_BGSD, v_BGSD)), strict=True):
                outputs.append(
                    F.scaled_dot_product_attention(
                        q,
                        k,
                        v,
                        attn_mask=allowed,
                        dropout_p=dropout,
                        is_causal=causal and allowed is None,
                        scale=self.softmax_scale,
                        enable_gqa=heads != k.size(1),
                    )
                )
        o_SBND = [x.permute(2, 0, 1, 3) for x in outputs]
        return (o_SBND[0] if len(o_SBND) == 1 else torch.cat(o_SBND)).reshape(size, batch, heads * width)

    def _dropout_rng(self, dropout: float) -> AbstractContextManager:
        """Generator of the dropout: that of this TP rank, because heads of different ranks drop differently."""
        if dropout == 0.0 or self.config.sequence_parallel:
            return nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()


class GraphSafeAttention(PackedDotProductAttention):
    """The same, by kernels of torch that a CUDA graph can replay; for the vision encoder, which has no mask or pack."""

    def _attend(
        self, q_SBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, causal: bool, packed: PackedSeqParams | None
    ) -> Tensor:
        with graph_safe_kernels(q_SBND.device):
            return super()._attend(q_SBND, k_SBGD, v_SBGD, causal, packed)


def causal_within_segments(position_ids: Tensor) -> Tensor:
    """Whether a row attends to another, `[S, S]`: one of its own segment that is not after it.

    Args:
        position_ids: `[S]` position inside the segment, 0 where one begins.
    """
    segment = (position_ids == 0).cumsum(0)
    row = torch.arange(len(position_ids), device=position_ids.device)
    return (segment[:, None] == segment) & (row[:, None] >= row)


def _is_causal(mask_type: AttnMaskType) -> bool:
    if mask_type not in (*_CAUSAL, *_UNMASKED):
        raise ValueError(f"PackedDotProductAttention has no {mask_type} mask: use causal or no_mask")
    return mask_type in _CAUSAL


def _segment_lengths(packed: PackedSeqParams | None, size: int) -> list[int]:
    """Lengths of the non-empty segments.

    Raises:
        ValueError: if they are absent or do not add up to `size`.
    """
    if packed is None:
        return [size]
    lengths: Sequence[int] | None = getattr(packed, "segment_lengths", None)
    if lengths is None:
        raise ValueError(
            "packed_seq_params has no segment_lengths: set it to the samples' lengths (host ints), because "
            "reading cu_seqlens here would stall the device"
        )
    if sum(lengths) != size:
        raise ValueError(f"segment lengths add up to {sum(lengths)} tokens but the pack has {size}")
    return [n for n in lengths if n]
