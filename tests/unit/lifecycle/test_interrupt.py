"""Ctrl-C, in real processes that stand for a rank."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_internvlx.lifecycle.interrupt import newest_checkpoint

RANK = """
import multiprocessing, os, signal, subprocess, sys, threading, time
case = sys.argv[1]
if case == "older thread":  # does not block SIGINT, unlike later ones
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
from megatron_internvlx.lifecycle import interrupt, signals
from megatron_internvlx.lifecycle.interrupt import newest_checkpoint
from pathlib import Path

interrupts = signals.interrupts
signals.block_stop_signals()
interrupts.arm()
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
worker.start()
program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3)"])
if case != "start":
    interrupts.newest = lambda: newest_checkpoint(Path(sys.argv[2]))
    interrupts.last_acts.append(lambda: print("recorded", flush=True))
if case == "hung act":
    interrupt._LAST_ACTS = 1000
    interrupts.last_acts.append(lambda: time.sleep(60))
if case == "step":
    interrupts.can_finish_step = True
print("up", worker.pid, flush=True)
if case == "lets go":
    while not signals.pending():
        time.sleep(0.01)
    signals.unblock_stop_signals()
if case == "step":
    while not interrupts.asked:
        time.sleep(0.01)
    print("asked", flush=True)
if case in ("failing", "older thread"):
    while not interrupts.ending:
        time.sleep(0.001)
    interrupts.yield_to_end()
    raise ConnectionError("a rank has gone")
lock = threading.Lock()
lock.acquire()
lock.acquire()  # as in a collective: no Python code runs in this thread
"""


started: list[int] = []


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    for group in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    started.clear()


class Rank:
    """A process group of its own, as torchrun's ranks are."""

    def __init__(self, folder: Path, case: str, **environment: str) -> None:
        self.error = folder / "err"
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK, case, str(folder)],
            stdout=subprocess.PIPE, stderr=self.error.open("w"), text=True, start_new_session=True,
            env=os.environ | {"RANK": "0"} | environment,
        )  # fmt: skip
        started.append(self.process.pid)
        self.worker = int(self.line().split()[1])

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def send(self, number: int = signal.SIGINT) -> None:
        os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, str]:
        code = self.process.wait(30)
        return code, self.error.read_text()

    def worker_lives(self) -> bool:
        try:
            state = Path(f"/proc/{self.worker}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return False
        return state != "Z"


def checkpoint(save: Path, iteration: int, *, whole: bool = True) -> Path:
    folder = save / f"iter_{iteration:07d}"
    folder.mkdir()
    if whole:
        (folder / "metadata.json").write_text("{}")
    return folder


def test_before_training_begins(tmp_path):
    rank = Rank(tmp_path, "start")
    rank.send()
    assert rank.end() == (130, "pretrain_vlm.py: interrupted: training has not begun\n")
    end = time.monotonic() + 20  # it was killed, and is gone in a moment
    while rank.worker_lives():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("case", ["training", "failing", "older thread"])
def test_in_training_it_names_the_newest_checkpoint_and_nothing_else(tmp_path, case):
    newest = checkpoint(tmp_path, 20)
    rank = Rank(tmp_path, case)
    rank.send()
    assert rank.end() == (130, f"pretrain_vlm.py: interrupted: the newest checkpoint is {newest}\n")
    assert rank.line() == "recorded"


def test_other_ranks_are_silent(tmp_path):
    rank = Rank(tmp_path, "training", RANK="1")
    rank.send()
    assert rank.end() == (130, "")
    assert rank.line() == "recorded"


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_with_a_checkpoint_to_come_the_second_ends_at_once(tmp_path, second):
    rank = Rank(tmp_path, "step")
    rank.send()
    assert rank.line() == "asked"
    assert rank.worker_lives()  # it is needed for the step
    assert rank.process.poll() is None
    rank.send(second)
    code, said = rank.end()
    first, last = said.splitlines()
    assert code == 130
    assert "after this step, with a checkpoint" in first
    assert "there is no checkpoint" in last


def test_a_last_act_that_hangs_is_cut_short(tmp_path):
    rank = Rank(tmp_path, "hung act")
    rank.send()
    assert rank.line() == "recorded"
    assert rank.process.poll() is None
    rank.send()
    assert rank.end()[0] == 130


def test_sigterm_waits_unless_a_rank_has_named_a_mistake(tmp_path):
    place = tmp_path / "attempt_0" / "0" / "error.json"
    place.parent.mkdir(parents=True)
    rank = Rank(tmp_path, "training", TORCHELASTIC_ERROR_FILE=str(place))
    rank.send(signal.SIGTERM)
    time.sleep(0.5)
    assert rank.process.poll() is None
    (tmp_path / "attempt_0" / "reported").touch()
    rank.send(signal.SIGTERM)
    assert rank.end() == (143, "")


def test_a_run_without_checkpoints_on_signals_still_ends_of_one_that_came_early(tmp_path):
    rank = Rank(tmp_path, "lets go")
    rank.send(signal.SIGTERM)
    assert rank.end() == (-signal.SIGTERM, "")


def test_what_is_left(tmp_path):
    assert newest_checkpoint(None) == "without --save there is no checkpoint"
    assert newest_checkpoint(tmp_path) == f"there is no checkpoint in {tmp_path} yet"
    whole = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20, whole=False)
    assert newest_checkpoint(tmp_path) == f"the newest checkpoint is {whole}"
