"""Convert a Hugging Face `config.json` to our arguments.

Arguments are a dictionary of argparse destinations, as in model/presets.py and in recipes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_internvlx.checkpoint import checks
from megatron_internvlx.checkpoint.checks import check_images, compression_part, model_part, read_object
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.families import FAMILIES
from megatron_internvlx.checkpoint.mapping import output_names
from megatron_internvlx.data.conversation import TEMPLATES
from megatron_internvlx.data.rvtc import stored_policy
from megatron_internvlx.model.internvit_config import PRESETS as VISION_PRESETS
from megatron_internvlx.model.internvit_config import InternViTConfig

DTYPES = ("float32", "bfloat16", "float16")

_COMMON: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "group_query_attention": True,
    "position_embedding_type": "rope",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
# Architecture fields of a decoder: theirs -> ours. Every family has these.
_DECODER = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "layernorm_epsilon",
    "max_position_embeddings": "max_position_embeddings",
}


@dataclass(frozen=True)
class ModelConfig:
    """Model of a Hugging Face directory, as our arguments."""

    arguments: dict[str, Any]
    layout: str
    """chat, internvlx or native; see mapping.py."""
    family: str
    tied: bool
    dtype: str
    """Type of the weights according to config.json."""
    remarks: tuple[str, ...] = ()
    """Messages about settings of config.json that were not taken over as they are, or are not in it."""


class TensorNames(Protocol):
    """Interface to the tensors of a directory."""

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same bits."""


def vision_arguments(vision: InternViTConfig) -> dict[str, Any]:
    """Arguments that describe a vision encoder: the closest preset and the differences from it."""
    named: dict[str, Any] = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "select_layer": vision.select_layer,
    }

    def differences(preset: InternViTConfig) -> dict[str, Any]:
        base = asdict(replace(preset, **named))
        return {k: v for k, v in asdict(vision).items() if v != base[k]}

    same = {name: differences(preset) for name, preset in VISION_PRESETS.items() if _fits(preset, named)}
    name = min(same, key=lambda n: len(same[n]))
    changes = {k: v for k, v in same[name].items() if k != "drop_path_rate"}
    extra = {"vision_overrides": json.dumps(changes)} if changes else {}
    return {"vision_preset": name, **named, **extra}


def _fits(preset: InternViTConfig, named: dict[str, Any]) -> bool:
    try:
        replace(preset, **named)
    except ValueError:
        return False
    return True


