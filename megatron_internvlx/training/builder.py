"""Megatron's `model_provider`: builds one stage of the model from parsed arguments."""

from __future__ import annotations

import argparse
from typing import Any

from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_internvlx.model.builder import build_stage
from megatron_internvlx.model.internvlx import InternVLX
from megatron_internvlx.parallel.communicator import BoundaryCommunicator
from megatron_internvlx.training.gradients import WeightSum, finalize_hook


class ModelProvider:
    """Builder of the stage that Megatron asks for.

    Args:
        args: validated arguments; Megatron's namespace.
        communicator: communicator to which every stage is added; needed with more than one pipeline stage.
        weights: sum of the loss weights that the forward step counts, by which gradients are divided; needed for
            training.
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
        """Build one (virtual) pipeline stage, frozen parts included."""
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
