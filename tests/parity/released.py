"""Released InternViT tensors, weights or gradients, in the layout of our module and back."""

import re

import torch
from torch import Tensor

from megatron_internvlx.model.internvit import InternViT
from megatron_internvlx.model.internvit_config import InternViTConfig

PREFIX = "vision_model."

# Released name of a layer's tensor -> ours.
_LAYER_NAMES = {
    "attn.qkv.weight": "self_attention.linear_qkv.weight",
    "attn.qkv.bias": "self_attention.linear_qkv.bias",
    "attn.q_norm.weight": "self_attention.q_norm.weight",
    "attn.k_norm.weight": "self_attention.k_norm.weight",
    "attn.proj.weight": "self_attention.linear_proj.weight",
    "attn.proj.bias": "self_attention.linear_proj.bias",
    "ls1": "self_attn_bda.layer_scale",
    "ls2": "mlp_bda.layer_scale",
    "norm1.weight": "input_layernorm.weight",
    "norm1.bias": "input_layernorm.bias",
    "norm2.weight": "pre_mlp_layernorm.weight",
    "norm2.bias": "pre_mlp_layernorm.bias",
    "mlp.fc1.weight": "mlp.linear_fc1.weight",
    "mlp.fc1.bias": "mlp.linear_fc1.bias",
    "mlp.fc2.weight": "mlp.linear_fc2.weight",
    "mlp.fc2.bias": "mlp.linear_fc2.bias",
}


def _our_name(released: str) -> str:
    name = released.removeprefix(PREFIX)
    layer = re.fullmatch(r"(encoder\.layers\.\d+\.)(.+)", name)
    return name if layer is None else layer[1] + _LAYER_NAMES[layer[2]]


def _heads_outside(qkv: Tensor, heads: int) -> Tensor:
    """Rows `[3][heads][width]`, as released, to `[heads][3][width]`, as Megatron has them."""
    return qkv.unflatten(0, (3, heads, -1)).transpose(0, 1).reshape(qkv.shape)


def _heads_inside(qkv: Tensor, heads: int) -> Tensor:
    return qkv.unflatten(0, (heads, 3, -1)).transpose(0, 1).reshape(qkv.shape)


def from_released(tensors: dict[str, Tensor], vit: InternViTConfig) -> dict[str, Tensor]:
    """Returns the vision part of released tensors under our names and in our layout."""
    ours = {}
    for name, tensor in tensors.items():
        if name.startswith(PREFIX):
            qkv = ".attn.qkv." in name
            ours[_our_name(name)] = _heads_outside(tensor, vit.num_heads) if qkv else tensor
    return ours


def load_released(module: InternViT, tensors: dict[str, Tensor]) -> None:
    """Copies released weights into `module`; every parameter must be given."""
    module.load_state_dict(from_released(tensors, module.vit), strict=True)


def gradients_as_released(module: InternViT) -> dict[str, Tensor]:
    """Returns the module's gradients under the released names and in the released layout."""
    to_released = {ours: released for released, ours in _LAYER_NAMES.items()}
    gradients = {}
    for name, parameter in module.named_parameters():
        layer = re.fullmatch(r"(encoder\.layers\.\d+\.)(.+)", name)
        released = PREFIX + (name if layer is None else layer[1] + to_released[layer[2]])
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients[released] = _heads_inside(gradient, module.vit.num_heads) if "qkv" in name else gradient
    return gradients
