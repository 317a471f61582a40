"""Checkpoints on a full disk: skipped where there is no room, and the end of the process where a save fails."""

import os
from pathlib import Path

from tests import single  # isort: skip  (sets Megatron up)
import pytest

from megatron_internvlx.config import RunSettings
from megatron_internvlx.exit_codes import SAVE_FAILED
from megatron_internvlx.lifecycle import resume
from megatron_internvlx.lifecycle.resume import Unsaved
from megatron_internvlx.lifecycle.saves import GuardedSaves, root_cause
from megatron_internvlx.lifecycle.setup import RunSetup


class Ended(BaseException):
    """Instead of the process."""


@pytest.fixture
def lack(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the disk lacks, at the end of the list; empty: nothing."""
    lacks: list[str] = []
    monkeypatch.setattr(resume, "shortage", lambda save: lacks[-1] if lacks else None)
    single.single()
    return lacks


def guarded(save: Path | None, failures: list[str], saved: list[str]) -> GuardedSaves:
    setup = RunSetup(save, save is not None, 0, 1, 10, False, False, RunSettings())
    return GuardedSaves(setup, failures.append, lambda seconds: saved.append("saved"))


def test_a_save_without_room_is_skipped(
    tmp_path: Path, lack: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    saved: list[str] = []
    guard = guarded(tmp_path, [], saved)
    save = guard.guard(lambda iteration, *rest, **more: saved.append(f"{iteration} {rest} {more}"))
    lack.append("0.1 GB left")
    save(3, "model")
    assert (saved, guard.unsaved, guard.saving) == ([], Unsaved(3, "0.1 GB left"), False)
    assert "step 3: no checkpoint: 0.1 GB left; training continues" in capsys.readouterr().err
    lack.clear()
    save(5, "model", tp=1)
    assert (saved, guard.unsaved, guard.saving) == (["5 ('model',) {'tp': 1}", "saved"], None, False)


def test_without_a_directory_nothing_is_asked(lack: list[str]) -> None:
    lack.append("0.1 GB left")
    saved: list[str] = []
    guarded(None, [], saved).guard(lambda iteration: saved.append(f"{iteration}"))(3)
    assert saved == ["3", "saved"]


def test_a_failed_save_ends_the_process(
    tmp_path: Path, lack: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[str] = []
    saved: list[str] = []
    guard = guarded(tmp_path, failures, saved)

    def end(code: int) -> None:
        assert failures, "the reason is recorded first"
        raise Ended(code)

    def full(iteration: int) -> None:
        assert guard.saving
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("a writer failed") from error

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended) as ended:
        guard.guard(full)(7)
    assert ended.value.args == (SAVE_FAILED,) == (74,)
    (reason,) = failures
    assert reason.startswith("saving at step 7 failed, ")
    assert "GB left on the disk: OSError(28, 'No space left on device'); earlier checkpoints" in reason
    assert saved == []


@pytest.mark.parametrize("stop", [SystemExit(0), KeyboardInterrupt()])
def test_a_stop_during_a_save_is_no_failure(tmp_path: Path, lack: list[str], stop: BaseException) -> None:
    failures: list[str] = []

    def stopped(iteration: int) -> None:
        raise stop

    with pytest.raises(type(stop)):
        guarded(tmp_path, failures, []).guard(stopped)(7)
    assert failures == []


def test_the_cause_is_at_the_start_of_the_chain() -> None:
    first, second, third = OSError("first"), ValueError("second"), RuntimeError("third")
    second.__cause__, third.__context__ = first, second
    assert root_cause(third) is first
