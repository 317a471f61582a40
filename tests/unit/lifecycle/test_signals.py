"""Signals that a rank holds back, in a real process with a real loader worker."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RANK = """
import os, sys
from megatron_internvlx.lifecycle import signals


def delivery(records):
    from collections import Counter
    from megatron_internvlx.data.order import _Delivery

    return _Delivery(os.getpid(), [], 1, 0, (0, 0), Counter())


if __name__ == "__main__":
    signals.block_stop_signals()
    signals.interrupts.arm()
    from multiprocessing.forkserver import _forkserver
    import torch.distributed as dist
    from megatron_internvlx.data.order import _counted, _loader
    from megatron_internvlx.data.rejects import RejectLog

    deliveries = _counted(_loader([0] * 100, ([0] for _ in range(100)), delivery, 1), 1, RejectLog(None, None))
    worker = next(deliveries)
    print(os.getpid(), _forkserver._forkserver_pid, worker, flush=True)
    if sys.argv[1] == "fails":
        raise ConnectionError("another rank has gone")
    # In C, without the interpreter, as in a collective.
    dist.TCPStore("127.0.0.1", 0, is_master=True).get("what no rank ever sets")
"""


class Rank:
    """A process group of its own, as torchrun's ranks are, with a forkserver and one worker."""

    def __init__(self, folder: Path, case: str) -> None:
        script, self.errors = folder / "rank.py", folder / "err"
        script.write_text(RANK)
        self.process = subprocess.Popen(
            [sys.executable, str(script), case], stdout=subprocess.PIPE, stderr=self.errors.open("w"), text=True,
            start_new_session=True, env=os.environ | {"RANK": "0", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert self.process.stdout is not None
        said = self.process.stdout.readline().split()
        assert len(said) == 3, self.errors.read_text()
        self.pid, self.forkserver, self.worker = map(int, said)


@pytest.fixture
def rank(request, tmp_path):
    made = Rank(tmp_path, request.param)
    yield made
    with contextlib.suppress(ProcessLookupError):
        os.killpg(made.pid, signal.SIGKILL)
    made.process.wait(30)


def held(pid: int) -> set[int]:
    """Signals that the main thread of a process blocks."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = int(next(line for line in lines if line.startswith("SigBlk:")).split()[1], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(*pids: int) -> bool:
    end = time.monotonic() + 30
    while any(map(lives, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("rank", ["waits"], indirect=True)
def test_ctrl_c_ends_a_rank_that_waits_for_others(rank):
    for pid in (rank.pid, rank.forkserver, rank.worker):
        assert {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1} <= held(pid)
    for number in (signal.SIGUSR1, signal.SIGTERM):  # of SLURM, and of torchrun
        os.killpg(rank.pid, number)
    time.sleep(0.5)
    assert lives(rank.pid) and lives(rank.worker)
    os.killpg(rank.pid, signal.SIGINT)
    assert rank.process.wait(30) == 130
    assert gone(rank.worker, rank.forkserver)


@pytest.mark.parametrize("rank", ["waits"], indirect=True)
def test_no_worker_lives_on_without_its_rank(rank):
    os.kill(rank.pid, signal.SIGKILL)
    assert gone(rank.worker, rank.forkserver)


@pytest.mark.parametrize("rank", ["fails"], indirect=True)
def test_a_rank_that_fails_does_not_wait_for_its_workers(rank):
    assert rank.process.wait(30) == 1
    assert "another rank has gone" in rank.errors.read_text()
    assert gone(rank.worker, rank.forkserver)
