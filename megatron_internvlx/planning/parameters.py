"""The sizes that decide what a model costs, and its parameter counts per part."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_internvlx.model.internvit_config import InternViTConfig

if TYPE_CHECKING:  # it imports Megatron, which counting does not need
    from megatron_internvlx.model.decoder import CompressionPlan

PVTC_MLP_RATIO = 4  # inner width of PVTC's gated MLP over h; model/pvtc.py


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a whole model, whatever the layout."""

    layers: int
    """Decoder layers."""
    hidden: int
    """h, width of the decoder, in channels."""
    heads: int
    """Query heads of a decoder layer."""
    kv_groups: int
    """Key and value heads of a decoder layer."""
    head_dim: int
    """Width of a head, in channels."""
    ffn: int
    """Inner width of a dense layer's MLP, in channels."""
    vocab: int
    """Rows of the embedding and of the output layer, padding of the layout included."""
    vision: InternViTConfig
    compression: CompressionPlan
    gated: bool = True
    """Whether MLPs and experts are gated (three matrices instead of two)."""
    experts: int = 0
    """Experts of a mixture-of-experts layer. 0: no such layers."""
    topk: int = 0
    """Experts that each row visits."""
    expert_ffn: int = 0
    """Inner width of an expert, in channels."""
    shared_ffn: int = 0
    """Inner width of the shared expert, in channels. 0: none."""
    expert_layers: frozenset[int] = field(default_factory=frozenset)
    """0-based layers with experts instead of a dense MLP."""
    norm_tensors: int = 1
    """Parameter vectors of a decoder norm: RMSNorm 1, LayerNorm 2."""
    linear_bias: bool = False
    """Bias of the decoder's linear layers."""
    qkv_bias: bool = False
    """Bias of the query-key-value projection alone."""
    qk_norm: bool = False
    """Norms of queries and keys, one weight vector of `head_dim` each."""
    tied_embeddings: bool = False
    """The output layer uses the embedding's weight."""

    @classmethod
    def from_args(
        cls, args: argparse.Namespace, vision: InternViTConfig, compression: CompressionPlan
    ) -> ModelShape:
        """The model that Megatron's parsed and validated arguments describe.

        `vision` and `compression` come from `vision_config` and `settings.compression_plan`.
        """
        heads = args.num_attention_heads
        experts = args.num_experts or 0
        return cls(
            layers=args.num_layers,
            hidden=args.hidden_size,
            heads=heads,
            kv_groups=args.num_query_groups if args.group_query_attention else heads,
            head_dim=args.kv_channels or args.hidden_size // heads,
            ffn=args.ffn_hidden_size,
            vocab=args.padded_vocab_size or args.vocab_size,
            vision=vision,
            compression=compression,
            gated=args.swiglu,
            experts=experts,
            topk=args.moe_router_topk if experts else 0,
            expert_ffn=(args.moe_ffn_hidden_size or args.ffn_hidden_size) if experts else 0,
            shared_ffn=(args.moe_shared_expert_intermediate_size or 0) if experts else 0,
            expert_layers=_expert_layers(args.num_layers, args.moe_layer_freq) if experts else frozenset(),
            norm_tensors=1 if args.normalization == "RMSNorm" else 2,
            linear_bias=args.add_bias_linear,
            qkv_bias=args.add_bias_linear or args.add_qkv_bias,
            qk_norm=args.qk_layernorm,
            tied_embeddings=not args.untie_embeddings_and_output_weights,
        )

    @property
    def shallow_layers(self) -> int:
        """Layers before the expansion; 0 with LVTC off."""
        return self.compression.injection_layers[0] if self.compression.lvtc else 0

    @property
    def matrices(self) -> int:
        """Weight matrices of an MLP or an expert."""
        return 3 if self.gated else 2


def _expert_layers(layers: int, frequency: int | list[int]) -> frozenset[int]:
    """Megatron's --moe-layer-freq: one layer of experts in every N, or a 0/1 pattern."""
    if isinstance(frequency, int):
        return frozenset(range(0, layers, frequency))
    return frozenset(layer for layer, experts in enumerate(frequency) if experts)


def parameters(shape: ModelShape) -> dict[str, int]:
    """Parameter counts of the whole model; the sum of the values is the model's.

    Keys: vision, entry_projector, injection_K per injection layer, embedding, shallow and deep
    (decoder layers before and from the expansion on, injections not included), final_norm and
    output (0 if tied).
    """
    plan, embedding = shape.compression, shape.vocab * shape.hidden
    layers = [layer_parameters(shape, layer) for layer in range(shape.layers)]
    return {
        "vision": vision_parameters(shape.vision),
        "entry_projector": projector_parameters(shape, plan.entry_grid),
        **{f"injection_{k}": projector_parameters(shape, plan.high_grid) for k in plan.injection_layers},
        "embedding": embedding,
        "shallow": sum(layers[: shape.shallow_layers]),
        "deep": sum(layers[shape.shallow_layers :]),
        "final_norm": shape.norm_tensors * shape.hidden,
        "output": 0 if shape.tied_embeddings else embedding,
    }


def vision_parameters(vit: InternViTConfig) -> int:
    """Parameters of InternViT; layers above the selected one count, they are in the checkpoint."""
    c, f = vit.hidden_size, vit.ffn_hidden_size
    norms = 2 * c * (2 if vit.norm_type == "layer_norm" else 1) + (2 * c if vit.qk_normalization else 0)
    attention = 4 * c * c + c + (3 * c if vit.qkv_bias else 0)
    layer = norms + attention + 2 * c * f + f + c + 2 * c  # the last 2c: layer scale
    patch = vit.num_channels * vit.patch_size**2 * c + c
    return vit.num_layers * layer + patch + c + vit.tokens_per_tile * c


def projector_parameters(shape: ModelShape, grid: int) -> int:
    """Parameters of one projector to `grid` x `grid` tokens per tile."""
    h, c = shape.hidden, shape.vision.hidden_size
    shuffled = (shape.compression.patches // grid) ** 2 * c
    if shape.compression.projector == "mlp":
        return 2 * shuffled + shuffled * h + h + h * h + h
    projections = shuffled + shuffled * h + 2 * (c + c * h)
    attention = 4 * h * h + 3 * PVTC_MLP_RATIO * h * h + 3 * h
    return projections + 2 * attention + grid * grid * h  # the last: cls_scale


def layer_parameters(shape: ModelShape, layer: int) -> int:
    """Parameters of one decoder layer (0-based), without the projector that it may inject."""
    h = shape.hidden
    queries, keys = shape.heads * shape.head_dim, shape.kv_groups * shape.head_dim
    attention = h * (queries + 2 * keys) + queries * h
    attention += (queries + 2 * keys) * shape.qkv_bias + h * shape.linear_bias
    attention += 2 * shape.head_dim * shape.norm_tensors * shape.qk_norm
    if layer in shape.expert_layers:
        one = _mlp_parameters(shape, shape.expert_ffn)
        mlp = shape.experts * (one + h) + (
            _mlp_parameters(shape, shape.shared_ffn) if shape.shared_ffn else 0
        )
    else:
        mlp = _mlp_parameters(shape, shape.ffn)
    return attention + mlp + 2 * shape.norm_tensors * h


def _mlp_parameters(shape: ModelShape, ffn: int) -> int:
    bias = (ffn * (shape.matrices - 1) + shape.hidden) if shape.linear_bias else 0
    return shape.matrices * shape.hidden * ffn + bias
