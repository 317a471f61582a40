"""Megatron's unmodified training loop on CPU ranks: every layout, exact resume, exact recompute, quiet."""

from pathlib import Path
from typing import Any

import pytest

from tests import toy_gpt
from tests.distributed import Pool
from tests.toy_gpt import NO_DROPOUT, RESHARDABLE

START = 2  # the checkpoint that all layouts load holds this many iterations
END = 5
FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE_RECOMPUTE = "--recompute-granularity selective --recompute-modules core_attn"
WEIGHTS_ONLY = ["--finetune", "--no-load-optim", "--no-load-rng"]
EXPERTS = ["--num-experts", "4", "--moe-router-topk", "2", "--moe-token-dispatcher-type", "alltoall"]


def _train(pool: Pool, ranks: int, *arguments: Any) -> list[dict[str, Any]]:
    """Results of every rank; an argument may be a string of several."""
    return pool.run(
        ranks, toy_gpt.train, [word for part in arguments for word in str(part).split()], timeout=60
    )


def _start(pool: Pool, folder: Path, *arguments: Any) -> list[dict[str, Any]]:
    return _train(
        pool, 1, *NO_DROPOUT, *RESHARDABLE, "--train-iters", START, "--save-interval", 1, "--save", folder,
        *arguments,
    )  # fmt: skip


def _go_on(pool: Pool, ranks: int, folder: Path, *arguments: Any) -> list[dict[str, Any]]:
    return _train(pool, ranks, *NO_DROPOUT, *RESHARDABLE, "--train-iters", END, "--load", folder, *arguments)


@pytest.fixture(scope="module")
def checkpoint(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    _start(pool, folder)
    return folder


@pytest.fixture(scope="module")
def reference(pool: Pool, checkpoint: Path) -> dict[int, float]:
    """Losses of one rank that goes on from the checkpoint."""
    (result,) = _go_on(pool, 1, checkpoint)
    assert sorted(result["losses"]) == list(range(START + 1, END + 1))
    return result["losses"]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(2, "--tensor-model-parallel-size 2", id="tp2"),
        pytest.param(2, "--tensor-model-parallel-size 2 --sequence-parallel", id="tp2-sp"),
        pytest.param(2, "--pipeline-model-parallel-size 2", id="pp2"),
        pytest.param(
            2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1", id="pp2-vpp2"
        ),
        pytest.param(2, "--overlap-grad-reduce --overlap-param-gather", id="dp2-overlap"),
        pytest.param(
            4,
            "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
            + FULL_RECOMPUTE,
            id="tp2-sp-pp2-recompute",
        ),
    ],
)
def test_layout_gives_the_losses_of_one_rank(
    pool: Pool, checkpoint: Path, reference: dict[int, float], ranks: int, layout: str
) -> None:
    """Loading also reshards weights and optimizer state from one rank to the layout."""
    results = _go_on(pool, ranks, checkpoint, layout)
    # Measured: 4e-7 at most. Adam's step count taken wrongly from the checkpoint changes them by 1e-3.
    assert results[-1]["losses"] == pytest.approx(reference, rel=1e-5)
    assert len({tuple(result["norms"].items()) for result in results}) == 1


def test_experts_in_parallel_give_the_losses_of_one_rank(pool: Pool, tmp_path: Path) -> None:
    """Weights only: Megatron cannot load one optimizer's state into two, one of them for experts."""
    _start(pool, tmp_path, *EXPERTS)
    (alone,) = _go_on(pool, 1, tmp_path, *EXPERTS, *WEIGHTS_ONLY)
    results = _go_on(pool, 2, tmp_path, *EXPERTS, *WEIGHTS_ONLY, "--expert-model-parallel-size 2")
    assert results[-1]["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def test_bf16_follows_fp32(pool: Pool, checkpoint: Path) -> None:
    (result,) = _go_on(pool, 1, checkpoint, *WEIGHTS_ONLY, "--bf16")
    (exact,) = _go_on(pool, 1, checkpoint, *WEIGHTS_ONLY)
    assert result["losses"] == pytest.approx(exact["losses"], rel=1e-2)
    assert result["losses"] != exact["losses"]


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        pytest.param(1, "", id="plain"),
        pytest.param(2, "--tensor-model-parallel-size 2 --bf16", id="tp2-bf16"),
        pytest.param(
            2,
            "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
            id="dp2-distributed",
        ),
    ],
)
def test_resume_is_exact_with_dropout(pool: Pool, tmp_path: Path, ranks: int, arguments: str) -> None:
    unbroken = _train(pool, ranks, arguments, "--train-iters 4 --save-interval 2 --save", tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = _train(pool, ranks, arguments, "--train-iters 4 --load", tmp_path)
    for part in ("losses", "norms"):
        assert resumed[-1][part] == {iteration: unbroken[-1][part][iteration] for iteration in (3, 4)}
    assert resumed[0]["random"] == unbroken[0]["random"]


def test_recompute_is_exact_with_dropout(pool: Pool) -> None:
    """Tensor parallel: dropout draws from the tracker inside attention, from the default state outside."""
    layout = "--tensor-model-parallel-size 2 --train-iters 2 "
    plain = _train(pool, 2, layout)
    for recompute in (FULL_RECOMPUTE, SELECTIVE_RECOMPUTE):
        again = _train(pool, 2, layout, recompute)
        assert again == plain
    # Outside attention both ranks of the group must have drawn the same masks, though one opened no loader.
    assert plain[0]["random"] == plain[1]["random"]
    without = _train(pool, 2, layout, *NO_DROPOUT)
    assert without[0]["losses"] != plain[0]["losses"]


def test_log_record_averages_and_tensorboard_is_written(
    pool: Pool, checkpoint: Path, reference: dict[int, float], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    layout = "--pipeline-model-parallel-size 2 --log-interval 2 --tensorboard-dir"
    results = _go_on(pool, 2, checkpoint, layout, tmp_path, "--eval-interval 5")
    assert results[0]["losses"] == {}
    # Megatron logs its first iteration too, and averages from there on.
    assert results[1]["losses"][3] == pytest.approx(reference[3], rel=1e-5)
    assert results[1]["losses"][4] == pytest.approx((reference[3] + reference[4]) / 2, rel=1e-5)
    assert results[1]["evaluations"]["iteration 5"]["lm loss"] > 0
    assert results[0]["evaluations"]["iteration 5"] == {}
    events = EventAccumulator(str(tmp_path)).Reload()
    written = {event.step: event.value for event in events.Scalars("lm loss")}
    assert written == pytest.approx(reference, rel=1e-5)
    assert "lm loss validation" in events.Tags()["scalars"]


def test_output_is_one_line_per_step(pool: Pool, tmp_path: Path) -> None:
    _train(pool, 2, "--pipeline-model-parallel-size 2 --train-iters 2 --save-interval 2 --save", tmp_path)
    first, last = ([line for line in output.splitlines() if line.strip()] for output in pool.outputs)
    steps = [line for line in last if line.startswith("iteration ")]
    assert len(steps) == 2
    # What a later version of Megatron adds shows up here.
    assert len(last) == len(steps), last
    assert len(first) <= 3, first
