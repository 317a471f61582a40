"""torchrun that ends without a traceback of its own."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_internvlx import launch

# Rank 0, which alone used to speak, is slow to start; it is ended before it has seen anything.
RANK = """
import os, sys, time
from megatron_internvlx.lifecycle import complaint, signals
signals.block_stop_signals()
signals.interrupts.arm()
if sys.argv[1] == "mistake":
    if os.environ["RANK"] == "0":
        time.sleep(60)
    sys.exit(complaint.complain(ValueError("no such thing")))
open(os.environ["RANK"], "w").close()
if sys.argv[1] == "crash" and os.environ["RANK"] == "1":
    while not signals.pending():
        time.sleep(0.01)
    os._exit(74)
if sys.argv[1] == "crash":
    signals.unblock_stop_signals()
time.sleep(60)
"""


def start(folder: Path, case: str) -> subprocess.Popen:
    (folder / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "megatron_internvlx.launch", "--standalone", "--nproc-per-node", "2"]
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [*command, "rank.py", case], cwd=folder, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_mistake_is_said_whichever_rank_ends_first(tmp_path):
    process = start(tmp_path, "mistake")
    _, said = process.communicate(timeout=100)
    assert process.returncode == 2
    assert said.splitlines() == ["launch: starting torchrun", "pretrain_vlm.py: no such thing"]


def wait_for_ranks(folder: Path, process: subprocess.Popen) -> None:
    while not all((folder / rank).exists() for rank in "01"):
        assert process.poll() is None
        time.sleep(0.01)


def test_ctrl_c_is_one_line(tmp_path):
    process = start(tmp_path, "wait")
    wait_for_ranks(tmp_path, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 130
    interrupted = "pretrain_vlm.py: interrupted: training has not begun"
    assert said.splitlines() == ["launch: starting torchrun", interrupted]


def test_ranks_that_crash_after_a_signal_are_named(tmp_path):
    process = start(tmp_path, "crash")
    wait_for_ranks(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 74
    assert said.splitlines()[1:] == ["launch: after SIGTERM, of this node's ranks: rank 1 ended with 74"]


@pytest.mark.parametrize(
    ("number", "codes", "ends", "said"),
    [
        (2, {0: 130, 1: 130}, 130, ""),
        (15, {0: 0, 1: -15}, 143, ""),
        (15, {0: 143}, 143, ""),
        (2, {}, 130, ""),  # before any rank was started
        (2, {0: 130, 1: 1}, 1, "rank 1 ended with 1"),
        (15, {0: -9, 1: 74}, 74, "rank 0 was ended by SIGKILL, rank 1 ended with 74"),
        (15, {0: 0, 1: -11}, 139, "rank 1 was ended by SIGSEGV"),
        (2, {0: -15}, 143, "rank 0 was ended by SIGTERM"),
        (15, {0: None}, 137, "rank 0 is still running"),
    ],
)
def test_how_ranks_end_after_a_signal(number, codes, ends, said, capsys):
    assert launch._exit_code_after_signal(number, codes) == ends
    line = capsys.readouterr().err
    assert line.endswith(f"of this node's ranks: {said}\n") if said else line == ""


@pytest.mark.parametrize(("codes", "ends"), [([-9, 77], 77), ([1, 2], 2), ([1], None), ([-11], None)])
def test_what_no_rank_has_explained_is_left_to_torchrun(codes, ends, monkeypatch, tmp_path):
    def fail(words):
        assert words == ["rank.py"]
        file = str(tmp_path / "error.json")
        raise ChildFailedError(
            "rank.py", {i: ProcessFailure(i, 7, code, file) for i, code in enumerate(codes)}
        )

    monkeypatch.setattr("torch.distributed.run.main", fail)
    if ends is not None:
        assert launch.main(["rank.py"]) == ends
        return
    with pytest.raises(ChildFailedError):
        launch.main(["rank.py"])


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Sending process 12 closing signal SIGINT", False),
        ("Received 2 death signal, shutting down workers", False),
        ("failed (exitcode: 2) local_rank: 1 (pid: 7) of binary: python", False),
        ("failed (exitcode: 1) local_rank: 1 (pid: 7) of binary: python", True),
        ("failed (exitcode: -9) local_rank: 1 (pid: 7) of binary: python", True),
        ("Unable to shutdown process 7 via SIGTERM, forcefully exiting via SIGKILL", True),
    ],
)
def test_what_is_dropped(text, kept):
    record = logging.LogRecord("x", logging.ERROR, "x", 1, text, None, None)
    assert launch._Filter().filter(record) is kept
