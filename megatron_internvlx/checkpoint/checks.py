"""Read JSON files written by others, such as config.json, and check their values before they are used."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_internvlx import files
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.data.internlm2_tokenizer import is_internlm2
from megatron_internvlx.data.rvtc import NAMES_VERSION

# Sizes of a decoder or an encoder; required keys are checked where they are read.
_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "patch_size", "image_size", "num_channels",
)  # fmt: skip
_SIZES_OR_NULL = ("num_key_value_heads", "head_dim")
_SIZES_OF_EXPERTS = ("moe_intermediate_size", "num_experts_per_tok")
# Numbers used in computations, positive ones first; and switches.
_POSITIVE = ("rms_norm_eps", "layer_norm_eps", "rope_theta")
_NUMBERS = (
    "initializer_range", "initializer_factor", "layer_scale_init_value", "drop_path_rate", "router_aux_loss_coef",
)  # fmt: skip
_SWITCHES = (
    "qkv_bias", "qk_normalization", "use_qk_norm", "attention_bias", "tie_word_embeddings", "use_thumbnail",
    "dynamic_image_size", "norm_topk_prob", "bias", "mlp_bias", "use_sliding_window",
)  # fmt: skip
MOST_TILES = 1024  # per image; released models have at most 40, and the grid search tries all grids
_RULES = {"ps_version": ("v1", "v2"), "rvtc": ("edge", "area", "off"), "rvtc_version": (1, NAMES_VERSION)}
_COMPRESSION_RULES = {
    "projector": ("pvtc", "mlp"),
    "upsample": ("bilinear", "nearest"),
    "pixel_shuffle_version": ("v1", "v2"),
}
_COMPRESSION = (*_COMPRESSION_RULES, "expand_layer", "inject_layers", "low_ratio", "high_ratio")


MODEL_TYPES = ("internvl_chat", "internvlx", "internvl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has the files of a tokenizer, readable or not."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def tokenizer_is_code(directory: Path) -> bool:
    """Whether a directory's tokenizer is Python code, which is not run, and not InternLM2's, which is read without.

    Raises ConversionError if tokenizer_config.json is not a JSON object.
    """
    settings = directory / "tokenizer_config.json"
    whole = any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    if whole or not settings.is_file() or is_internlm2(directory):
        return False
    named = read_object(settings).get("auto_map")
    return isinstance(named, dict) and "AutoTokenizer" in named


def check_model_directory(flag: str, directory: Path) -> None:
    """Check that a directory has a known config.json, before slow imports. Raises ConversionError.

    `flag` is the command-line flag that names the directory.
    """
    if not directory.is_dir():
        what = "a file, not a directory" if directory.exists() else "no such directory"
        raise ConversionError(f"{flag} {directory}: {what}{_download_command(directory)}")
    config = read_object(directory / "config.json")
    if config.get("model_type") not in MODEL_TYPES:
        raise unknown_model(config)


def _download_command(directory: Path) -> str:
    """Command that downloads a directory named like a model of the Hugging Face hub; "" for other names."""
    name = directory.as_posix()
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or directory.parent.exists():
        return ""
    return f". A model of the hub is downloaded first: hf download {name} --local-dir {directory.name}"


def unknown_model(config: Mapping[str, Any]) -> ConversionError:
    """Error for a config.json of an unsupported model."""
    named = config.get("architectures")
    names = ", ".join(map(str, named)) if isinstance(named, list) and named else "none"
    return ConversionError(
        f"config.json: model_type {config.get('model_type')!r} (architectures {names}) cannot be imported; "
        f"it must be {', '.join(MODEL_TYPES[:-1])} or {MODEL_TYPES[-1]}"
    )


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object. Raises ConversionError if it is missing or not an object."""
    try:
        return files.read_object(path)
    except ValueError as error:
        raise ConversionError(str(error)) from error


