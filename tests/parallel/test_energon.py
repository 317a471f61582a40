"""Training with the Energon loader: packs, resume bit for bit, and on another number of ranks."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_internvlx.data.prepare import PrepareSettings, prepare
from tests import entry
from tests.distributed import Pool
from tools import make_demo_data

# A tiny buffer and tiny packs: several packs per step, and samples left in every buffer at a checkpoint.
PACKING = [
    *("--packing", "--micro-batch-size", "1", "--seq-length", "400", "--shallow-seq-length", "300"),
    *(
        "--max-tiles-per-pack",
        "20",
        "--pack-buffer",
        "12",
        "--shuffle-buffer",
        "4",
        "--image-decoder",
        "dali",
    ),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    assert make_demo_data.main(["--out", str(folder), "--train", "60", "--val", "4"]) == 0
    broken = next((folder / "images" / "train").glob("000007.*"))
    broken.write_bytes(b"")
    prepare(folder / "meta.json", folder / "prepared", PrepareSettings())
    return folder


def arguments(demo: Path, *more: str) -> list[str]:
    return [
        *("--recipe", "examples/demo/demo.yaml", "--log-interval", "1", "--global-batch-size", "4"),
        *("--loader", "energon", "--data", str(demo / "prepared"), "--eval-iters", "0", *PACKING),
        *("--tokenizer-model", str(demo / "tokenizer"), "--lr-warmup-fraction", "0"),
        *("--train-iters", "6", "--lr-decay-iters", "6", *more),
    ]


def back_to(saved: Path, step: int, copy: Path) -> Path:
    """A copy of a run's directory as it was after `step`."""
    shutil.copytree(saved, copy)
    for later in copy.rglob("iter_*"):
        if later.is_dir() and int(later.name[5:]) > step:
            shutil.rmtree(later)
    (copy / "latest_checkpointed_iteration.txt").write_text(str(step))
    return copy


PLAIN = ["--pipeline-model-parallel-size", "1"]
VIRTUAL = [
    *("--pipeline-model-parallel-size", "2"),
    *("--num-virtual-stages-per-pipeline-rank", "2"),
    *("--boundary", "static", "--max-supervised-tokens-per-pack", "16"),
]


@pytest.mark.parametrize(("layout", "workers"), [(PLAIN, 1), (VIRTUAL, 0)], ids=["dp2", "pp2-virtual"])
def test_resume_gives_the_same_losses_bit_for_bit(
    pool: Pool, demo: Path, tmp_path: Path, layout: list[str], workers: int
) -> None:
    more = [*layout, "--loader-workers", str(workers)]
    saved = tmp_path / "saved"
    unbroken = pool.run(2, entry.run, arguments(demo, *more, "--save", str(saved), "--save-interval", "2"))
    assert [r["code"] for r in unbroken] == [0, 0]
    losses = unbroken[-1]["losses"]
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    resumed = pool.run(
        2, entry.run, arguments(demo, *more, "--load", str(back_to(saved, 2, tmp_path / "two")))
    )
    assert resumed[-1]["losses"] == {step: losses[step] for step in (3, 4, 5, 6)}
    rejects = [json.loads(line) for file in saved.glob("rejects*") for line in file.read_text().splitlines()]
    assert {row["key"] for row in rejects} <= {"train.jsonl:8"}
    if workers:
        alone = pool.run(1, entry.run, arguments(demo, *more, "--load", str(tmp_path / "two")))
        assert alone[0]["code"] == 0
        assert "resuming from 2 ranks x 1 workers with 1 ranks x 2 workers" in alone[0]["out"]
        assert alone[0]["losses"][3] == pytest.approx(losses[3], rel=1e-5)
    else:
        fresh = [*PLAIN, "--loader-workers", "0", "--load", str(tmp_path / "two"), "--restart-data"]
        other = pool.run(2, entry.run, arguments(demo, *fresh))
        assert "the data start anew" in other[0]["out"]
        assert other[-1]["losses"][3] != losses[3]


@pytest.mark.heavy
def test_ranks_that_cut_their_own_tiles_resume_bit_for_bit(pool: Pool, demo: Path, tmp_path: Path) -> None:
    """A micro-batch is begun ahead of training when a checkpoint is saved or held-out data come, and comes again."""
    more = [
        *("--valid-data", str(demo / "meta_val.json"), "--eval-interval", "2"),
        "--pipeline-model-parallel-size",
        "1",
        "--tensor-model-parallel-size",
        "2",
        "--loader-workers",
        "1",
    ]
    saved, ranks = tmp_path / "saved", [*more, "--decode-at", "rank"]
    unbroken = pool.run(2, entry.run, arguments(demo, *ranks, "--save", str(saved), "--save-interval", "2"))
    assert [r["code"] for r in unbroken] == [0, 0]
    losses = unbroken[-1]["losses"]
    assert " images/s, " in unbroken[-1]["out"] and " packs ready" in unbroken[-1]["out"]
    resumed = pool.run(
        2, entry.run, arguments(demo, *ranks, "--load", str(back_to(saved, 2, tmp_path / "two")))
    )
    assert resumed[-1]["losses"] == {step: losses[step] for step in (3, 4, 5, 6)}
    # The same samples; pixels differ by 0.2 of 255 on average. Other samples change a loss by 0.1 and more.
    (*_, in_workers) = pool.run(2, entry.run, arguments(demo, *more, "--decode-at", "loader"))
    assert in_workers["losses"] == pytest.approx(losses, abs=0.02)
    assert in_workers["losses"] != losses
    # Held-out files travel too, and the micro-batch that was begun before an evaluation comes after it.
    held_out = [[values for _, values in run[-1]["evaluations"]] for run in (unbroken, resumed, [in_workers])]
    assert held_out[0][1:] == held_out[1] and len(held_out[0]) == 3
    for cut, decoded in zip(held_out[0], held_out[2], strict=True):
        assert cut["loss"] == pytest.approx(decoded["loss"], abs=0.02)
        assert cut["loss"] != decoded["loss"]
