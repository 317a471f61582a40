"""Kills at random moments, a broken checkpoint, a full disk, a crash loop, a signal, a hung rank.

Each ends with the weights and optimizer state of the unbroken run, bit for bit. Kills and broken checkpoints with
what the recipes use: packs of the energon loader on data-parallel ranks, distributed optimizer. 20 kills under
torchrun: benchmarks/kills.py.
"""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_internvlx import exit_codes, files
from megatron_internvlx.config import DataSettings
from megatron_internvlx.data.prepare import PrepareSettings, prepare
from megatron_internvlx.lifecycle import resume
from megatron_internvlx.megatron_settings import CheckpointFiles
from testing.checkpoints import differing
from tests import entry
from tests.distributed import RankError
from tools import make_demo_data

STEPS, EVERY = 8, 2


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    assert make_demo_data.main(["--out", str(folder), "--train", "48", "--val", "4"]) == 0
    return folder


Launch = Callable[..., list[dict]]


@pytest.fixture(scope="module")
def launch(pool, demo) -> Iterator[Launch]:
    """Runs training on two ranks in a directory; returns each rank's result."""

    def go(save: Path, *more: str, timeout: float = 100.0) -> list[dict]:
        arguments = [
            *("--recipe", "examples/demo/demo.yaml", "--loader-workers", "0", "--log-interval", "1"),
            *("--data", str(demo / "meta.json"), "--tokenizer-model", str(demo / "tokenizer")),
            *("--train-iters", str(STEPS), "--lr-decay-iters", str(STEPS)),
            *("--micro-batch-size", "1", "--global-batch-size", "4", "--max-tiles", "2"),
            *("--save", str(save), "--save-interval", str(EVERY), "--auto-resume", *more),
        ]
        return pool.run(2, entry.run, arguments, timeout=timeout)

    yield go
    pool._discard(2)  # these ranks have the stop signals blocked


@pytest.fixture(scope="module")
def launch_packed(launch, demo) -> Launch:
    """The same with what the recipes use."""
    prepare(demo / "meta.json", demo / "prepared", PrepareSettings())
    more = [
        *("--pipeline-model-parallel-size", "1", "--use-distributed-optimizer"),
        *("--loader", "energon", "--data", str(demo / "prepared"), "--packing"),
        *("--max-tiles-per-pack", "6", "--pack-buffer", "12", "--shuffle-buffer", "4"),
    ]
    return lambda save, *rest, **options: launch(save, *more, *rest, **options)


class Unbroken(NamedTuple):
    """A run that nothing disturbed."""

    save: Path
    losses: dict[int, float]
    seconds: float  # from the start of training to its end


def undisturbed(launch: Launch, save: Path) -> Unbroken:
    results = launch(save)
    state = resume.RunState.read(save)
    assert state.status == "finished"
    assert "no --valid-data: this run is not validated" in results[0]["out"]  # whatever the recipe says
    return Unbroken(save, results[-1]["losses"], state.updated - state.history[-1]["time"])


@pytest.fixture(scope="module")
def unbroken(launch, tmp_path_factory) -> Unbroken:
    return undisturbed(launch, tmp_path_factory.mktemp("unbroken"))


@pytest.fixture(scope="module")
def unbroken_packed(launch_packed, tmp_path_factory) -> Unbroken:
    return undisturbed(launch_packed, tmp_path_factory.mktemp("unbroken"))


def check(save: Path, unbroken: Unbroken) -> None:
    final = files.checkpoint_directory(save, STEPS)
    assert resume.fault(final) is None
    assert differing(final, files.checkpoint_directory(unbroken.save, STEPS)) == []


def kill(pool, ranks: list[int]) -> None:
    for rank in ranks:
        worker = pool._workers[rank]
        if worker is not None and worker.process.is_alive():
            os.kill(worker.process.pid, signal.SIGKILL)


