"""Megatron's unmodified training loop on CPU ranks, in every layout, from the same weights."""

from pathlib import Path

import pytest

from tests import toy_gpt
from tests.distributed import Pool

START = 2  # the checkpoint that all layouts load holds this many iterations
END = 5


@pytest.fixture(scope="module")
def checkpoint(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    pool.run(1, toy_gpt.train, ["--train-iters", str(START), "--save", str(folder), "--save-interval", "1"])
    return folder


@pytest.fixture(scope="module")
def reference(pool: Pool, checkpoint: Path) -> dict[int, float]:
    """Losses of one rank that goes on from the checkpoint."""
    (result,) = pool.run(1, toy_gpt.train, ["--load", str(checkpoint), "--train-iters", str(END)])
    assert sorted(result["losses"]) == list(range(START + 1, END + 1))
    assert result["losses"][END] < result["losses"][START + 1]
    return result["losses"]


def _close(found: dict[int, float], expected: dict[int, float], relative: float) -> None:
    assert found == pytest.approx(expected, rel=relative)


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
            1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", id="full"
        ),
        pytest.param(
            4,
            "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
            "--recompute-granularity selective --recompute-modules core_attn",
            id="tp2-sp-pp2-selective",
        ),
    ],
)
def test_layout_gives_the_losses_of_one_rank(
    pool: Pool, checkpoint: Path, reference: dict[int, float], ranks: int, layout: str
) -> None:
    """Loading also reshards weights and optimizer state from one rank to the layout."""
    results = pool.run(
        ranks, toy_gpt.train, ["--load", str(checkpoint), "--train-iters", str(END), *layout.split()]
    )
    # Measured: 4e-7 at most; another start differs from the first iteration on by more than 1e-2.
    _close(results[-1]["losses"], reference, 1e-5)
    assert len({tuple(result["norms"].items()) for result in results}) == 1


def test_bf16_follows_fp32(pool: Pool, checkpoint: Path, reference: dict[int, float]) -> None:
    weights_only = ["--load", str(checkpoint), "--finetune", "--no-load-optim", "--no-load-rng"]
    (result,) = pool.run(1, toy_gpt.train, [*weights_only, "--bf16", "--train-iters", "2"])
    (exact,) = pool.run(1, toy_gpt.train, [*weights_only, "--train-iters", "2"])
    _close(result["losses"], exact["losses"], 1e-2)
    assert result["losses"] != exact["losses"]
