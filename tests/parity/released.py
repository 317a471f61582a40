"""Released InternVL-X tensors, weights or gradients, in the layout of our modules and back.

Written for the tests alone: the product's checkpoint converter has a table of its own, so that an error in
one of them shows as a difference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron_internvlx.model.internvit_config import InternViTConfig

if TYPE_CHECKING:  # tests of the converter do without Megatron
    from megatron_internvlx.model.internvit import InternViT

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


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Returns every parameter's gradient by name; zeros where there is none."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in module.named_parameters()
    }


def gradients_as_released(module: InternViT) -> dict[str, Tensor]:
    """Returns the module's gradients under the released names and in the released layout."""
    return _vision_as_released(gradients(module), module.vit)


def _vision_as_released(ours: Mapping[str, Tensor], vit: InternViTConfig) -> dict[str, Tensor]:
    to_released = {ours: released for released, ours in _LAYER_NAMES.items()}
    released = {}
    for name, tensor in ours.items():
        layer = re.fullmatch(r"(encoder\.layers\.\d+\.)(.+)", name)
        theirs = PREFIX + (name if layer is None else layer[1] + to_released[layer[2]])
        released[theirs] = _heads_inside(tensor, vit.num_heads) if "qkv" in name else tensor
    return released


# Released name of a PVTC tensor -> ours.
_PROJECTOR_NAMES = {
    "cls_scale": "cls_scale",
    **{
        f"{theirs}.{index}.weight": f"{ours}.{part}.weight"
        for theirs, ours in (("mlp1", "query_proj"), ("mlp2", "cls_proj"), ("mlp3", "kv_proj"))
        for index, part in ((0, "norm"), (1, "linear"))
    },
    **{
        f"{branch}.{theirs}.weight": f"{branch}.{ours}.weight"
        for branch in ("attn_local", "attn_global")
        for theirs, ours in (
            ("attn.norm1", "norm_query"),
            ("attn.norm2", "norm_kv"),
            ("attn.q", "linear_q"),
            ("attn.k", "linear_k"),
            ("attn.v", "linear_v"),
            ("attn.proj", "linear_proj"),
            ("mlp.norm", "norm_mlp"),
            ("mlp.w1", "linear_gate"),
            ("mlp.w3", "linear_up"),
            ("mlp.w2", "linear_down"),
        )
    },
}


