"""Adapters in every layout, and their checkpoints: what is in them, killed and resumed, on which base."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests import entry, layouts  # isort: skip  (sets Megatron up)
from megatron_internvlx import files
from megatron_internvlx.checkpoint.torch_dist import CheckpointReader
from megatron_internvlx.lifecycle.base import base_fingerprint
from megatron_internvlx.model.lora import MARK
from tests.distributed import Pool
from tests.layout_cases import ADAPTER_CASES, Case, Runner, expand, relative
from tests.parallel.test_faults import EVERY, STEPS, check, resume_after_kills, undisturbed
from tools import make_demo_data


@pytest.mark.parametrize("case", ADAPTER_CASES, ids=lambda case: case.name)
def test_one_step(runner: Runner, case: Case) -> None:
    """Loss, gradients of adapters and of parts trained whole, weights after the step; TP ranks agree."""
    assert not runner.difference(case).exceeded()
    kinds = {name.endswith(("lora_a", "lora_b")) for name in runner.reference(case.setting)["grads"]}
    assert kinds == ({True, False} if case.setting in ("adapters", "adapters beside experts") else {True})


def test_a_fingerprint_is_of_no_layout(runner: Runner, tmp_path: Path) -> None:
    """The same weights, saved by one process and by four."""
    found = set()
    for ranks, layout in ((1, ""), (4, "tp=2 pp=2")):
        save = tmp_path / str(ranks)
        kept = f"--lr 0 --min-lr 0 --save {save} --save-interval 1"
        if ranks == 1:
            kept += " --make-vocab-size-divisible-by 2"  # the padding of two tensor-parallel ranks
        job = partial(layouts.train, weights=runner.weights("lvtc"), kind="single")
        runner.pool.run(ranks, job, [*expand(layout), *kept.split()])
        found.add(base_fingerprint(save))
    assert len(found) == 1


Launch = Callable[..., list[dict]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    assert make_demo_data.main(["--out", str(folder), "--train", "48", "--val", "4"]) == 0
    return folder


@pytest.fixture(scope="module")
def launch(pool: Pool, demo: Path) -> Iterator[Launch]:
    """Trains the demo's model on two ranks in a directory; returns each rank's result."""

    def go(save: Path, *more: str, ranks: int = 2, timeout: float = 100.0) -> list[dict]:
        arguments = [
            *("--recipe", "examples/demo/demo.yaml", "--loader-workers", "0", "--log-interval", "1"),
            *("--data", str(demo / "meta.json"), "--tokenizer-model", str(demo / "tokenizer")),
            *("--train-iters", str(STEPS), "--lr-decay-iters", str(STEPS), "--lr-warmup-fraction", "0"),
            *("--micro-batch-size", "1", "--global-batch-size", "2", "--max-tiles", "2", "--freeze-vision"),
            *("--save", str(save), "--save-interval", str(EVERY), *more),
        ]
        return pool.run(ranks, entry.run, arguments, timeout=timeout)

    yield go
    pool._discard(2)  # these ranks have the stop signals blocked


@pytest.fixture(scope="module")
def base(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one step, with optimizer state."""
    folder = tmp_path_factory.mktemp("base")
    assert [r["code"] for r in launch(folder, "--train-iters", "1", "--lr-decay-iters", "1")] == [0, 0]
    return folder


@pytest.fixture(scope="module")
def adapt(launch: Launch, base: Path) -> Launch:
    """Trains adapters with dropout, and the projectors whole, on the base."""
    more = ["--lora-rank", "4", "--lora-dropout", "0.2", "--pretrained-checkpoint", str(base)]
    return lambda save, *rest, **options: launch(save, "--auto-resume", *more, *rest, **options)


def test_killed_and_resumed(
    pool: Pool, launch: Launch, adapt: Launch, base: Path, demo: Path, tmp_path: Path
) -> None:
    """Bit for bit, with what is trained and nothing else in the checkpoint; begun where the base ends."""
    unbroken = undisturbed(adapt, tmp_path / "unbroken")
    start = launch(
        tmp_path / "plain", "--train-iters", "1", "--lora-rank", "4", "--pretrained-checkpoint", str(base)
    )
    plain = launch(
        tmp_path / "frozen", "--train-iters", "1", "--freeze-llm", "--pretrained-checkpoint", str(base)
    )
    assert start[-1]["losses"][1] == plain[-1]["losses"][1]  # without dropout, which the adapters' input has
    resume_after_kills(pool, adapt, unbroken, tmp_path / "killed", kills=2)
    check(tmp_path / "killed", unbroken)

    final = CheckpointReader(files.checkpoint_directory(unbroken.save, STEPS))
    names = {name.removeprefix("optimizer.state.exp_avg.") for name in final.tensors}
    names = {name.removeprefix("optimizer.state.exp_avg_sq.") for name in names}
    whole = {name for name in names if name.startswith("projector.") or ".injection." in name}
    adapters = {name for name in names if MARK in name}
    assert names == whole | adapters and len(whole) == 2 * 27 and len(adapters) == 4 * 4 * 2
    made = final.common()["args"]
    assert (made.lora_base, made.lora_base_fingerprint) == (str(base), base_fingerprint(base))


def test_adapters_move_to_another_layout(adapt: Launch, tmp_path: Path) -> None:
    """Saved on two stages, resumed on two tensor-parallel ranks: the rows of gate and up are halved each."""
    begun = ["--train-iters", "2", "--lora-dropout", "0", "--dist-ckpt-optim-fully-reshardable"]
    assert [r["code"] for r in adapt(tmp_path / "one", *begun)] == [0, 0]
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    longer = [*begun, "--train-iters", "4"]
    here = adapt(tmp_path / "one", *longer)
    split = ["--pipeline-model-parallel-size", "1", "--tensor-model-parallel-size", "2"]
    there = adapt(tmp_path / "two", *longer, *split)
    wanted, found = here[-1]["losses"], there[-1]["losses"]
    assert sorted(wanted) == sorted(found) == [3, 4]
    # Measured: 1e-6.
    assert max(relative(found[step], wanted[step]) for step in found) <= 1e-5


def test_refused_at_the_start(adapt: Launch, launch: Launch, base: Path, tmp_path: Path) -> None:
    """With status 2 and one message, before the model is built."""
    adapters = tmp_path / "adapters"
    assert [r["code"] for r in adapt(adapters, "--train-iters", "2")] == [0, 0]
    other = tmp_path / "other"
    assert [r["code"] for r in launch(other, "--train-iters", "2", "--seed", "5")] == [0, 0]
    alone = ["--pipeline-model-parallel-size", "1"]
    (wrong,) = adapt(adapters, "--pretrained-checkpoint", str(other), *alone, ranks=1)
    assert wrong["code"] == 2
    assert all(base_fingerprint(folder) in wrong["err"] for folder in (base, other))
    (plain,) = launch(adapters, "--auto-resume", *alone, ranks=1)
    assert plain["code"] == 2 and "holds adapters of" in plain["err"]
