"""Which checkpoint is complete, and when a run is started again."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_internvlx import files
from megatron_internvlx.lifecycle import resume


def checkpoint(save: Path, iteration: int) -> Path:
    folder = files.checkpoint_directory(save, iteration)
    state = {"a": torch.arange(1000.0), "b": torch.ones(50, 7)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return folder


def data_file(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def truncate(folder: Path) -> None:
    path = data_file(folder)
    os.truncate(path, path.stat().st_size - 1)


DAMAGES = {
    "no metadata.json": (lambda folder: (folder / "metadata.json").unlink(), "metadata.json is missing"),
    "half a metadata.json": (lambda folder: (folder / "metadata.json").write_text('{"sha'), "metadata.json"),
    "no index": (lambda folder: (folder / ".metadata").unlink(), ".metadata"),
    "half an index": (lambda folder: os.truncate(folder / ".metadata", 100), ".metadata"),
    "no data file": (lambda folder: data_file(folder).unlink(), "is missing"),
    "a short data file": (truncate, "bytes of"),
    "nothing": (lambda folder: [path.unlink() for path in folder.iterdir()], "interrupted"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_newest_checkpoint_is_skipped_and_set_aside(tmp_path, damage):
    harm, reason = DAMAGES[damage]
    for iteration in (5, 10, 15):
        checkpoint(tmp_path, iteration)
    assert resume.newest_complete(tmp_path) == (15, [])
    harm(files.checkpoint_directory(tmp_path, 15))
    found, broken = resume.newest_complete(tmp_path)
    assert found == 10
    assert [iteration for iteration, _ in broken] == [15]
    assert reason in broken[0][1]
    said = list(resume.messages(tmp_path, found, broken))
    assert "skipped" in said[0] and "iter_0000010" in said[1]
    resume.set_aside(tmp_path, broken)
    assert files.iterations(tmp_path) == [10, 5]
    assert (tmp_path / "broken_0000015").is_dir()


def test_empty_directory_has_no_checkpoint(tmp_path):
    assert resume.newest_complete(tmp_path) == (None, [])
    assert resume.newest_complete(tmp_path / "missing") == (None, [])


def test_tries_count_from_the_last_progress(tmp_path):
    state = resume.RunState()
    assert all(state.begin(None, limit=3) for _ in range(3))
    assert state.begin(100, limit=3) and state.tries == 1
    assert all(state.begin(100, limit=3) for _ in range(2))
    assert not state.begin(100, limit=3)
    assert state.status == "stuck" and "iteration 100" in state.reason
    assert [start["from"] for start in state.history] == [None] * 3 + [100] * 4


def test_preemption_is_no_failed_try():
    state = resume.RunState()
    for _ in range(10):
        assert state.begin(7, limit=2)
        state.status = "preempted"


@pytest.mark.parametrize(
    ("status", "tries", "code"),
    [
        ("finished", 1, resume.DONE),
        ("preempted", 1, resume.AGAIN),
        ("running", 1, resume.AGAIN),
        ("failed", 2, resume.AGAIN),
        ("running", 3, resume.STOP),
        ("stuck", 4, resume.STOP),
    ],
)
def test_verdict(tmp_path, status, tries, code):
    state = resume.RunState(status=status, tries=tries, progress=-1)
    state.write(tmp_path)
    assert resume.verdict(tmp_path, 0.0, 3)[0] == code


def test_a_step_that_was_not_saved_is_no_end_and_no_progress(tmp_path, monkeypatch):
    """Preempted or at its last step, on a full disk: starting again waits for room, and tries are not reset."""
    checkpoint(tmp_path, 5)
    state = resume.RunState(status="failed", reason="no room", unsaved=9, tries=1, progress=5)
    state.write(tmp_path)
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda _: Namespace(free=1000))
    code, reason = resume.verdict(tmp_path, 0.0, 3)
    assert code == resume.STOP and "step 9 was not saved" in reason and "has 0.00 GB left" in reason
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda _: Namespace(free=10**12))
    assert resume.verdict(tmp_path, 0.0, 3) == (resume.AGAIN, "no room")
    assert state.begin(5, limit=3)
    assert (state.tries, state.unsaved) == (2, None)


def test_a_run_that_never_began_counts_too(tmp_path):
    codes = [resume.verdict(tmp_path, time.time() + 60, 3)[0] for _ in range(4)]
    assert codes == [resume.AGAIN] * 3 + [resume.STOP]


def test_verdict_is_an_exit_code(tmp_path):
    resume.RunState(status="preempted", tries=1).write(tmp_path)
    command = [sys.executable, "-m", "megatron_internvlx.lifecycle.resume", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (75, "stopped by a signal, after a checkpoint")


def test_a_launchers_mistake_is_no_reason_to_start_again(tmp_path, capsys):
    """A start that ended before it wrote anything is tried again; a mistyped path is not."""
    for arguments, message in (
        ([str(tmp_path / "nope")], "nope: no such directory"),
        ([str(tmp_path), "--since", "nan"], "--since nan: must be seconds since the epoch"),
        ([str(tmp_path), "--since", "inf"], "--since inf"),
        ([str(tmp_path), "--since", "-5"], "--since -5.0"),
        ([str(tmp_path), "--since", "yesterday"], "invalid float value"),
        ([str(tmp_path), "--max-tries", "0"], "--max-tries 0: must be at least 1"),
        ([str(tmp_path), "--max-tries", "-1"], "--max-tries -1"),
        ([], "required: save"),
    ):
        with pytest.raises(SystemExit) as ended:
            resume.main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []  # nothing was asked of the file system
    assert resume.main([str(tmp_path), "--since", str(time.time())]) == resume.AGAIN
    assert "it ended before training began" in capsys.readouterr().out


def test_state_survives_a_torn_file(tmp_path):
    (tmp_path / resume.STATE).write_text('{"status": "runn')
    assert resume.RunState.read(tmp_path).status == "new"


def test_a_store_that_outlives_the_ranks_is_pointed_out():
    shared = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in resume.launcher_risk(shared)
    assert resume.launcher_risk(shared | {"TORCHELASTIC_USE_AGENT_STORE": "False"}) is None
    assert resume.launcher_risk(shared | {"TORCHELASTIC_MAX_RESTARTS": "0"}) is None
    assert resume.launcher_risk({}) is None


def test_blocked_signals_are_inherited_and_seen():
    """A child process of a rank lives through the signal, and the rank knows of it."""
    program = """
import os, signal, subprocess, sys, time
from megatron_internvlx.lifecycle import signals
signals.block_stop_signals()
signals.catch_in_other_threads()
child = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(30)"],
                         stdout=subprocess.PIPE)
child.stdout.readline()
assert not signals.pending()
for number in signals.STOP:
    os.kill(child.pid, number)
    os.kill(os.getpid(), number)
time.sleep(0.2)
print(signals.pending(), child.poll() is None)
child.kill()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_stop_signals_are_the_ones_of_slurm():
    from megatron_internvlx.lifecycle import signals

    assert set(signals.STOP) == {signal.SIGUSR1, signal.SIGTERM}
