"""The measured model: one layer of each kind, on the fullest micro-batch."""

import sys

from tests.single import single  # noqa: F401  isort: skip  (sets Megatron up)
import pytest
from megatron.training.arguments import parse_args

from megatron_internvlx.arguments import add_our_arguments
from megatron_internvlx.data.plan import PlanSettings
from megatron_internvlx.model.sizes import model_sizes
from megatron_internvlx.planning.flops import PlanStats
from megatron_internvlx.planning.measure import layer_kinds, reduce_to_kinds, synthetic_batch

STATS = PlanStats(2, 2, 2, 40, 40**2, 64, 64**2, 20)
STATIC = {"shallow_length": 40, "deep_length": 64, "tile_budget": 2, "sample_budget": 1}


@pytest.mark.parametrize(
    ("static", "output_rows"),
    [({}, 20), ({}, 32), (STATIC, 40), (STATIC | {"supervised_budget": 12}, 12)],
)
def test_only_text_is_supervised(static: dict, output_rows: int) -> None:
    """2 tiles of 16 deep rows and 32 rows of text; static boundaries have more rows at the output layer."""
    stats = PlanStats(*list(vars(STATS).values())[:-1], output_rows)
    settings = PlanSettings(low_grid=2, high_grid=4, **static)
    batch = synthetic_batch(stats, settings, image_size=8)
    plan = batch.plan.host
    assert (plan.num_tiles, plan.deep.length) == (2, 64)
    assert len(plan.loss_rows) == min(output_rows, 32)
    assert PlanStats.of(plan, padded=True).output_rows == output_rows


def test_one_layer_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ["--num-layers", "8", "--expand-layer", "3", "--inject-layers", "5", "6"]
    again = [
        "--recompute-granularity",
        "full",
        "--recompute-method",
        "uniform",
        "--recompute-num-layers",
        "1",
    ]
    parallel = ["--pipeline-model-parallel-size", "4", "--global-batch-size", "16"]
    monkeypatch.setattr(
        sys, "argv", ["plan_pipeline.py", "--model-preset", "internvlx_tiny", *layers, *again, *parallel]
    )
    args = parse_args(add_our_arguments)
    given = dict(vars(args))
    kinds = layer_kinds(model_sizes(args))
    assert kinds == ["shallow", "expand", "deep", "inject"]
    reduced = reduce_to_kinds(args, kinds)
    assert model_sizes(reduced).injection_layers == (1, 3)
    assert (reduced.num_layers, reduced.pipeline_model_parallel_size, reduced.global_batch_size) == (4, 1, 1)
    assert reduced.recompute_granularity is None
    assert vars(args) == given
    with pytest.raises(ValueError, match="no expansion to measure"):
        reduce_to_kinds(args, ["expand", "deep"])