def strike(pool, save: Path, delay: float, *, in_save: bool, victims: list[int]) -> threading.Thread:
    """Kill `victims` this long after training starts, or after the next checkpoint begins to be written."""
    starts, found = len(resume.RunState.read(save).history), set(files.iterations(save))

    def due() -> bool:
        if in_save:
            return bool(set(files.iterations(save)) - found)
        return len(resume.RunState.read(save).history) > starts

    def act() -> None:
        end = time.monotonic() + 60
        while not due() and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(delay)
        kill(pool, victims)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def resume_after_kills(pool, launch: Launch, unbroken: Unbroken, save: Path, kills: int) -> None:
    """Kill a run at random moments, every second one inside a save; it must end as the unbroken run."""
    rng = random.Random(7)
    newest = -1
    for number in range(kills):
        in_save = number % 2 == 1
        # None is so late that the run could have ended.
        delay = rng.uniform(0, 0.05 if in_save else 0.15 * unbroken.seconds)
        victims = [[0], [1], [0, 1]][rng.randrange(3)]
        thread = strike(pool, save, delay, in_save=in_save, victims=victims)
        with pytest.raises(RankError):
            launch(save, "--max-tries", "20")
        thread.join(60)
        before, newest = newest, resume.newest_complete(save)[0] or -1
        assert newest >= before  # no checkpoint is lost
    results = launch(save, "--max-tries", "20")
    assert len(resume.RunState.read(save).history) == kills + 1
    losses = results[-1]["losses"]
    assert losses and losses == {step: unbroken.losses[step] for step in losses}
    check(save, unbroken)


@pytest.mark.slow
def test_killed_at_random_moments(pool, launch_packed, unbroken_packed, tmp_path):
    resume_after_kills(pool, launch_packed, unbroken_packed, tmp_path, kills=4)


@pytest.mark.slow
def test_killed_while_ranks_cut_their_tiles(pool, launch_packed, tmp_path):
    """Packs taken ahead of training, and those inside the DALI pipelines, are trained on once each."""
    decoding = ("--image-decoder", "dali", "--decode-at", "rank", "--loader-workers", "1")

    def launch(save: Path, *more: str) -> list[dict]:
        return launch_packed(save, *decoding, *more)

    unbroken = undisturbed(launch, tmp_path / "unbroken")
    resume_after_kills(pool, launch, unbroken, tmp_path / "killed", kills=2)
    pool._discard(2)  # these ranks have the stop signals blocked


