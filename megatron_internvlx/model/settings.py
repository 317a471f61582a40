"""The model that parsed arguments describe: vision encoder, compression, static sizes."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import Any

from megatron_internvlx.config import (
    CompressionSettings,
    TrainSettings,
    VisionSettings,
    grid_side,
    settings_from,
)
from megatron_internvlx.model.decoder import CompressionPlan
from megatron_internvlx.model.internvit_config import InternViTConfig, internvit_preset
from megatron_internvlx.parallel.boundary import Budget
from megatron_internvlx.recipe import similar

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def vision_config(args: argparse.Namespace) -> InternViTConfig:
    """The vision encoder's architecture: the preset with our overrides."""
    wanted = settings_from(args, VisionSettings)
    changes: dict[str, Any] = {"image_size": wanted.image_size, "drop_path_rate": wanted.vision_drop_path}
    if wanted.patch_size is not None:
        changes["patch_size"] = wanted.patch_size
    if wanted.select_layer is not None:
        changes["select_layer"] = wanted.select_layer
    if wanted.vision_overrides:
        changes |= vision_overrides(wanted.vision_overrides)
    return internvit_preset(wanted.vision_preset, **changes)


def vision_overrides(text: str) -> dict[str, Any]:
    """The fields in --vision-overrides. Raises ValueError for bad JSON, unknown fields and wrong types."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--vision-overrides {text}: not JSON: {error}") from error
    known = {field.name: field.type for field in fields(InternViTConfig)}
    if not isinstance(found, dict):
        raise ValueError(f'--vision-overrides {text}: want a JSON object, such as {{"num_layers": 12}}')
    for name, value in found.items():
        if name not in known:
            hint = similar(name, known) or f": one of {', '.join(known)}"
            raise ValueError(f"--vision-overrides: InternViT has no field {name}{hint}")
        kind = type(getattr(InternViTConfig, name))  # its default's
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"--vision-overrides: {name} is {json.dumps(value)}, want {_KINDS[kind]}")
    return found


def compression_plan(args: argparse.Namespace) -> CompressionPlan:
    """Grid sides and injection layers of the model that the arguments describe."""
    vision = vision_config(args)
    compression = settings_from(args, CompressionSettings)
    patches = vision.image_size // vision.patch_size
    high = grid_side(patches, compression.high_ratio, "--high-ratio")
    return CompressionPlan(
        projector=compression.projector,
        pixel_shuffle_version=compression.pixel_shuffle_version,
        drop_path=compression.projector_drop_path,
        injection_layers=compression.injection_layers(),
        low_grid=grid_side(patches, compression.low_ratio, "--low-ratio") if compression.lvtc else high,
        high_grid=high,
        patches=patches,
        vision_hidden_size=vision.hidden_size,
        upsample=compression.upsample,
        fp8=bool(args.fp8) and "projectors" in (args.fp8_parts or ()),
    )


def static_budget(args: argparse.Namespace) -> Budget | None:
    """The sizes to which static boundaries pad every micro-batch; None with variable boundaries."""
    train = settings_from(args, TrainSettings)
    if train.boundary != "static":
        return None
    assert train.max_tiles_per_pack is not None
    return Budget(train.shallow_seq_length or args.seq_length, args.seq_length, train.max_tiles_per_pack)
