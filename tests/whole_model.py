"""The whole model in this process: one pipeline stage, plain tensors in, for tests of its numbers."""

from collections.abc import Sequence

from tests.single import decoder_config, single  # isort: skip  (sets Megatron up)
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_internvlx.data.plan import PlanSettings, SequencePlan, build_plan
from megatron_internvlx.model.decoder import CompressionPlan
from megatron_internvlx.model.internvit_config import InternViTConfig
from megatron_internvlx.model.internvlx import InternVLX
from megatron_internvlx.parallel.batch import MicroBatch
from megatron_internvlx.parallel.device_plan import device_plan


def whole_model(
    vit: InternViTConfig,
    *,
    vocab_size: int,
    rotary_base: float,
    compression: dict,
    share_embeddings_and_output_weights: bool = False,
    **decoder: object,
) -> InternVLX:
    """A Llama-like InternVL-X; `compression` and `decoder` change fields of the two configs."""
    single()
    fields = {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        **decoder,
    }
    plan = {
        "projector": "pvtc",
        "pixel_shuffle_version": "v2",
        "drop_path": 0.0,
        "injection_layers": (),
        "upsample": "bilinear",
        "patches": vit.patches_per_side,
        "vision_hidden_size": vit.hidden_size,
        "high_grid": vit.patches_per_side // 2,
        **compression,
    }
    plan.setdefault("low_grid", plan["high_grid"])
    return InternVLX(
        decoder_config(**fields),
        vit,
        CompressionPlan(**plan),
        vocab_size=vocab_size,
        real_vocab_size=vocab_size,
        max_sequence_length=4096,
        rotary_base=rotary_base,
        share_embeddings_and_output_weights=share_embeddings_and_output_weights,
    )


def micro_batch(plan: SequencePlan, tiles: Tensor) -> MicroBatch:
    """The plan and its tiles (floats, normalized), blank ones added up to the plan's capacity."""
    blank = tiles.new_zeros((plan.tile_capacity - len(tiles), *tiles.shape[1:]))
    return MicroBatch(device_plan(plan), torch.cat([tiles, blank]))


def plan_for(
    model: InternVLX,
    ids: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    visual: Sequence[np.ndarray],
    **more,
) -> SequencePlan:
    """The plan of samples given in the deep layout, for this model's grids."""
    compression = model.compression
    settings = PlanSettings(compression.low_grid, compression.high_grid, compression.lvtc, **more)
    return build_plan(ids, labels, visual, settings)
