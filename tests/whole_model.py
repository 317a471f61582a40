"""The whole model in this process: one pipeline stage, plain tensors in, for tests of its numbers."""

from collections.abc import Sequence

from tests.single import decoder_config, single  # isort: skip  (sets Megatron up)
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_internvlx.data.plan import PlanSettings, SequencePlan, build_plan
from megatron_internvlx.model.internvit_config import InternViTConfig
from megatron_internvlx.model.internvlx import InternVLX
from megatron_internvlx.model.sizes import ModelSizes
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
    grids = {"high_grid": vit.patches_per_side // 2, **compression}
    grids.setdefault("low_grid", grids["high_grid"])
    config = decoder_config(**fields)
    sizes = ModelSizes(
        config.num_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_query_groups,
        config.kv_channels,
        config.ffn_hidden_size,
        vocab=vocab_size,
        padded_vocab=vocab_size,
        vision=vit,
        tied=share_embeddings_and_output_weights,
        **grids,
    )
    return InternVLX(config, sizes, max_sequence_length=4096, rotary_base=rotary_base)


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
    sizes = model.sizes
    settings = PlanSettings(sizes.low_grid, sizes.high_grid, sizes.lvtc, **more)
    return build_plan(ids, labels, visual, settings)
