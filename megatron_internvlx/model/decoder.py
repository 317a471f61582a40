"""Decoder layer that runs on the rows of its phase, with LVTC's injections at its entry."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_internvlx.model.lvtc import LVTCInjection
from megatron_internvlx.model.pvtc import build_projector
from megatron_internvlx.model.sizes import ModelSizes
from megatron_internvlx.parallel.device_plan import DevicePlan


class PhaseAttention(PackedSeqParams):
    """Megatron's packed-sequence parameters, and those of attention without kernels for packs."""

    segment_lengths: tuple[int, ...] | None = None
    """Rows of each segment, on the host; None in static mode, in which the host must not depend on samples."""
    allowed: Tensor | None = None
    """[S, S] whether a row (first index) may attend to another, in static mode."""


@dataclass
class PhaseInputs:
    """Inputs of a layer that depend on its phase."""

    rotary: Tensor | None
    attention: PhaseAttention
    padding_mask: Tensor | None = None


@dataclass
class DecoderInputs:
    """Inputs of every layer of a stage besides its rows, passed as TransformerBlock's `packed_seq_params`.

    ViT features with a gradient are passed as the block's `context`, a tensor argument of every layer, so that
    Megatron's recomputation handles them. Features of a frozen encoder are here instead: as an argument they would
    get a gradient of zeros from every recomputed layer.
    """

    plan: DevicePlan
    shallow: PhaseInputs
    deep: PhaseInputs
    frozen_features: Tensor | None = None
    loss_weight: Tensor | None = None
    """Total loss weight of the micro-batch, fp32 scalar; see `router.py`. None without experts."""


class InternVLXLayer(TransformerLayer):
    """Megatron's transformer layer on the rows of its phase.

    A layer named in `sizes.injection_layers` first expands the visual rows (the first of
    them) or adds a projection of the ViT features to them (the others).
    `gradient_accumulation_fusion` may be on here and off in `config`; see `language_model_config`.
    """

    def __init__(
        self,
        config,
        submodules,
        *,
        sizes: ModelSizes,
        gradient_accumulation_fusion: bool,
        projector_fp8: bool = False,
        **kwargs: Any,
    ) -> None:
        config = copy.copy(config)
        config.gradient_accumulation_fusion = gradient_accumulation_fusion
        super().__init__(config, submodules, **kwargs)
        kept = getattr(self.self_attention.core_attention, "kept_packed_seq_params", None)
        if kept is not None:  # Transformer Engine's, for which these would mean gaps between segments
            kept -= {"cu_seqlens_q_padded", "cu_seqlens_kv_padded"}
        index = self.layer_number - 1
        self.is_deep = index >= sizes.shallow_layers
        self.injection = None
        if index in sizes.injection_layers:
            self.injection = LVTCInjection(
                config,
                build_projector(config, sizes, sizes.high_grid, self.pg_collection, fp8=projector_fp8),
                expand=index == sizes.shallow_layers,
                low_grid=sizes.low_grid,
                high_grid=sizes.high_grid,
                upsample=sizes.upsample,
                group=self.tp_group,
            )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        packed_seq_params: DecoderInputs | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer: rows [S, 1, h] and ViT features [T, L, c] -> rows of this layer's phase, same features."""
        assert packed_seq_params is not None
        if self.injection is not None:
            features = packed_seq_params.frozen_features if context is None else context
            hidden_states = self.injection(hidden_states, features, packed_seq_params.plan)
        phase = packed_seq_params.deep if self.is_deep else packed_seq_params.shallow
        if self.is_moe_layer:
            self.mlp.router.loss_weight = packed_seq_params.loss_weight
        kwargs |= {"rotary_pos_emb": phase.rotary, "padding_mask": phase.padding_mask}
        hidden_states, _ = super().forward(
            hidden_states=hidden_states, packed_seq_params=phase.attention, **kwargs
        )
        return hidden_states, context
