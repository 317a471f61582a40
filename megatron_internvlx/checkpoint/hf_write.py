"""Convert our arguments to the `config.json` of an exported directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_internvlx.checkpoint.families import FAMILIES
from megatron_internvlx.config import CompressionSettings, settings_from
from megatron_internvlx.data.rvtc import NAMES_VERSION
from megatron_internvlx.model.sizes import vision_config

_DECODER = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "layernorm_epsilon",
    "max_position_embeddings": "max_position_embeddings",
    "rope_theta": "rotary_base",
}


def decoder_config(arguments: Mapping[str, Any], family: str, tied: bool) -> dict[str, Any]:
    """Content of `llm_config` in config.json."""
    row = FAMILIES[family]
    config: dict[str, Any] = {"architectures": [row.architecture], "model_type": family}
    config |= {theirs: arguments[ours] for theirs, ours in _DECODER.items()}
    heads = arguments["num_attention_heads"]
    grouped = arguments.get("group_query_attention")
    config["num_key_value_heads"] = arguments["num_query_groups"] if grouped else heads
    head_dim = arguments.get("kv_channels") or arguments["hidden_size"] // heads
    if row.head_dim or head_dim * heads != arguments["hidden_size"]:
        config["head_dim"] = head_dim
    config |= {"hidden_act": "silu", "tie_word_embeddings": tied, "use_cache": True}
    config |= row.written
    if arguments.get("use_rope_scaling"):
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": arguments["rope_scaling_factor"],
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 8192,
        }
    if row.experts:
        config |= {
            "num_experts": arguments["num_experts"],
            "num_experts_per_tok": arguments["moe_router_topk"],
            "moe_intermediate_size": arguments.get("moe_ffn_hidden_size") or arguments["ffn_hidden_size"],
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config


def image_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of tiles and chat template under InternVL's names, and our `rvtc` with the version of its names."""
    get = arguments.get
    return {
        "downsample_ratio": get("high_ratio", 0.5),
        "dynamic_image_size": not get("static_image_size", False),
        "force_image_size": get("image_size", 448),
        "min_dynamic_patch": get("min_tiles", 1),
        "max_dynamic_patch": get("max_tiles", 12),
        "ps_version": get("pixel_shuffle_version", "v2"),
        "rvtc": get("rvtc", "edge"),
        "rvtc_version": NAMES_VERSION,
        "select_layer": vision_config(arguments).select_layer,
        "template": get("conversation_template", "internvl2_5"),
        "use_thumbnail": not get("no_thumbnail", False),
    }


def _vision(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The `vision_config` of a directory, without the drop path, which is a setting of training."""
    return vision_config({**arguments, "vision_drop_path": 0.0}).to_hf()


def chat_config(arguments: Mapping[str, Any], family: str, tied: bool, dtype: str) -> dict[str, Any]:
    """Content of config.json for the released InternVL and InternVL-X code."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        **image_settings(arguments),
        "llm_config": decoder_config(arguments, family, tied) | {"torch_dtype": dtype},
        "pad2square": False,
        "torch_dtype": dtype,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "vision_config": _vision(arguments) | {"torch_dtype": dtype},
    }


def _remote_decoder(arguments: Mapping[str, Any], family: str, tied: bool) -> dict[str, Any]:
    """Decoder settings in the format of configuration_internvlx.py: RoPE in one field, with the family's name."""
    config = decoder_config(arguments, family, tied)
    scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
    config["rope_parameters"] = {**scaling, "rope_theta": config.pop("rope_theta")}
    return config | {"family": family}


def remote_code_config(
    arguments: Mapping[str, Any], family: str, tied: bool, dtype: str, token_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """Content of config.json for the remote code in hf/.

    Args:
        arguments: settings of the model.
        family: family of the decoder.
        tied: whether the output layer is tied to the embedding.
        dtype: name of the weights' type.
        token_ids: image_token_id, bos_token_id, eos_token_id and pad_token_id.
    """
    compression = settings_from(arguments, CompressionSettings)
    model = "modeling_internvlx.InternVLXForConditionalGeneration"
    return {
        "architectures": ["InternVLXForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_internvlx.InternVLXConfig",
            "AutoModel": model,
            "AutoModelForCausalLM": model,
            "AutoModelForImageTextToText": model,
            "AutoModelForMultimodalLM": model,
            "AutoProcessor": "processing_internvlx.InternVLXProcessor",
        },
        "model_type": "internvlx",
        **image_settings(arguments),
        "compression": {
            name: getattr(compression, name)
            for name in (
                "projector", "expand_layer", "inject_layers", "low_ratio", "high_ratio", "upsample",
                "pixel_shuffle_version",
            )
        },
        "dtype": dtype,
        "llm_config": _remote_decoder(arguments, family, tied),
        "tie_word_embeddings": tied,
        "vision_config": _vision(arguments),
        **token_ids,
    }  # fmt: skip
