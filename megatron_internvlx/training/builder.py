"""From parsed arguments to one stage of the model: Megatron's `model_provider`."""

from __future__ import annotations

import argparse
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_internvlx.arguments import settings_from, vision_config
from megatron_internvlx.config import CompressionSettings, TrainSettings, grid_side
from megatron_internvlx.model.decoder import CompressionPlan
from megatron_internvlx.model.internvlx import InternVLX
from megatron_internvlx.parallel.boundary import Budget
from megatron_internvlx.parallel.communicator import BoundaryCommunicator
from megatron_internvlx.training.gradients import WeightSum, finalize_hook
from megatron_internvlx.training.step import loss_weights


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


def static_budget(args: argparse.Namespace) -> Budget | None:
    """The sizes to which static boundaries pad every micro-batch; None with variable boundaries."""
    train = settings_from(args, TrainSettings)
    if train.boundary != "static":
        return None
    assert train.max_tiles_per_pack is not None
    return Budget(train.shallow_seq_length or args.seq_length, args.seq_length, train.max_tiles_per_pack)


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
        loss_weight=lambda plan: loss_weights(plan, train.loss_weighting, train.loss_average)[1],
        budget=static_budget(args),
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    freeze(stage, train)
    return stage


class ModelProvider:
    """Builds the stage that Megatron asks for.

    Args:
        args: parsed arguments.
        communicator: is told of every stage; needed with more than one pipeline stage.
        weights: the forward step's, by which gradients are divided; needed for training.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        communicator: BoundaryCommunicator | None = None,
        weights: WeightSum | None = None,
    ) -> None:
        self.args, self.communicator, self.weights = args, communicator, weights

    def __call__(
        self, pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None, **_: Any
    ) -> InternVLX:
        """One (virtual) pipeline stage, frozen parts included."""
        config = config or core_transformer_config_from_args(self.args)
        # Makes Megatron ask our communicator for the shape of every message, in both boundary modes.
        # Its validate_args resets the argument; the config is where schedules look.
        config.variable_seq_lengths = config.pipeline_model_parallel_size > 1
        # Injection layers have parameters that others lack: keys of a checkpoint are per layer.
        config.hetereogenous_dist_checkpoint = True
        stage = build_stage(
            self.args,
            config,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
        )
        config.finalize_model_grads_func = finalize_hook(stage.tp_group, self.weights)
        if self.communicator is not None:
            self.communicator.add(stage)
        return stage
