"""The split that is chosen for layers that the stages do not divide: against every split, and through the arguments."""

import argparse
import itertools
import sys

from tests import single  # noqa: F401  # isort: skip  (sets Megatron up)
import numpy as np
import pytest
from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_internvlx import arguments
from megatron_internvlx.config import settings_from
from megatron_internvlx.megatron_settings import Parallelism
from megatron_internvlx.planning import dryrun
from megatron_internvlx.planning.costs import Cost, LayerCosts
from megatron_internvlx.planning.memory import Layout
from megatron_internvlx.planning.search import evaluate, find_plan
from megatron_internvlx.planning.simulate import Schedule
from megatron_internvlx.planning.split import even_work

TINY = [
    *("--model-preset", "internvlx_tiny", "--dry-run", "--seq-length", "256"),
    *("--lr", "1e-4", "--train-iters", "10"),
]


def model(works: list[float], first: float, last: float) -> LayerCosts:
    layers = tuple(Cost(work / 3, work * 2 / 3) for work in works)
    return LayerCosts(
        layers, Cost(first / 3, first * 2 / 3), Cost(last / 3, last * 2 / 3), (Cost(0, 0),) * (len(works) + 1)
    )


def loads(costs: LayerCosts, counts: tuple[int, ...]) -> list[float]:
    ends = list(itertools.accumulate(counts))
    found = [
        sum(c.forward + c.backward for c in costs.layers[end - count : end])
        for end, count in zip(ends, counts, strict=True)
    ]
    found[0] += costs.first.forward + costs.first.backward
    found[-1] += costs.last.forward + costs.last.backward
    return found


def every_split(layers: int, stages: int):
    for cuts in itertools.combinations_with_replacement(range(layers + 1), stages - 1):
        ends = (0, *cuts, layers)
        yield tuple(b - a for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("layers", "stages"), [(3, 2), (7, 3), (5, 4), (2, 3), (1, 2)])
def test_no_split_spreads_the_work_better(layers: int, stages: int, seed: int) -> None:
    rng = np.random.default_rng([layers, stages, seed])
    costs = model(list(rng.uniform(0.5, 3, layers)), float(rng.uniform(0, 6)), float(rng.uniform(0, 3)))
    chosen = even_work(costs, stages)
    assert sum(chosen) == layers
    assert len(chosen) == stages

    def quality(counts: tuple[int, ...]) -> tuple[float, float]:
        work = loads(costs, counts)
        return round(max(work), 5), round(sum(x * x for x in work), 4)

    assert quality(chosen) == min(map(quality, every_split(layers, stages)))


def test_equal_splits_have_one_order() -> None:
    """Fewer layers in front, where the vision encoder is; on every machine, however small the costs."""
    for scale in (1.0, 1e-13, 1e9):
        assert even_work(model([scale] * 7, 0, 0), 3) == (2, 2, 3)
        assert even_work(model([scale] * 3, scale, 0), 2) == (1, 2)
        assert even_work(model([scale] * 3, 2 * scale, 0), 2) == (0, 3)
        assert even_work(model([scale] * 3, 0, 2 * scale), 2) == (2, 1)
        assert even_work(model([scale] * 8, 9 * scale, 0), 5) == (0, 2, 2, 2, 2)


def test_close_to_the_fastest_in_the_simulation() -> None:
    costs = model([1.0] * 6 + [2.5] * 17, 7, 3)
    schedule = Schedule(4, 1, 16)
    chosen, fastest = evaluate(costs, schedule, even_work(costs, 4)), find_plan(costs, schedule)
    assert chosen.seconds <= 1.03 * fastest.seconds


# ----------------------------------------------------------------------------------- in the arguments


def parsed(
    monkeypatch: pytest.MonkeyPatch, ranks: int, *flags: str, made_with: str | None = None
) -> argparse.Namespace:
    """All of `arguments.parse` but Megatron's global variables, which a process can set only once."""
    monkeypatch.setattr(sys, "argv", ["pretrain_vlm.py", *TINY, *flags])
    monkeypatch.setattr(arguments, "set_global_variables", lambda args: None)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    return arguments.parse(made_with=lambda args: made_with)


SEVEN = ["--num-layers", "7", "--pipeline-model-parallel-size", "2", "--expand-layer", "3"]


def counts(args: argparse.Namespace) -> tuple[int, ...]:
    return Layout.from_config(
        settings_from(args, Parallelism), core_transformer_config_from_args(args)
    ).counts