def model_part(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Get `llm_config` or another part of a config.json, and check its values.

    Raises ConversionError if it is missing, not an object, or has an invalid value.
    """
    part = config.get(key)
    if not isinstance(part, dict):
        raise ConversionError(f"config.json: {key} is {'missing' if part is None else 'not an object'}")
    experts = _SIZES_OF_EXPERTS if part.get("num_experts") or part.get("num_local_experts") else ()
    for name in (*_SIZES, *_SIZES_OR_NULL, *experts):
        value = part.get(name)
        if name not in part or (value is None and name in _SIZES_OR_NULL):
            continue
        if not all(_is_size(side) for side in (value if isinstance(value, list) and value else [value])):
            raise ConversionError(
                f"config.json: {key}.{name} is {value!r}; it must be a whole number of at least 1"
            )
    _check_numbers(part, f"{key}.")
    for name in ("rope_scaling", "rope_parameters"):
        rope = part.get(name) or {}
        if not isinstance(rope, dict):
            raise ConversionError(
                f"config.json: {key}.{name} is {part[name]!r}; it must be an object or null"
            )
        _check_numbers(rope, f"{key}.{name}.")
    _check_heads(part, key)
    return part


def _check_numbers(part: Mapping[str, Any], where: str) -> None:
    """Check the types of an object's numbers and switches. Raises ConversionError."""
    for name in (*_POSITIVE, "factor"):
        if part.get(name) is not None and not (_is_number(part[name]) and part[name] > 0):
            raise ConversionError(
                f"config.json: {where}{name} is {part[name]!r}; it must be a positive number"
            )
    for name in _NUMBERS:
        if part.get(name) is not None and not _is_number(part[name]):
            raise ConversionError(f"config.json: {where}{name} is {part[name]!r}; it must be a number")
    for name in _SWITCHES:
        if part.get(name) is not None and not isinstance(part[name], bool):
            raise ConversionError(f"config.json: {where}{name} is {part[name]!r}; it must be true or false")


def _check_heads(part: Mapping[str, Any], key: str) -> None:
    heads, groups = part.get("num_attention_heads"), part.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise ConversionError(
            f"config.json: {key}.num_attention_heads {heads} must be a multiple of num_key_value_heads {groups}"
        )
    experts, chosen = part.get("num_experts", part.get("num_local_experts")), part.get("num_experts_per_tok")
    if chosen and _is_size(experts) and chosen > experts:
        raise ConversionError(
            f"config.json: {key}.num_experts_per_tok {chosen} must be at most the number of experts, {experts}"
        )


def check_images(config: Mapping[str, Any]) -> None:
    """Check the image settings at the top level of a config.json. Raises ConversionError."""
    for name, fine in _RULES.items():
        if name in config and config[name] not in fine:
            raise ConversionError(
                f"config.json: {name} is {config[name]!r}; it must be {' or '.join(map(str, fine))}"
            )
    least, most = config.get("min_dynamic_patch", 1), config.get("max_dynamic_patch", 12)
    if not (_is_size(least) and _is_size(most) and least <= most <= MOST_TILES):
        raise ConversionError(
            f"config.json: min_dynamic_patch is {least!r} and max_dynamic_patch {most!r}; both must be whole "
            f"numbers from 1 to {MOST_TILES}, the first not above the second"
        )
    ratio = config.get("downsample_ratio", 0.5)
    if not _is_ratio(ratio):
        raise ConversionError(
            f"config.json: downsample_ratio is {ratio!r}; it must be a number above 0, at most 1, such as 0.5"
        )
    _check_numbers(config, "")
    for name in ("select_layer", "vision_feature_layer"):
        if type(config.get(name, -1)) is not int:
            raise ConversionError(f"config.json: {name} is {config[name]!r}; it must be a whole number")


def compression_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Get and check `compression` of an export with LVTC. Raises ConversionError for an invalid setting."""
    part = config.get("compression")
    if not isinstance(part, dict):
        raise ConversionError(f"config.json: compression is {'missing' if part is None else 'not an object'}")
    unknown = sorted(set(part) - set(_COMPRESSION))
    if unknown:
        raise ConversionError(
            f"config.json: compression has unknown settings {', '.join(unknown)}; "
            f"known are {', '.join(_COMPRESSION)}"
        )
    for name, fine in _COMPRESSION_RULES.items():
        if name in part and part[name] not in fine:
            raise ConversionError(
                f"config.json: compression.{name} is {part[name]!r}; it must be {' or '.join(fine)}"
            )
    layers = [part.get("expand_layer") or 0, *_as_list(part.get("inject_layers"))]
    ratios = [part.get("low_ratio", 0.25), part.get("high_ratio", 0.5)]
    if not all(type(layer) is int for layer in layers) or not all(map(_is_ratio, ratios)):
        raise ConversionError(
            "config.json: compression: expand_layer and inject_layers must be whole numbers, low_ratio and high_ratio "
            f"numbers above 0 and at most 1, found {part}"
        )
    return part


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value, None]


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    """Whether the value is a finite number that fits into a float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_ratio(value: Any) -> bool:
    return _is_number(value) and 1e-6 <= value <= 1
