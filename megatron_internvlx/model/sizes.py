"""Sizes of a model: one description for the model, the planner, the converter and the statistics.

Nothing here needs Megatron or torch: sizes are known before either is imported.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from megatron_internvlx.config import (
    Arguments,
    CompressionSettings,
    VisionSettings,
    as_mapping,
    check_compression,
    grid_side,
    settings_from,
)
from megatron_internvlx.lora_settings import LoraSettings
from megatron_internvlx.model.internvit_config import InternViTConfig, internvit_preset
from megatron_internvlx.recipe import similar

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


@dataclass(frozen=True)
class ModelSizes:
    """Architecture of a whole model, whatever the layout; channels unless stated otherwise."""

    layers: int
    """Decoder layers."""
    hidden: int
    """h, width of the decoder."""
    heads: int
    """Query heads of a decoder layer."""
    kv_groups: int
    """Key and value heads of a decoder layer."""
    head_dim: int
    """Width of a head."""
    ffn: int
    """Inner width of a dense layer's MLP."""
    vocab: int
    """Entries of the tokenizer: rows of the embedding, without padding."""
    padded_vocab: int
    """Rows of the embedding and of the output layer, padding of the layout included."""
    vision: InternViTConfig
    low_grid: int
    """Side of the token grid per tile before the expansion; `high_grid` with LVTC off."""
    high_grid: int
    """Side of the token grid per tile from the expansion on, or with LVTC off."""
    injection_layers: tuple[int, ...] = ()
    """0-based layers with a projector of their own, the expanding one first; () with LVTC off."""
    projector: str = "pvtc"
    """pvtc or mlp."""
    pixel_shuffle_version: str = "v2"
    """Order of patches in a shuffled block: v1 or v2."""
    projector_drop_path: float = 0.0
    """Probability that a window skips a branch of PVTC in training. 0: off."""
    upsample: str = "bilinear"
    """Expansion of shallow visual rows to deep ones: bilinear or nearest."""
    gated: bool = True
    """Whether MLPs and experts are gated (three matrices instead of two)."""
    experts: int = 0
    """Experts of a mixture-of-experts layer. 0: no such layers."""
    topk: int = 0
    """Experts that each row visits."""
    expert_ffn: int = 0
    """Inner width of an expert."""
    shared_ffn: int = 0
    """Inner width of the shared expert. 0: none."""
    expert_layers: Collection[int] = ()
    """0-based layers with experts instead of a dense MLP."""
    norm_tensors: int = 1
    """Parameter vectors of a decoder norm: RMSNorm 1, LayerNorm 2."""
    linear_bias: bool = False
    """Bias of all linear layers of the decoder."""
    qkv_bias: bool = False
    """Bias of the query-key-value projection, whatever the others have."""
    qk_norm: bool = False
    """Norms of queries and keys, one weight vector of `head_dim` each."""
    tied: bool = False
    """The output layer uses the embedding's weight."""
    lora_rank: int = 0
    """Rank of the adapters. 0: none."""
    lora_targets: frozenset[str] = frozenset()
    """Parts with adapters: decoder_attention, decoder_mlp, vision, projectors."""

    @property
    def lvtc(self) -> bool:
        """Whether the sequence grows inside the decoder."""
        return bool(self.injection_layers)

    @property
    def shallow_layers(self) -> int:
        """Layers before the expansion; 0 with LVTC off."""
        return self.injection_layers[0] if self.injection_layers else 0

    @property
    def entry_grid(self) -> int:
        """Side of the token grid of the visual rows that enter layer 0."""
        return self.low_grid if self.lvtc else self.high_grid

    @property
    def patches(self) -> int:
        """P, patches per side of a tile."""
        return self.vision.patches_per_side

    @property
    def features_per_tile(self) -> int:
        """Elements of the ViT features [1 + P*P, c] of a tile."""
        return self.vision.tokens_per_tile * self.vision.hidden_size

    @property
    def matrices(self) -> int:
        """Weight matrices of an MLP or an expert."""
        return 3 if self.gated else 2

    @property
    def query_width(self) -> int:
        """Width of the queries of a decoder layer, all heads together."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of the keys, and of the values, of a decoder layer."""
        return self.kv_groups * self.head_dim

    def shuffled_width(self, grid: int) -> int:
        """Width of one of `grid` x `grid` tokens after the pixel shuffle."""
        return (self.patches // grid) ** 2 * self.vision.hidden_size


def model_sizes(arguments: Arguments) -> ModelSizes:
    """Sizes of the model that arguments describe: parsed ones, a preset, an import's recipe or a checkpoint's.

    Missing entries of a mapping have the default of Megatron's argument, or of ours. Raises ValueError if settings
    do not fit each other, KeyError if a size of the decoder is missing.
    """
    arguments = as_mapping(arguments)
    get = arguments.get
    vision, compression = vision_config(arguments), settings_from(arguments, CompressionSettings)
    lora = settings_from(arguments, LoraSettings)
    layers, hidden, heads = (arguments[n] for n in ("num_layers", "hidden_size", "num_attention_heads"))
    check_compression(compression, patches=vision.patches_per_side, num_layers=layers)
    high = grid_side(vision.patches_per_side, compression.high_ratio, "--high-ratio")
    low = (
        grid_side(vision.patches_per_side, compression.low_ratio, "--low-ratio") if compression.lvtc else high
    )
    experts = get("num_experts") or 0
    return ModelSizes(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_groups=arguments["num_query_groups"] if get("group_query_attention") else heads,
        head_dim=get("kv_channels") or hidden // heads,
        ffn=arguments["ffn_hidden_size"],
        vocab=arguments["vocab_size"],
        padded_vocab=get("padded_vocab_size") or arguments["vocab_size"],
        vision=vision,
        low_grid=low,
        high_grid=high,
        injection_layers=compression.injection_layers(),
        projector=compression.projector,
        pixel_shuffle_version=compression.pixel_shuffle_version,
        projector_drop_path=compression.projector_drop_path,
        upsample=compression.upsample,
        gated=bool(get("swiglu")),
        experts=experts,
        topk=get("moe_router_topk", 2) if experts else 0,
        expert_ffn=(get("moe_ffn_hidden_size") or arguments["ffn_hidden_size"]) if experts else 0,
        shared_ffn=(get("moe_shared_expert_intermediate_size") or 0) if experts else 0,
        expert_layers=_expert_layers(layers, get("moe_layer_freq", 1)) if experts else (),
        norm_tensors=1 if get("normalization") == "RMSNorm" else 2,
        linear_bias=bool(get("add_bias_linear", True)),
        qkv_bias=bool(get("add_qkv_bias")),
        qk_norm=bool(get("qk_layernorm")),
        tied=not get("untie_embeddings_and_output_weights"),
        lora_rank=lora.lora_rank or 0,
        lora_targets=frozenset(lora.targets),
    )


def _expert_layers(layers: int, frequency: int | list[int]) -> Collection[int]:
    """Megatron's --moe-layer-freq: one layer of experts in every N, or a 0/1 pattern."""
    if isinstance(frequency, int):
        return range(0, layers, frequency)
    return frozenset(layer for layer, experts in enumerate(frequency) if experts)


def vision_config(arguments: Arguments) -> InternViTConfig:
    """Architecture of the vision encoder: the preset with our overrides. Raises ValueError."""
    wanted = settings_from(arguments, VisionSettings)
    changes: dict[str, Any] = {"image_size": wanted.image_size, "drop_path_rate": wanted.vision_drop_path}
    if wanted.patch_size is not None:
        changes["patch_size"] = wanted.patch_size
    if wanted.select_layer is not None:
        changes["select_layer"] = wanted.select_layer
    if wanted.vision_overrides:
        changes |= vision_overrides(wanted.vision_overrides)
    return internvit_preset(wanted.vision_preset, **changes)


def vision_overrides(text: str) -> dict[str, Any]:
    """Parse the fields in --vision-overrides. Raises ValueError for bad JSON, unknown fields and wrong types."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--vision-overrides {text}: not JSON: {error}") from error
    known = {field.name: field.type for field in fields(InternViTConfig)}
    if not isinstance(found, dict):
        raise ValueError(f'--vision-overrides {text}: must be a JSON object, such as {{"num_layers": 12}}')
    for name, value in found.items():
        if name not in known:
            hint = similar(name, known) or f": one of {', '.join(known)}"
            raise ValueError(f"--vision-overrides: InternViT has no field {name}{hint}")
        kind = type(getattr(InternViTConfig, name))  # its default's
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"--vision-overrides: {name} is {json.dumps(value)}, must be {_KINDS[kind]}")
    return found
