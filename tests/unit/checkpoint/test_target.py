"""Conversions that are killed, that meet a full disk, or that meet each other."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_internvlx.checkpoint import exporter, target, torch_dist_write
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.target import new_directory, run_units
from megatron_internvlx.commands.convert import main
from tests.converting import FAMILIES, differences, make_directory

ROOT = Path(__file__).resolve().parents[3]

# A conversion of 40 parts by two processes; every part leaves a file after 0.2 s.
SLOW = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from megatron_internvlx.checkpoint import target

def slow(unit):
    time.sleep(0.2)
    Path(unit).write_text(str(os.getpid()))
    return 1

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    target.MIN_PARALLEL_BYTES = 0
    with target.new_directory(Path({final!r}), "mark", 1) as made:
        units = [str(made.partial / f"part{{i}}") for i in range(40)]
        try:
            target.run_units(made, units, slow, sizes=[1] * 40, processes=2, title="slow", quiet=True)
        except KeyboardInterrupt:
            sys.exit(130)
"""


def started(tmp_path: Path) -> tuple[subprocess.Popen, Path]:
    """A slow conversion, of which some parts are finished."""
    final = tmp_path / "final"
    (tmp_path / "slow.py").write_text(SLOW.format(root=str(ROOT), final=str(final)))
    command = [sys.executable, tmp_path / "slow.py"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    partial, deadline = tmp_path / "final.partial-mark", time.monotonic() + 60
    while len(list(partial.glob("part*"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    return process, partial


def alive(pid: int) -> bool:
    """Whether a process still runs; one that nobody has waited for yet does not."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """Workers that went on would write over what the next run has finished."""
    process, partial = started(tmp_path)
    process.kill()
    process.wait()
    time.sleep(0.5)
    seen = sorted(partial.glob("part*"))
    workers = {int(path.read_text()) for path in seen}
    time.sleep(1)
    assert sorted(partial.glob("part*")) == seen
    assert not [pid for pid in workers if alive(pid)]
    assert not (tmp_path / "final").exists()


def test_an_interrupt_is_quiet(tmp_path: Path) -> None:
    """Ctrl-C goes to all processes of the terminal; no worker prints where it was."""
    process, partial = started(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert partial.is_dir()


def test_a_killed_worker_is_told_and_its_parts_are_kept(tmp_path: Path) -> None:
    process, partial = started(tmp_path)
    os.kill(int(next(partial.glob("part*")).read_text()), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert "a process was killed, perhaps because memory was full" in errors
    assert len(list((partial / target.NOTES).glob("*.json"))) >= 2


def test_a_second_conversion_of_the_same_is_refused(tmp_path: Path) -> None:
    with new_directory(tmp_path / "final", "mark", 1):
        second = new_directory(tmp_path / "final", "mark", 1)
        with pytest.raises(ConversionError, match="the same conversion is running"):
            second.__enter__()
        assert (tmp_path / "final.partial-mark").is_dir()
    assert (tmp_path / "final").is_dir()


def test_full_disk_under_an_archive() -> None:
    """torch's writer turns the error into another; what the user must know is that the disk is full."""
    with (
        open("/dev/full", "wb", buffering=0) as file,
        pytest.raises(OSError, match="No space left") as caught,
    ):
        torch_dist_write.save_tensor(file, torch.zeros(1 << 16))
    assert caught.value.errno == errno.ENOSPC


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    def full(_: Any) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            torch_dist_write.save_tensor(file, torch.zeros(1 << 16))

    target_of = new_directory(tmp_path / "final", "mark", 1)
    with pytest.raises(ConversionError, match="the disk is full"), target_of as made:
        run_units(made, [0], full, sizes=[1], processes=1, title="full", quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("killed_at", ["header", "tensor"])
def test_killed_exports_continue(tmp_path: Path, monkeypatch, killed_at: str) -> None:
    """Also one that was killed before its files had their headers."""
    hf = make_directory(tmp_path / "hf", FAMILIES["llama"], shards=3)
    assert main(["import", "--hf", str(hf), "--save", str(tmp_path / "ck"), "--quiet"]) == 0
    monkeypatch.setattr(exporter, "UNIT_BYTES", 1 << 16)
    name = "write_header" if killed_at == "header" else "write_unit"
    original, calls = getattr(exporter, name), []

    def interrupted(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*given)

    command = ["export", "--load", str(tmp_path / "ck"), "--hf", str(tmp_path / "out"), "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(exporter, name, interrupted)
        assert main(command) == 130
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    assert differences(hf, tmp_path / "out") == []
