"""One run at a time writes to a --save directory."""

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_internvlx.config import RunSettings
from megatron_internvlx.lifecycle import lock, resume
from megatron_internvlx.lifecycle.setup import RunSetup

HOLD = """
import os, sys, time
from pathlib import Path
from megatron_internvlx.lifecycle import lock
held = lock.SaveLock(Path(sys.argv[1]))
child = os.fork() if len(sys.argv) > 2 else 1  # a loader worker, which outlives its rank
if child:
    print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@pytest.fixture
def hold(tmp_path):
    """Starts another run that holds the directory."""
    started = []

    def start(*more: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(tmp_path), *more]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, env=os.environ | environment, start_new_session=True
        )
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_holder_is_named(tmp_path, hold):
    other = hold()
    with pytest.raises(lock.SaveInUse) as refused:
        lock.SaveLock(tmp_path)
    said = str(refused.value)
    assert f"--save {tmp_path} belongs to a run on {socket.gethostname()} (pid {other.pid}, since 2" in said
    assert refused.value.exit_code == 77


def test_it_goes_with_its_process_although_a_child_lives(tmp_path, hold):
    other = hold("and a child")
    with pytest.raises(lock.SaveInUse):
        lock.SaveLock(tmp_path)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    os.killpg(other.pid, 0)  # the child is there
    mine = lock.SaveLock(tmp_path)
    assert json.loads(mine.path.read_text())["pid"] == os.getpid()
    mine.release()


def test_a_released_directory_is_free(tmp_path):
    mine = lock.SaveLock(tmp_path)
    mine.release()
    mine.release()
    assert mine.path.read_text() == ""
    child = subprocess.run([sys.executable, "-c", HOLD.replace("60", "0"), str(tmp_path)], timeout=60)
    assert child.returncode == 0


def test_an_earlier_start_of_the_same_job_is_waited_for(tmp_path, hold, monkeypatch, capsys):
    other = hold(SLURM_JOB_ID="17")
    with pytest.raises(lock.SaveInUse, match="job 17"):
        lock.SaveLock(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert lock.other_holder(tmp_path) is None
    monkeypatch.setattr(lock.time, "sleep", lambda _: (other.kill(), other.wait()))
    lock.SaveLock(tmp_path).release()
    assert "waiting up to 150 s for it to end" in capsys.readouterr().err


def test_waiting_has_an_end(tmp_path, hold, monkeypatch):
    hold(SLURM_JOB_ID="17")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(lock.SaveInUse):
        lock.SaveLock(tmp_path, patience=0)


def held_on(host: str, monkeypatch) -> None:
    """The lock's holder is on another machine, as far as this one is told."""
    monkeypatch.setattr(lock.socket, "gethostname", lambda: host)


def test_a_holder_on_another_host_is_waited_for_whatever_its_job(tmp_path, hold, monkeypatch, capsys):
    """A chain of jobs: the node of the one before may have died, and the file system keeps its lock for a while."""
    other = hold(SLURM_JOB_ID="17")
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    host = socket.gethostname()
    held_on("another", monkeypatch)

    def sleep(_):
        assert f"belongs to a run on {host} (pid {other.pid}" in capsys.readouterr().err  # said at once
        other.kill()
        other.wait()

    monkeypatch.setattr(lock.time, "sleep", sleep)
    lock.SaveLock(tmp_path).release()


def test_a_holder_on_this_host_is_not_waited_for(tmp_path, hold, monkeypatch):
    hold(SLURM_JOB_ID="17")
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    monkeypatch.setattr(lock.time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(lock.SaveInUse):
        lock.SaveLock(tmp_path)


def test_waiting_for_another_host_has_an_end(tmp_path, hold, monkeypatch):
    hold()
    held_on("another", monkeypatch)
    with pytest.raises(lock.SaveInUse, match="still training"):
        lock.SaveLock(tmp_path, patience=0)


def test_a_holder_that_has_not_said_who_it_is(tmp_path, hold, monkeypatch):
    hold()
    (tmp_path / lock.FILE).write_text("")
    with pytest.raises(lock.SaveInUse) as refused:
        lock.SaveLock(tmp_path, patience=0)
    assert "belongs to another run (run.lock does not say which)" in str(refused.value)
    assert "1970" not in str(refused.value)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_failing_file_system_is_not_another_run(tmp_path, monkeypatch, number):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    with pytest.raises(ValueError, match=f"run.lock cannot be locked: {os.strerror(number)}") as refused:
        lock.SaveLock(tmp_path)
    assert not isinstance(refused.value, lock.SaveInUse)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    lock.SaveLock(tmp_path).release()
    assert "without locks (No locks available)" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_a_mistake(tmp_path):
    (tmp_path / lock.FILE).mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        lock.SaveLock(tmp_path)


def test_the_first_rank_locks(tmp_path):
    def of(save=tmp_path, rank=0):
        return lock.lock_save(RunSetup(save, True, rank, 2, 10, False, False, RunSettings()))

    assert of(rank=1) is None and of(save=None) is None
    held = of()
    assert held is not None
    held.release()


def test_a_launcher_stops_and_leaves_the_other_run_alone(tmp_path, hold):
    """Its refused start is none of the other run's tries, and the other's MLflow run has not failed."""
    hold()
    resume.RunState(status="running", tries=1, progress=5).write(tmp_path)
    (tmp_path / "mlflow_run.json").write_text("{")
    before = (tmp_path / resume.STATE).read_text()
    for since in (0.0, time.time() + 60):
        code, reason = resume.verdict(tmp_path, since, 3)
        assert code == resume.STOP
        assert "belongs to a run on" in reason
    command = [sys.executable, "-m", "megatron_internvlx.lifecycle.resume", str(tmp_path)]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60).returncode == resume.STOP
    assert (tmp_path / resume.STATE).read_text() == before


def test_asking_does_not_take_it(tmp_path, hold):
    assert lock.other_holder(tmp_path) is None
    mine = lock.SaveLock(tmp_path)
    assert lock.other_holder(tmp_path) is None
    mine.release()
    assert lock.other_holder(Path(tmp_path)) is None
    hold()
    assert lock.other_holder(tmp_path).host == socket.gethostname()
