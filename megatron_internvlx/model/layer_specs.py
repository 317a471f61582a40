"""Layer specs of the decoder: Transformer Engine on GPUs, local modules elsewhere.

Both give the same parameter names in a distributed checkpoint (Megatron's
`sharded_state_dict_keys_map`), so a checkpoint moves between them.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_internvlx.model.attention import PackedDotProductAttention
from megatron_internvlx.model.decoder import InternVLXLayer
from megatron_internvlx.model.norm import norm_builder
from megatron_internvlx.model.router import LossWeightedMoELayer, LossWeightedRouter
from megatron_internvlx.model.sizes import ModelSizes
from megatron_internvlx.parallel.layout import stage_layers
from megatron_internvlx.platform import output_layer_fuses_accumulation


def _localize(submodules, normalization: str):
    """Replace Megatron's local norms and attention by ours, for sequence parallelism and packs."""
    norm = norm_builder(normalization, "local")
    submodules.input_layernorm = norm
    submodules.pre_mlp_layernorm = norm
    attention = submodules.self_attention.submodules
    attention.core_attention = PackedDotProductAttention
    for name in ("q_layernorm", "k_layernorm"):
        if getattr(attention, name) is not IdentityOp:
            setattr(attention, name, norm)
    if _experts(submodules) is not None:
        # A router follows the second norm, so Transformer Engine cannot fuse it and keeps its name;
        # Megatron's local layers rename it all the same.
        del submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return submodules


def _experts(submodules) -> MoESubmodules | None:
    """Submodules of a layer's experts; None for a dense layer."""
    experts = getattr(submodules.mlp, "keywords", {}).get("submodules")
    return experts if isinstance(experts, MoESubmodules) else None


def _weigh_load_balancing(submodules):
    """Use our router, and our recomputation, in a layer with experts."""
    experts = _experts(submodules)
    if experts is not None:
        ours = replace(experts, router=LossWeightedRouter)
        submodules.mlp = partial(LossWeightedMoELayer, **(submodules.mlp.keywords | {"submodules": ours}))
    return submodules


def language_model_config(config: TransformerConfig) -> TransformerConfig:
    """Config of Megatron's GPT model, without fused gradient accumulation if its output layer does not support it.

    The layers of `decoder_spec` keep the setting.
    """
    if not config.gradient_accumulation_fusion or output_layer_fuses_accumulation():
        return config
    own = copy.copy(config)
    own.gradient_accumulation_fusion = False
    return own


def decoder_spec(
    config: TransformerConfig,
    sizes: ModelSizes,
    *,
    pp_rank: int,
    vp_stage: int | None,
    projector_fp8: bool = False,
) -> TransformerBlockSubmodules:
    """Specs of the decoder layers on one pipeline stage, and the final norm."""
    local = config.transformer_impl == "local"
    specs = get_gpt_decoder_layer_specs(
        config, use_transformer_engine=not local, normalization=config.normalization
    )
    layers = stage_layers(config, pp_rank, vp_stage)
    built = []
    for spec in specs[layers.first : layers.end]:
        submodules = _weigh_load_balancing(copy.deepcopy(spec.submodules))
        if local:
            submodules = _localize(submodules, config.normalization)
        ours = {
            "sizes": sizes,
            "projector_fp8": projector_fp8,
            "gradient_accumulation_fusion": config.gradient_accumulation_fusion,
        }
        built.append(ModuleSpec(module=InternVLXLayer, submodules=submodules, params=ours))
    return TransformerBlockSubmodules(
        layer_specs=built, layer_norm=norm_builder(config.normalization, config.transformer_impl)
    )
