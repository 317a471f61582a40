"""From parsed arguments to one (virtual) pipeline stage of the model."""

from __future__ import annotations

import argparse

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_internvlx.config import TrainSettings, settings_from
from megatron_internvlx.model.internvlx import InternVLX
from megatron_internvlx.model.settings import compression_plan, static_budget, vision_config


def freeze(stage: InternVLX, train: TrainSettings) -> None:
    """Switch off gradients of the parts that are not trained."""
    for name, parameter in stage.named_parameters():
        vision = name.startswith("vision_model.")
        projector = name.startswith("projector.") or ".injection." in name
        if (
            (vision and train.freeze_vision)
            or (projector and train.freeze_projectors)
            or (not vision and not projector and train.freeze_llm)
        ):
            parameter.requires_grad_(False)


def build_stage(
    args: argparse.Namespace,
    config: TransformerConfig,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> InternVLX:
    """One (virtual) pipeline stage of the model that validated arguments describe, frozen parts frozen.

    Training and the planner's measurement both build here: what is timed is what trains.
    """
    train = settings_from(args, TrainSettings)
    stage = InternVLX(
        config,
        vision_config(args),
        compression_plan(args),
        vocab_size=args.padded_vocab_size,
        real_vocab_size=args.vocab_size,
        max_sequence_length=args.max_position_embeddings,
        rotary_base=args.rotary_base,
        rope_scaling_factor=args.rope_scaling_factor if args.use_rope_scaling else None,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        freeze_vision=train.freeze_vision,
        vision_recompute=args.vision_recompute,
        vision_fp8=bool(args.fp8) and "vision" in (args.fp8_parts or ()),
        budget=static_budget(args),
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    freeze(stage, train)
    return stage