def projector_from_released(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a released `VisionProjector` (no prefix) under the names of our `PVTC`."""
    return {_PROJECTOR_NAMES[name]: tensor for name, tensor in tensors.items()}


def projector_as_released(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors of our `PVTC` under the released names."""
    to_released = {ours: released for released, ours in _PROJECTOR_NAMES.items()}
    return {to_released[name]: tensor for name, tensor in ours.items()}


@dataclass(frozen=True)
class ReleasedModel:
    """Names and layouts of a whole released model, from its `config.json`."""

    vit: InternViTConfig
    heads: int
    groups: int
    internlm2: bool
    """InternLM2's names and fused wqkv; else Qwen2's."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ReleasedModel:
        """Reads a released `config.json`."""
        llm = config["llm_config"]
        return cls(
            InternViTConfig.from_hf(config["vision_config"], select_layer=config["select_layer"]),
            llm["num_attention_heads"],
            llm["num_key_value_heads"],
            llm["model_type"] == "internlm2",
        )

    def to_ours(self, released: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released tensors of the whole model -> our full names and layout."""
        ours = {PREFIX + name: t for name, t in from_released(released, self.vit).items()}
        projector = _part(released, "projector.")
        ours |= {f"projector.{name}": t for name, t in projector_from_released(projector).items()}
        llm = _part(released, "language_model.")
        ours |= {f"language_model.{name}": t for name, t in self._llm_to_ours(llm).items()}
        return ours

    def to_released(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under our full names -> released names and layout."""
        released = _vision_as_released(_part(ours, PREFIX), self.vit)
        projector = projector_as_released(_part(ours, "projector."))
        released |= {f"projector.{name}": t for name, t in projector.items()}
        llm = self._llm_to_released(_part(ours, "language_model."))
        return released | {f"language_model.{name}": t for name, t in llm.items()}

    @property
    def _llm_names(self) -> dict[str, str]:
        """Released name -> ours of everything but query-key-value and gate-up; N stands for the layer."""
        layer = "decoder.layers.N."
        if self.internlm2:
            return {
                "model.tok_embeddings.weight": "embedding.word_embeddings.weight",
                "model.norm.weight": "decoder.final_layernorm.weight",
                "output.weight": "output_layer.weight",
                "model.layers.N.attention_norm.weight": layer + "input_layernorm.weight",
                "model.layers.N.attention.wqkv.weight": layer + "self_attention.linear_qkv.weight",
                "model.layers.N.attention.wo.weight": layer + "self_attention.linear_proj.weight",
                "model.layers.N.ffn_norm.weight": layer + "pre_mlp_layernorm.weight",
                "model.layers.N.feed_forward.w2.weight": layer + "mlp.linear_fc2.weight",
            }
        return {
            "model.embed_tokens.weight": "embedding.word_embeddings.weight",
            "model.norm.weight": "decoder.final_layernorm.weight",
            "lm_head.weight": "output_layer.weight",
            "model.layers.N.input_layernorm.weight": layer + "input_layernorm.weight",
            "model.layers.N.self_attn.o_proj.weight": layer + "self_attention.linear_proj.weight",
            "model.layers.N.post_attention_layernorm.weight": layer + "pre_mlp_layernorm.weight",
            "model.layers.N.mlp.down_proj.weight": layer + "mlp.linear_fc2.weight",
        }

    @property
    def _gate_up(self) -> tuple[str, str]:
        return ("feed_forward.w1", "feed_forward.w3") if self.internlm2 else ("mlp.gate_proj", "mlp.up_proj")

    def _llm_to_ours(self, llm: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ours, gate, up = {}, *self._gate_up
        for name, tensor in llm.items():
            generic, number = _generic(name)
            start = f"decoder.layers.{number}."
            if generic in self._llm_names:
                ours[self._llm_names[generic].replace("N", str(number))] = tensor
            elif gate in name:
                both = [tensor, llm[name.replace(gate, up)]]
                ours[start + "mlp.linear_fc1.weight"] = torch.cat(both)
            elif ".q_proj." in name:
                parts = [llm[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
                kind = name.rsplit(".", 1)[1]
                ours[f"{start}self_attention.linear_qkv.{kind}"] = self._join_qkv(parts)
            elif not any(part in name for part in (up, ".k_proj.", ".v_proj.")):
                raise KeyError(name)
        return ours

    def _llm_to_released(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names, released = {o: r for r, o in self._llm_names.items()}, {}
        for name, tensor in ours.items():
            generic, number = _generic(name)
            start = f"model.layers.{number}."
            if generic in names:
                released[names[generic].replace("N", str(number))] = tensor
            elif "linear_fc1" in name:
                for part, half in zip(self._gate_up, tensor.chunk(2), strict=True):
                    released[f"{start}{part}.weight"] = half
            elif "linear_qkv" in name:
                kind = name.rsplit(".", 1)[1]
                for part, rows in zip("qkv", self._split_qkv(tensor), strict=True):
                    released[f"{start}self_attn.{part}_proj.{kind}"] = rows
            else:
                raise KeyError(name)
        return released

    def _join_qkv(self, parts: list[Tensor]) -> Tensor:
        """Rows of q, k and v -> per key-value head [its q heads, k, v], as InternLM2 and Megatron have it."""
        return torch.cat([x.unflatten(0, (self.groups, -1)) for x in parts], dim=1).flatten(0, 1)

    def _split_qkv(self, fused: Tensor) -> list[Tensor]:
        grouped = fused.unflatten(0, (self.groups, self.heads // self.groups + 2, -1))
        ratio = self.heads // self.groups
        return [
            grouped[:, :ratio].flatten(0, 2),
            grouped[:, ratio].flatten(0, 1),
            grouped[:, ratio + 1].flatten(0, 1),
        ]


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _generic(name: str) -> tuple[str, str]:
    """A layer's name with N for its number, and the number."""
    number = re.search(r"layers\.(\d+)\.", name)
    return (name, "") if number is None else (name.replace(f"layers.{number[1]}.", "layers.N.", 1), number[1])