def test_layers_that_do_not_divide_are_split(monkeypatch, capsys) -> None:
    args = parsed(monkeypatch, 2, *SEVEN, "--global-batch-size", "4")
    found = counts(args)
    assert sum(found) == 7
    assert min(found) >= 1
    assert f"7 layers do not divide over 2 pipeline stages: split by work into {found[0]} + {found[1]}" in (
        capsys.readouterr().out
    )
    assert dryrun.check(args).model.layout.counts == found
    monkeypatch.setenv("RANK", "1")
    assert counts(parsed(monkeypatch, 2, *SEVEN, "--global-batch-size", "4")) == found
    assert "split" not in capsys.readouterr().out


def test_a_resumed_run_has_the_same_split(monkeypatch) -> None:
    """With other batches, more GPUs and another learning rate."""
    first = parsed(monkeypatch, 2, *SEVEN, "--global-batch-size", "4")
    more = ["--global-batch-size", "64", "--lr", "1e-5", "--train-iters", "9", "--gpu-memory-gib", "70"]
    assert counts(parsed(monkeypatch, 16, *SEVEN, *more)) == counts(first)


LARGE = ["--model-preset", "internvlx_8b", "--pipeline-model-parallel-size", "3", "--seq-length", "4096"]


def test_settings_that_a_resumed_run_may_change_leave_the_split(monkeypatch) -> None:
    """Each of them that counted would move layers from stage to stage here."""
    batch = ["--global-batch-size", "24"]
    first = counts(parsed(monkeypatch, 3, *LARGE, *batch))
    for change in (
        ["--vision-recompute"],
        ["--freeze-llm"],
        ["--freeze-vision"],
        ["--freeze-projectors", "--freeze-vision"],
        ["--micro-batch-size", "4"],
        ["--max-tiles", "1"],
        ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
        ["--max-tiles-per-pack", "3"],
    ):
        assert counts(parsed(monkeypatch, 3, *LARGE, *batch, *change)) == first, change


def test_the_checkpoints_split_is_kept(monkeypatch, capsys) -> None:
    def chosen(made_with: str | None, *more: str) -> str:
        return parsed(
            monkeypatch, 2, *SEVEN, "--global-batch-size", "4", *more, made_with=made_with
        ).pipeline_model_parallel_layout

    own = chosen(None)
    assert chosen("Ettttt|ttL") == "Ettttt|ttL" != own
    assert "split as in the checkpoint to resume from into 5 + 2" in capsys.readouterr().out
    for other in ("Et|ttttttt|L", "Ettttt|tL"):  # another number of stages, or of layers
        assert chosen(other) == own
    four = "Ett|t|tt|ttL"
    assert chosen(four, "--num-virtual-stages-per-pipeline-rank", "2") == four
    # A layout that is said counts, and so does a number of layers that divides.
    assert chosen("Ettttt|ttL", "--pipeline-model-parallel-layout", "Et|ttttttL") == "Et|ttttttL"
    assert chosen("Ettttt|ttL", "--num-layers", "6") is None


def test_virtual_stages(monkeypatch) -> None:
    virtual = ["--num-virtual-stages-per-pipeline-rank", "2", "--global-batch-size", "4"]
    args = parsed(monkeypatch, 2, *SEVEN, *virtual)
    assert args.virtual_pipeline_model_parallel_size == 2
    assert len(counts(args)) == 4
    assert sum(counts(args)) == 7
    with pytest.raises(ValueError, match="give --num-virtual-stages-per-pipeline-rank, for which a split"):
        parsed(monkeypatch, 2, *SEVEN, "--num-layers-per-virtual-pipeline-stage", "2")


def test_what_was_said_is_kept(monkeypatch, capsys) -> None:
    batch = ["--global-batch-size", "4"]
    assert counts(parsed(monkeypatch, 2, *SEVEN, *batch, "--pipeline-model-parallel-layout", "Et*5|ttL")) == (
        5,
        2,
    )
    assert counts(parsed(monkeypatch, 2, *SEVEN, *batch, "--decoder-first-pipeline-num-layers", "1")) == (
        1,
        6,
    )
    even = [*SEVEN, *batch, "--num-layers", "6"]
    assert parsed(monkeypatch, 2, *even).pipeline_model_parallel_layout is None
    assert "split" not in capsys.readouterr().out
