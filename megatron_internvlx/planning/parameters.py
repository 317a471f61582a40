"""Parameter counts per part, of the whole model or of one rank's share."""

from __future__ import annotations

from megatron_internvlx.config import PVTC_MLP_RATIO
from megatron_internvlx.model.internvit_config import InternViTConfig
from megatron_internvlx.model.sizes import ModelSizes
from megatron_internvlx.planning.adapters import all_adapters


def parameters(sizes: ModelSizes) -> dict[str, int]:
    """Parameter counts of the whole model; the sum of the values is the model's.

    Keys: vision, entry_projector, injection_K per injection layer, embedding, shallow and deep
    (decoder layers before and from the expansion on, injections not included), final_norm,
    output (0 if tied) and, if the model has any, adapters.
    """
    embedding, high = sizes.padded_vocab * sizes.hidden, projector_parameters(sizes, sizes.high_grid)
    layers = [layer_parameters(sizes, i) + expert_parameters(sizes, i) for i in range(sizes.layers)]
    return {
        "vision": vision_parameters(sizes.vision),
        "entry_projector": projector_parameters(sizes, sizes.entry_grid),
        **{f"injection_{k}": high for k in sizes.injection_layers},
        "embedding": embedding,
        "shallow": sum(layers[: sizes.shallow_layers]),
        "deep": sum(layers[sizes.shallow_layers :]),
        "final_norm": sizes.norm_tensors * sizes.hidden,
        "output": 0 if sizes.tied else embedding,
        **({"adapters": sum(all_adapters(sizes).values())} if sizes.lora_rank else {}),
    }


def vision_parameters(vit: InternViTConfig) -> int:
    """Parameters of InternViT; layers above the selected one count, they are in the checkpoint."""
    c = vit.hidden_size
    patch = vit.num_channels * vit.patch_size**2 * c + c
    return vit.num_layers * vision_layer_parameters(vit) + patch + c + vit.tokens_per_tile * c


def vision_layer_parameters(vit: InternViTConfig) -> int:
    """Parameters of one layer of InternViT."""
    c, f = vit.hidden_size, vit.ffn_hidden_size
    norms = 2 * c * (2 if vit.norm_type == "layer_norm" else 1) + (2 * c if vit.qk_normalization else 0)
    attention = 4 * c * c + c + (3 * c if vit.qkv_bias else 0)
    return norms + attention + 2 * c * f + f + c + 2 * c  # the last 2c: layer scale


def projector_parameters(sizes: ModelSizes, grid: int, tensor: int = 1) -> int:
    """Parameters of one projector to `grid` x `grid` tokens per tile, on each of `tensor` ranks."""
    h, c, shuffled = sizes.hidden, sizes.vision.hidden_size, sizes.shuffled_width(grid)
    if sizes.projector == "mlp":
        return 2 * shuffled + (shuffled * h + h) // tensor + h * h // tensor + h
    projections = shuffled + shuffled * h // tensor + 2 * (c + c * h // tensor)
    attention = (4 * h * h + 3 * PVTC_MLP_RATIO * h * h) // tensor + 3 * h
    return projections + 2 * attention + grid * grid * h  # the last: cls_scale


def layer_parameters(sizes: ModelSizes, layer: int, tensor: int = 1) -> int:
    """Parameters of one decoder layer (0-based) on each of `tensor` ranks.

    Not included: the projector that it may inject, and experts but the shared one.
    """
    h, qkv = sizes.hidden, sizes.query_width + 2 * sizes.key_width
    attention = (h * qkv + sizes.query_width * h) // tensor
    attention += qkv * (sizes.qkv_bias or sizes.linear_bias) // tensor + h * sizes.linear_bias
    attention += 2 * sizes.head_dim * sizes.norm_tensors * sizes.qk_norm
    if layer in sizes.expert_layers:
        mlp = sizes.experts * h  # the router, on every rank
        mlp += _mlp_parameters(sizes, sizes.shared_ffn, tensor) if sizes.shared_ffn else 0
    else:
        mlp = _mlp_parameters(sizes, sizes.ffn, tensor)
    return attention + mlp + 2 * sizes.norm_tensors * h


def expert_parameters(sizes: ModelSizes, layer: int, expert: int = 1, expert_tensor: int = 1) -> int:
    """Parameters of a decoder layer's routed experts on each of `expert` x `expert_tensor` ranks."""
    if layer not in sizes.expert_layers:
        return 0
    return sizes.experts // expert * _mlp_parameters(sizes, sizes.expert_ffn, expert_tensor)


def _mlp_parameters(sizes: ModelSizes, ffn: int, tensor: int) -> int:
    bias = (ffn * (sizes.matrices - 1) // tensor + sizes.hidden) if sizes.linear_bias else 0
    return sizes.matrices * sizes.hidden * ffn // tensor + bias