def test_checkpoints_that_are_not_whole_are_skipped(launch_packed, unbroken_packed, tmp_path):
    """The newest lacks half a file, the one before a rank's place in the data."""
    launch_packed(tmp_path, "--exit-interval", str(EVERY * 3))
    assert files.iterations(tmp_path)[0] == EVERY * 3
    largest = max(
        files.checkpoint_directory(tmp_path, EVERY * 3).glob("*.distcp"), key=lambda p: p.stat().st_size
    )
    os.truncate(largest, largest.stat().st_size // 2)
    places = sorted((tmp_path / "loader" / f"iter_{EVERY * 2:07d}").rglob("*.pt"))
    assert len(places) == 2
    places[1].unlink()
    (tmp_path / files.TRACKER).write_text("")  # as if killed while writing it
    results = launch_packed(tmp_path)
    said = results[0]["out"]
    assert said.count("skipped") == 2 and largest.name in said
    assert "position of rank 1 of 2 is not in" in said
    assert sorted(results[-1]["losses"])[0] == EVERY + 1
    check(tmp_path, unbroken_packed)


def test_weights_are_not_thrown_away_with_the_place_in_the_data(launch_packed, unbroken_packed, tmp_path):
    shutil.copytree(unbroken_packed.save, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "loader")
    results = launch_packed(tmp_path)
    assert [r["code"] for r in results] == [resume.STOP] * 2
    assert "--restart-data" in results[0]["err"]
    assert files.iterations(tmp_path) == files.iterations(unbroken_packed.save)
    assert resume.verdict(tmp_path, 0, 3)[0] == resume.STOP


def test_a_place_of_other_settings_is_a_mistake_told_once(launch_packed, unbroken_packed, tmp_path):
    shutil.copytree(unbroken_packed.save, tmp_path, dirs_exist_ok=True)
    results = launch_packed(tmp_path, "--pack-buffer", "13")
    assert [r["code"] for r in results] == [exit_codes.MISTAKE] * 2
    for result in results:
        assert (
            "pack_buffer: 12 -> 13. Use the same, or start the data again with --restart-data"
            in result["err"]
        )
        assert "Traceback" not in result["out"] + result["err"]
    assert files.iterations(tmp_path) == files.iterations(unbroken_packed.save)
    assert "pack_buffer" in resume.RunState.read(tmp_path).reason


def test_a_place_in_the_data_is_wanted_of_the_loader_that_has_one(unbroken, unbroken_packed, tmp_path):
    from megatron_internvlx.training.loader_state import position_fault  # imports Energon

    def found(save: Path) -> str | None:
        weights = CheckpointFiles(
            save=str(save), load=None, pretrained_checkpoint=None, ckpt_step=None, finetune=False
        )
        return position_fault(weights, DataSettings(), STEPS)

    assert found(unbroken.save) is None  # the simple loader counts samples
    assert found(unbroken_packed.save) is None
    shutil.copytree(unbroken_packed.save, tmp_path, dirs_exist_ok=True)
    place = sorted((tmp_path / "loader" / f"iter_{STEPS:07d}").rglob("*.pt"))[1]
    os.truncate(place, place.stat().st_size - 1)
    assert "is cut off" in (found(tmp_path) or "")


def test_a_run_without_progress_gives_up(launch, unbroken, tmp_path):
    state = resume.RunState(status="running", tries=3)
    state.write(tmp_path)
    results = launch(tmp_path)
    assert [r["code"] for r in results] == [resume.STOP] * 2
    assert "giving up" in results[0]["err"]
    assert resume.verdict(tmp_path, 0, 3)[0] == resume.STOP


@pytest.mark.parametrize(
    ("number", "code", "verdict", "said"),
    [
        (signal.SIGUSR1, 0, resume.AGAIN, "stopped by a signal, after a checkpoint"),
        (signal.SIGINT, 130, resume.DONE, "stopped by Ctrl-C, the newest checkpoint is"),
    ],
)
def test_signal_saves_and_the_next_start_goes_on(
    pool, launch, unbroken, tmp_path, number, code, verdict, said
):
    def act() -> None:
        while not files.iterations(tmp_path):
            time.sleep(0.01)
        os.kill(pool._workers[1].process.pid, number)

    threading.Thread(target=act, daemon=True).start()
    results = launch(tmp_path, "--exit-signal-handler", "--save-interval", "5")
    assert [r["code"] for r in results] == [code, code]
    assert said in results[0]["out"]
    pool._discard(2)
    assert resume.verdict(tmp_path, 0, 3)[0] == verdict
    reached = files.iterations(tmp_path)[0]
    assert reached < STEPS
    more = launch(tmp_path, "--save-interval", "4")
    assert sorted(results[-1]["losses"]) + sorted(more[-1]["losses"]) == list(range(1, STEPS + 1))
    check(tmp_path, unbroken)


@pytest.mark.parametrize(
    ("number", "code", "status"), [(signal.SIGTERM, 0, "preempted"), (signal.SIGINT, 130, "stopped")]
)
def test_a_signal_to_all_processes_lets_workers_feed_the_step_to_its_end(
    pool, demo, tmp_path, number, code, status
):
    """torchrun signals a rank with its forkserver and workers. The step takes more than they have ready."""
    pool._discard(1)

    def act() -> None:
        while not (tmp_path / files.TRACKER).exists():  # the first step is over
            time.sleep(0.01)
        os.killpg(pool._workers[0].process.pid, number)

    threading.Thread(target=act, daemon=True).start()
    arguments = [
        *("--recipe", "examples/demo/demo.yaml", "--loader-workers", "1", "--log-interval", "1"),
        *("--pipeline-model-parallel-size", "1", "--micro-batch-size", "1", "--global-batch-size", "48"),
        *("--data", str(demo / "meta.json"), "--tokenizer-model", str(demo / "tokenizer")),
        *("--max-tiles", "2", "--train-iters", "4", "--lr-decay-iters", "4", "--exit-signal-handler"),
        *("--save", str(tmp_path), "--save-interval", "1", "--auto-resume"),
    ]
    (result,) = pool.run(1, entry.run_as_started, arguments, timeout=200)
    pool._discard(1)
    assert result["code"] == code
    (last, *_) = files.iterations(tmp_path)
    assert last < 4 and resume.fault(files.checkpoint_directory(tmp_path, last)) is None
    assert sorted(result["losses"]) == list(range(1, last + 1))
    assert resume.RunState.read(tmp_path).status == status


def test_hung_rank_is_noticed(pool, launch, unbroken, tmp_path):
    """A stopped rank makes the other exit after --stall-minutes, naming it, and training goes on."""

    def act() -> None:
        while not files.iterations(tmp_path):
            time.sleep(0.01)
        os.kill(pool._workers[0].process.pid, signal.SIGSTOP)

    threading.Thread(target=act, daemon=True).start()
    with pytest.raises(RankError, match="rank 1: died with exit code 1"):
        launch(tmp_path, "--exit-signal-handler", "--stall-minutes", "0.2")
    said = pool.outputs[1]
    assert "rank 1 waited 12 s for a step" in said and "most recent call first" in said
    state = resume.RunState.read(tmp_path)
    assert state.status == "failed"
    assert re.search(rf"rank 0 on {socket.gethostname()} \(pid \d+\) has written no heartbeat", state.reason)
    assert state.reason.splitlines()[0] in said
    launch(tmp_path)
    check(tmp_path, unbroken)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, which a test can fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip("a file system of limited size needs the right to mount one")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def nearly_full(launch, small_disk):
    """A run stopped after one checkpoint, and room for half of another."""
    launch(small_disk, "--exit-interval", str(EVERY))
    first = files.checkpoint_directory(small_disk, EVERY)
    size = sum(path.stat().st_size for path in first.iterdir())
    free = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - size // 2))
    return small_disk


def test_without_room_training_goes_on_and_has_not_finished(launch, nearly_full, unbroken):
    results = launch(nearly_full)
    assert [r["code"] for r in results] == [74, 74]
    assert results[0]["err"].count("no checkpoint") == (STEPS - EVERY) // EVERY
    assert sorted(results[-1]["losses"]) == list(range(EVERY + 1, STEPS + 1))
    assert resume.newest_complete(nearly_full) == (EVERY, [])
    state = resume.RunState.read(nearly_full)
    assert (state.status, state.unsaved) == ("failed", STEPS)
    assert f"ended at step {STEPS}, which was not saved" in state.reason
    assert resume.verdict(nearly_full, 0, 3)[0] == resume.STOP
    again = launch(nearly_full)
    assert [r["code"] for r in again] == [resume.STOP] * 2 and again[-1]["losses"] == {}
    (nearly_full / "ballast").unlink()
    assert resume.verdict(nearly_full, 0, 3)[0] == resume.AGAIN
    launch(nearly_full, "--save-interval", str(STEPS))
    check(nearly_full, unbroken)


def test_disk_full_during_a_save_ends_with_a_message(pool, launch, nearly_full, unbroken):
    def act() -> None:
        """An empty directory as the newest checkpoint, so that little room seems enough."""
        while resume.RunState.read(nearly_full).status != "running":
            time.sleep(0.01)
        time.sleep(0.2)
        files.checkpoint_directory(nearly_full, EVERY + 1).mkdir()

    threading.Thread(target=act, daemon=True).start()
    with pytest.raises(RankError, match="code 74"):
        launch(nearly_full)
    said = "".join(pool.outputs)
    state = resume.RunState.read(nearly_full)
    assert "0.00 GB left" in said and "earlier checkpoints are intact" in said
    assert state.status in ("failed", "running")  # the state may find no room either
    assert resume.newest_complete(nearly_full)[0] == EVERY
    (nearly_full / "ballast").unlink()
    launch(nearly_full, "--save-interval", str(STEPS))
    check(nearly_full, unbroken)
