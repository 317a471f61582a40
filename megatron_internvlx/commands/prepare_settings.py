"""Settings of the training that `ivlx prepare` looks at data with, from its options and a recipe."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_internvlx.data.sample import EncoderSettings

MAX_CHARACTERS = 1 << 19
"""Longest text without a recipe: 64 characters for each of 8,192 tokens, as training has it."""
_SIZES = ("image_size", "max_tiles", "min_tiles")
_OPTIONAL_SIZES = (
    "patch_size",
    "seq_length",
    "shallow_seq_length",
    "max_tiles_per_pack",
    "max_supervised_tokens_per_pack",
    "expand_layer",
)
_RATIOS = ("low_ratio", "high_ratio")
_SWITCHES = ("packing", "no_thumbnail", "static_image_size")


def _check_types(given: dict[str, Any], where: str) -> None:
    """Check the values that are used, and convert numbers in quotes in place, as training does.

    Raises ValueError that names file, key and value.
    """
    from megatron_internvlx.data.conversation import TEMPLATES
    from megatron_internvlx.data.rvtc import POLICIES
    from megatron_internvlx.ranges import RANGES

    for name in (*_SIZES, *_OPTIONAL_SIZES, *_RATIOS):
        value = given.get(name)
        if value is None and name in _OPTIONAL_SIZES:
            continue
        kind = "a number" if name in _RATIOS else "a whole number"
        try:
            number = float(value)  # type: ignore[arg-type]  # None raises TypeError like a list does
            if isinstance(value, bool) or (name not in _RATIOS and not number.is_integer()):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{where}: {name}: {value!r} must be {kind}") from None
        if not RANGES[name].contains(number):
            raise ValueError(f"{where}: {name}: {value!r} must be {RANGES[name]} ({RANGES[name].what})")
        given[name] = number if name in _RATIOS else int(number)
    for name in _SWITCHES:
        if not isinstance(given[name], bool):
            raise ValueError(f"{where}: {name}: {given[name]!r} must be true or false")
    for name, known in (("conversation_template", TEMPLATES), ("rvtc", POLICIES)):
        if not isinstance(given[name], str) or given[name] not in known:
            raise ValueError(f"{where}: {name}: {given[name]!r} must be one of {', '.join(known)}")
    if not isinstance(given["vision_preset"], str):
        raise ValueError(f"{where}: vision_preset: {given['vision_preset']!r} must be a name")


def encoder_settings(options: Namespace) -> tuple[EncoderSettings, int]:
    """Template, tiles and lengths of the training, and the longest text in characters.

    Raises ValueError for a recipe that is not readable or values that do not fit together.
    """
    from megatron_internvlx.config import DataSettings, grid_side
    from megatron_internvlx.data.packing import Budget
    from megatron_internvlx.data.sample import MOST_CHARACTERS_PER_TOKEN, SHORT_TEXT, EncoderSettings
    from megatron_internvlx.model.internvit_config import internvit_preset
    from megatron_internvlx.model.presets import preset
    from megatron_internvlx.yaml_files import load_yaml

    given: dict[str, Any] = {"image_size": 448, "vision_preset": "internvit_300m", **asdict(DataSettings())}
    given |= {"low_ratio": 0.25, "high_ratio": 0.5, "patch_size": None, "expand_layer": None}
    if options.recipe is not None:
        try:
            recipe = load_yaml(options.recipe)
        except ValueError as error:
            raise ValueError(f"--recipe {options.recipe}: {error}") from error
        if not isinstance(recipe, dict):
            raise ValueError(f"--recipe {options.recipe}: must be a flat mapping of argument names to values")
        recipe = {str(name).replace("-", "_"): value for name, value in recipe.items()}
        given |= {**(preset(str(recipe["model_preset"])) if "model_preset" in recipe else {}), **recipe}
    for name in ("conversation_template", "image_size", "max_tiles", "rvtc"):
        if getattr(options, name) is not None:
            given[name] = getattr(options, name)
    _check_types(given, f"--recipe {options.recipe}")
    patch = given["patch_size"] or internvit_preset(given["vision_preset"]).patch_size
    if given["image_size"] % patch:
        raise ValueError(f"--image-size {given['image_size']}: must be a multiple of the patch size {patch}")
    patches = given["image_size"] // patch
    deep = grid_side(patches, given["high_ratio"], "high_ratio") ** 2
    shallow = (
        grid_side(patches, given["low_ratio"], "low_ratio") ** 2
        if given["expand_layer"] is not None
        else None
    )
    length = given.get("seq_length")
    budget = None
    if length is not None and given["packing"]:
        budget = Budget(
            given.get("shallow_seq_length") or length,
            length,
            given.get("max_tiles_per_pack"),
            supervised=given.get("max_supervised_tokens_per_pack"),
        )
    settings = EncoderSettings(
        template=given["conversation_template"],
        tile_size=given["image_size"],
        max_tiles=given["max_tiles"],
        min_tiles=min(given["min_tiles"], given["max_tiles"]),
        use_thumbnail=not given["no_thumbnail"],
        rvtc=given["rvtc"],
        tokens_per_tile=deep,
        shallow_tokens_per_tile=shallow,
        max_length=length,
        dynamic_image_size=not given["static_image_size"],
        budget=budget,
    )
    return settings, max(SHORT_TEXT, MOST_CHARACTERS_PER_TOKEN * length) if length else MAX_CHARACTERS