# ------------------------------------------------------------------------------------------- reading


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json` of a directory. Raises ConversionError if it is missing or unreadable."""
    return read_object(directory / "config.json")


def model_config(config: Mapping[str, Any], source: TensorNames) -> ModelConfig:
    """Convert a `config.json` to our arguments.

    Args:
        config: content of the file.
        source: tensors of the directory; only they show whether the projector is PVTC and which naming of
            transformers is used.

    Raises:
        ConversionError: unsupported architecture or setting.
    """
    kind = config.get("model_type")
    try:
        check_images(config)
        if kind == "internvl_chat":
            return _chat(config, "llm_config", source, "chat")
        if kind == "internvlx":
            return _chat(config, "llm_config", source, "internvlx")
        if kind == "internvl":
            return _native(config, source)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConversionError(f"config.json: {reason}") from error
    raise checks.unknown_model(config)


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    for source in (config, text):
        name = source.get("dtype") or source.get("torch_dtype")
        if name and name != "auto":
            found = str(name).removeprefix("torch.")
            if found not in DTYPES:
                raise ConversionError(f"config.json: dtype {name!r} must be one of {', '.join(DTYPES)}")
            return found
    return "float32"


def _decoder(text: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Convert the decoder's part of a config.json to (family, arguments)."""
    by_class = {row.architecture: family for family, row in FAMILIES.items()}
    architectures = text.get("architectures")
    named = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    family = by_class.get(named) or text.get("model_type", "")
    if family not in FAMILIES:
        raise ConversionError(
            f"config.json: {where}: {named or family or 'unnamed'} cannot be imported; the decoder must be one of "
            f"{', '.join(by_class)}"
        )
    row = FAMILIES[family]
    for key, fine in row.refused:
        if text.get(key) not in fine:
            value = repr(text[key]) if key in text else "(default)"
            raise ConversionError(f"config.json: {where}.{key} = {value} is not supported by this decoder")
    if text.get("hidden_act", "silu") != "silu":
        raise ConversionError(
            f"config.json: {where}.hidden_act {text['hidden_act']!r}: only silu is supported"
        )
    arguments = dict(_COMMON)
    for theirs, ours in _DECODER.items():
        default = text["num_attention_heads"] if theirs == "num_key_value_heads" else None
        value = text.get(theirs, default) if default is not None else text[theirs]
        arguments[ours] = default if value is None else value
    head_dim = text.get("head_dim") or row.head_dim
    arguments["kv_channels"] = head_dim or text["hidden_size"] // text["num_attention_heads"]
    arguments |= _rope(text, where)
    if row.qkv_bias:
        arguments["add_qkv_bias"] = True
    if row.qk_norm:
        arguments["qk_layernorm"] = True
    if row.experts:
        arguments |= _experts(text)
    return family, arguments


def _experts(text: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": text["num_experts"] if "num_experts" in text else text["num_local_experts"],
        "moe_router_topk": text["num_experts_per_tok"],
        "moe_ffn_hidden_size": text["moe_intermediate_size"],
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": ["aux_loss"],  # lists: these arguments take several values
        "moe_aux_loss_coeff": [text.get("router_aux_loss_coef", 1e-3)],
        "moe_token_dispatcher_type": "alltoall",
    }


def _rope(text: Mapping[str, Any], where: str) -> dict[str, Any]:
    """RoPE arguments. Dynamic NTK scaling is ignored: it acts only beyond max_position_embeddings."""
    rope = text.get("rope_parameters") or {}
    scaling = text.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
    base = text.get("rope_theta") or rope.get("rope_theta") or 10000
    if scaling is None:
        return {"rotary_base": base}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind in ("default", "dynamic"):
        return {"rotary_base": base}
    fixed = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    if kind == "llama3" and all(scaling.get(k) == v for k, v in fixed.items()):
        return {"rotary_base": base, "use_rope_scaling": True, "rope_scaling_factor": scaling["factor"]}
    raise ConversionError(f"config.json: {where}: RoPE scaling {dict(scaling)!r} is not supported")


def _tied(flag: Any, family: str, layout: str, source: TensorNames) -> bool:
    """Whether the output layer is tied to the embedding.

    Some directories set the flag and store both tensors: they are tied only if both are equal.
    """
    head, embedding = output_names(family, layout)
    return bool(flag) and (head not in source.names or source.equal(head, embedding))


def _images(config: Mapping[str, Any], vision: InternViTConfig) -> dict[str, Any]:
    forced = config.get("force_image_size") or vision.image_size
    if forced != vision.image_size:
        raise ConversionError(
            f"config.json: force_image_size {forced} differs from vision_config.image_size "
            f"{vision.image_size}: resize the position embedding first"
        )
    return {
        "min_tiles": config.get("min_dynamic_patch", 1),
        "max_tiles": config.get("max_dynamic_patch", 12),
        "no_thumbnail": not config.get("use_thumbnail", True),
        "static_image_size": not config.get("dynamic_image_size", True),
    }


def _chat(config: Mapping[str, Any], key: str, source: TensorNames, layout: str) -> ModelConfig:
    names = source.names
    text = model_part(config, key)
    vision = InternViTConfig.from_hf(
        model_part(config, "vision_config"), select_layer=config.get("select_layer", -1)
    )
    family, arguments = _decoder(text, key)
    pvtc = "projector.cls_scale" in names
    tied = _tied(text.get("tie_word_embeddings", False), family, layout, source)
    template = str(config.get("template"))
    known = template if template in TEMPLATES else "internvl2_5"
    arguments |= {
        **vision_arguments(vision),
        **_images(config, vision),
        "untie_embeddings_and_output_weights": not tied,
        "projector": "pvtc" if pvtc else "mlp",
        "pixel_shuffle_version": config.get("ps_version", "v1"),
        "high_ratio": config.get("downsample_ratio", 0.5),
        "conversation_template": known,
        "rvtc": _rvtc(config, pvtc=pvtc),
    }
    if layout == "internvlx":
        arguments |= compression_part(config)
    remarks = _rule_remarks(config, arguments)
    if template != known:
        remarks += (
            f"config.json has the unknown chat template {template!r}; the recipe uses {known!r} "
            f"(known: {', '.join(TEMPLATES)})",
        )
    return ModelConfig(arguments, layout, family, tied, _dtype(config, text), remarks)


def _rule_remarks(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Message about the tiles of a directory whose config.json does not name its RVTC rule as we do."""
    rule = arguments["rvtc"]
    if rule == config.get("rvtc", "off"):
        return ()
    if arguments["static_image_size"]:
        tiles = "one tile per image, whatever the rule"
    else:
        thumbnail = "no thumbnail" if arguments["no_thumbnail"] else "a thumbnail"
        tiles = f"{arguments['min_tiles']} to {arguments['max_tiles']} tiles per image and {thumbnail}"
    if "rvtc" in config:
        return (f"rvtc is {rule}, which was called {config['rvtc']} when config.json was written; {tiles}",)
    return (f"rvtc is {rule}, the rule of the released InternVL-X code: config.json names none; {tiles}",)


def _rvtc(config: Mapping[str, Any], *, pvtc: bool) -> str:
    """Rule by which the directory's images are cut. Without one in config.json: the released one, or InternVL's."""
    if "rvtc" not in config:
        return "edge" if pvtc else "off"
    return stored_policy(config["rvtc"], config.get("rvtc_version"))


def _native(config: Mapping[str, Any], source: TensorNames) -> ModelConfig:
    names = source.names
    text, vit = model_part(config, "text_config"), model_part(config, "vision_config")

    def side(value: Any) -> int:
        sides = value if isinstance(value, list | tuple) else [value, value]
        if sides[0] != sides[1]:
            raise ConversionError(f"config.json: image and patch must be square, found {value}")
        return sides[0]

    if config.get("vision_feature_select_strategy", "default") != "default":
        raise ConversionError("config.json: vision_feature_select_strategy must be 'default'")
    if "vision_tower.layernorm.weight" in names or "model.vision_tower.layernorm.weight" in names:
        raise ConversionError("config.json: a final norm of the vision tower is not supported")
    vision = InternViTConfig(
        hidden_size=vit["hidden_size"],
        num_layers=vit["num_hidden_layers"],
        num_heads=vit["num_attention_heads"],
        ffn_hidden_size=vit["intermediate_size"],
        patch_size=side(vit["patch_size"]),
        image_size=side(vit["image_size"]),
        num_channels=vit.get("num_channels", 3),
        norm_type=vit.get("norm_type", "layer_norm"),
        layer_norm_eps=vit.get("layer_norm_eps", 1e-6),
        qkv_bias=bool(vit.get("attention_bias", False)),
        qk_normalization=bool(vit.get("use_qk_norm", False)),
        layer_scale_init=vit.get("layer_scale_init_value", 0.1),
        select_layer=config.get("vision_feature_layer", -1),
        initializer_range=vit.get("initializer_range", 0.02),
    )
    family, arguments = _decoder(text, "text_config")
    layout = "native" if any(n.startswith("model.") for n in names) else "native_old"
    flag = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    tied = _tied(flag, family, layout, source)
    arguments |= {
        **vision_arguments(vision),
        "max_tiles": 12,
        "untie_embeddings_and_output_weights": not tied,
        "projector": "mlp",
        # transformers' pixel_shuffle ends in the transpose that the released code calls v2.
        "pixel_shuffle_version": "v2",
        "high_ratio": config.get("downsample_ratio", 0.5),
        "conversation_template": "internvl2_5",
        "rvtc": "off",
    }
    return ModelConfig(arguments, layout, family, tied, _dtype(config, text))


def family_of(arguments: Mapping[str, Any]) -> str:
    """Family whose tensor names and config are used to export a model trained from scratch."""
    if arguments.get("num_experts"):
        return "qwen3_moe"
    if arguments.get("qk_layernorm"):
        return "qwen3"
    if arguments.get("add_qkv_bias"):
        return "qwen2"
    if arguments.get("use_rope_scaling") or arguments.get("conversation_template") != "internlm2-chat":
        return "llama"
    return "internlm2"
