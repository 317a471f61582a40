"""A mistake is said in any order of exits: real processes of a pretended torchrun."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_internvlx.lifecycle import complaint

RANK = """
import os, sys, time
from megatron_internvlx.lifecycle import complaint
time.sleep(float(sys.argv[1]))
sys.exit(complaint.complain(ValueError(sys.argv[2])))
"""


def start(
    folder: Path, rank: int, delay: float, text: str = "no such thing", **more: str
) -> subprocess.Popen:
    place = folder / str(rank) / "error.json"
    environment = os.environ | {"RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(place)} | more
    return subprocess.Popen(
        [sys.executable, "-c", RANK, str(delay), text],
        env=environment, stderr=subprocess.STDOUT, stdout=(folder / "out").open("a"),
    )  # fmt: skip


@pytest.mark.parametrize("slow", [0, 1, 3])
def test_whichever_rank_is_slow_or_killed_before_it_speaks(tmp_path, slow):
    ranks = {rank: start(tmp_path, rank, 60 if rank == slow else 0) for rank in range(4)}
    quick = [process.wait(60) for rank, process in ranks.items() if rank != slow]
    ranks[slow].kill()  # as torchrun does
    ranks[slow].wait()
    assert quick == [complaint.MISTAKE] * 3
    assert (tmp_path / "out").read_text() == "pretrain_vlm.py: no such thing\n"


def test_a_rank_that_comes_late_does_not_repeat_it(tmp_path):
    for rank in (3, 0):
        assert start(tmp_path, rank, 0).wait(60) == 2
    assert (tmp_path / "out").read_text().count("no such thing") == 1
    assert start(tmp_path, 1, 0, "another mistake").wait(60) == 2  # which this rank alone has seen
    assert (tmp_path / "out").read_text().count("another mistake") == 1


def test_the_next_start_says_it_again(tmp_path):
    for attempt in ("attempt_0", "attempt_1"):
        (tmp_path / attempt).mkdir()
        assert start(tmp_path / attempt, 0, 0).wait(60) == 2
        assert "no such thing" in (tmp_path / attempt / "out").read_text()


def test_nobody_leaves_before_it_is_said(tmp_path, monkeypatch):
    """The one who speaks may be slow: the others wait for it, and speak themselves if it dies."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    with (tmp_path / "reported").open("a+") as held:
        complaint.fcntl.flock(held, complaint.fcntl.LOCK_EX)
        other = start(tmp_path, 1, 0)
        time.sleep(1)
        assert other.poll() is None
    assert other.wait(60) == 2
    assert "no such thing" in (tmp_path / "out").read_text()


def test_without_a_launcher_or_a_directory_it_is_said(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "3")
    for place in (None, str(tmp_path / "gone" / "attempt_0" / "0" / "error.json"), os.devnull):
        monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
        if place:
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", place)
        assert complaint.complain(ValueError("no such thing")) == 2
        assert capfd.readouterr().err == "pretrain_vlm.py: no such thing\n"
        assert not complaint.mistake_was_reported()


def test_on_several_nodes_it_says_where(capfd, monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setattr(complaint.socket, "gethostname", lambda: "node7")
    complaint.complain(ValueError("no such thing"))
    assert capfd.readouterr().err == "pretrain_vlm.py on node7: no such thing\n"


def test_an_error_may_have_an_exit_code_of_its_own(capfd):
    error = ValueError("in use")
    error.exit_code = 77
    assert complaint.complain(error) == 77
