"""What a rank records when it ends; whole runs are in tests/parallel/test_faults.py."""

import threading

import pytest

from megatron_internvlx.config import RunSettings
from megatron_internvlx.lifecycle import signals
from megatron_internvlx.lifecycle.outcome import Outcome
from megatron_internvlx.lifecycle.resume import RunState
from megatron_internvlx.lifecycle.setup import RunSetup


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Makes rank 3 of 4, with a list of what it tells MLflow."""
    monkeypatch.setattr(signals.interrupts, "last_acts", [])

    def start(rank=3):
        told: list[tuple[str, bool]] = []
        setup = RunSetup(tmp_path, True, rank, 4, 10, False, False, RunSettings(auto_resume=True))
        return Outcome(setup, signals.StopSignals(), lambda *what: told.append(what)), told

    return start


def begin(save) -> None:
    """What rank 0 writes when a start begins."""
    state = RunState.read(save)
    state.begin(None, 3)
    state.write(save)


def test_a_node_that_is_left_alone_does_not_take_ctrl_c_for_a_failure(started, tmp_path):
    run, told = started()
    begin(tmp_path)
    interrupted, _ = started()  # of another node
    interrupted.interrupted()
    run.failed("connection reset by peer")
    state = RunState.read(tmp_path)
    assert (state.status, state.reason) == ("stopped", "by Ctrl-C")
    assert told == [("KILLED", False)]


@pytest.mark.parametrize("begun", [True, False])
def test_a_failure_after_an_earlier_start_was_stopped(started, tmp_path, begun):
    RunState(status="stopped").write(tmp_path)
    run, told = started()
    if begun:
        begin(tmp_path)
    run.failed("a bug")
    state = RunState.read(tmp_path)
    assert state.status == "failed" and "a bug" in state.reason
    assert told == [("FAILED", True)]


def test_what_an_error_notes_is_recorded_with_it(started, tmp_path):
    """A remedy that only the traceback shows is lost among those of all ranks; the first line is printed."""
    run, _ = started()
    begin(tmp_path)
    error = RuntimeError("an illegal memory access\nCUDA kernel errors may come late")
    error.add_note("do this")
    run.crashed(error, None)
    first, second = RunState.read(tmp_path).reason.splitlines()
    assert first.endswith("RuntimeError: an illegal memory access; do this")
    assert second == "CUDA kernel errors may come late"


def test_no_rank_of_a_node_goes_before_it_is_known(started, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    run, _ = started()
    begin(tmp_path)
    waiting = threading.Thread(target=run.interrupted)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    first, _ = started(rank=0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    first.interrupted()
    waiting.join(20)
    assert not waiting.is_alive()
    assert RunState.read(tmp_path).status == "stopped"


def test_ctrl_c_before_a_start_that_follows_one_is_recorded_as_new(started, tmp_path):
    old = RunState(status="stopped")
    old.write(tmp_path)
    run, told = started()
    run.interrupted()
    assert RunState.read(tmp_path).updated > old.updated
    assert told == [("KILLED", False)]
