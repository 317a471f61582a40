"""Builder of one (virtual) pipeline stage from parsed arguments."""

from __future__ import annotations

import argparse

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_internvlx.config import (
    TrainSettings,
    VisionSettings,
    frozen_parts,
    settings_from,
    untrained_parts,
)
from megatron_internvlx.lora_settings import LoraSettings
from megatron_internvlx.megatron_settings import Batches, Rotary
from megatron_internvlx.model.internvlx import InternVLX
from megatron_internvlx.model.lora import MARK, add_adapters
from megatron_internvlx.model.sizes import model_sizes
from megatron_internvlx.parallel.boundary import Budget
from megatron_internvlx.precision import Precision


def part_of(name: str) -> str:
    """Part of the model to which a parameter belongs: vision, projectors or llm."""
    if name.startswith("vision_model."):
        return "vision"
    return "projectors" if name.startswith("projector.") or ".injection." in name else "llm"


def freeze(stage: InternVLX, frozen: frozenset[str]) -> None:
    """Switch off the gradients of the weights in these parts, and of none in adapters."""
    for name, parameter in stage.named_parameters():
        if part_of(name) in frozen and MARK not in name:
            parameter.requires_grad_(False)


def static_budget(train: TrainSettings, seq_length: int) -> Budget | None:
    """Sizes to which static boundaries pad every micro-batch; None with variable boundaries."""
    if train.boundary != "static":
        return None
    assert train.max_tiles_per_pack is not None
    return Budget(train.shallow_seq_length or seq_length, seq_length, train.max_tiles_per_pack)


def fp8_parts(train: TrainSettings, precision: Precision) -> list[str]:
    """Value of --fp8-parts; [] without an FP8 precision."""
    return (train.fp8_parts or []) if precision.fp8 else []


def build_stage(
    args: argparse.Namespace,
    config: TransformerConfig,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> InternVLX:
    """Build one (virtual) pipeline stage of the model that validated arguments describe.

    Adapters are added, and frozen parts are frozen.

    Training and the planner's measurement both use it, so that the model that is timed is the one that trains.
    """
    train, rotary = settings_from(args, TrainSettings), settings_from(args, Rotary)
    vision, lora = settings_from(args, VisionSettings), settings_from(args, LoraSettings)
    batches = settings_from(args, Batches)
    in_fp8 = fp8_parts(train, settings_from(args, Precision))
    stage = InternVLX(
        config,
        model_sizes(args),
        max_sequence_length=rotary.max_position_embeddings,
        rotary_base=rotary.rotary_base,
        rope_scaling_factor=rotary.rope_scaling_factor if rotary.use_rope_scaling else None,
        freeze_vision="vision" in untrained_parts(train, lora),
        vision_recompute=vision.vision_recompute,
        vision_attention=vision.vision_attention,
        vision_fp8="vision" in in_fp8,
        projector_fp8="projectors" in in_fp8,
        budget=static_budget(train, batches.seq_length),
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    add_adapters(stage, lora, seed=batches.seed)
    freeze(stage, frozen_parts(train, lora))
    return stage
