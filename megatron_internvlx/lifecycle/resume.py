"""Checkpoint that a run resumes from, its number of starts, and a launcher's decision when it ends.

    python -m megatron_internvlx.lifecycle.resume SAVE_DIRECTORY --since SECONDS

prints why the run ended and exits with 0 (finished), 75 (start it again), 76 (stop: it makes no progress) or
2 (a mistake of the caller, such as a missing directory: the launcher creates it before the first start, so a missing
one was mistyped). The state is in `run_state.json` beside the checkpoints.

A checkpoint is complete when its `metadata.json` is there (Megatron writes it last), and every file holds
as many bytes as the index in `.metadata` says. Megatron's `--verify-integrity` compares contents too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from megatron_internvlx.exit_codes import AGAIN, DONE, STOP
from megatron_internvlx.files import checkpoint_directory, iterations, write_atomically
from megatron_internvlx.lifecycle.lock import other_holder

STATE = "run_state.json"
_HISTORY = 50  # attempts that the state remembers


class Unsaved(NamedTuple):
    """A checkpoint for which the disk had no room."""

    step: int
    reason: str


def fault(checkpoint: Path) -> str | None:
    """Find out why a checkpoint directory is incomplete; None if it is complete."""
    config = checkpoint / "metadata.json"
    try:
        json.loads(config.read_text())
    except FileNotFoundError:
        return "metadata.json is missing: the save was interrupted"
    except (OSError, ValueError) as error:
        return f"metadata.json cannot be read: {error}"
    try:
        expected = indexed_sizes(checkpoint)
    except Exception as error:  # a torn pickle raises nearly anything
        return f".metadata cannot be read: {error!r}"
    for name, size in sorted(expected.items()):
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < size:
            return f"{name} has {path.stat().st_size:,} bytes of {size:,}"
    return None


def indexed_sizes(checkpoint: Path) -> dict[str, int]:
    """Read the bytes that each file of a checkpoint must have from its index. Raises ValueError."""
    from torch.distributed.checkpoint import FileSystemReader

    sizes: dict[str, int] = {}
    for place in FileSystemReader(checkpoint).read_metadata().storage_data.values():
        sizes[place.relative_path] = max(sizes.get(place.relative_path, 0), place.offset + place.length)
    if not sizes:
        raise ValueError("it lists no file")
    return sizes


def newest_complete(
    save: Path, also: Callable[[int], str | None] = lambda iteration: None
) -> tuple[int | None, list[tuple[int, str]]]:
    """Find the newest complete checkpoint, and the incomplete ones newer than it, each with the reason.

    `also` checks a checkpoint whose own files are complete; it returns a reason to skip it, or None.
    """
    broken: list[tuple[int, str]] = []
    for iteration in iterations(save):
        reason = fault(checkpoint_directory(save, iteration)) or also(iteration)
        if reason is None:
            return iteration, broken
        broken.append((iteration, reason))
    return None, broken


def shortage(save: Path) -> str | None:
    """Message with sizes in GB if the disk has no room for another checkpoint as large as the last, else None."""
    last = next((checkpoint_directory(save, iteration) for iteration in iterations(save)), None)
    if last is None:
        return None
    needed = 1.05 * sum(file.stat().st_size for file in last.iterdir())
    free = shutil.disk_usage(save).free
    if free > needed:
        return None
    return f"{save} has {free / 1e9:.2f} GB left, a checkpoint takes {needed / 1e9:.2f} GB"


def set_aside(save: Path, broken: list[tuple[int, str]]) -> None:
    """Rename broken checkpoints, which frees their names for later saves; keep only the last one renamed."""
    for iteration, _ in broken:
        for old in save.glob("broken_*"):
            shutil.rmtree(old, ignore_errors=True)
        checkpoint_directory(save, iteration).rename(save / f"broken_{iteration:07d}")


@dataclass
class RunState:
    """State of a run over all its starts."""

    status: str = "new"
    """One of new, running, preempted, stopped (on request), finished, failed (with a reason), stuck."""
    progress: int = -1
    """Iteration of the newest checkpoint that a start found."""
    tries: int = 0
    """Starts since then."""
    reason: str = ""
    unsaved: int | None = None
    """Last step of the previous start, if the disk had no room for its checkpoint."""
    updated: float = 0.0
    """Time of the last `write`, in seconds since the epoch."""
    history: list[dict] = field(default_factory=list)

    @classmethod
    def read(cls, save: Path) -> RunState:
        """Read the state in this directory; a new one if there is none, or it cannot be read."""
        try:
            content = json.loads((save / STATE).read_text())
            return cls(**content)
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, save: Path) -> None:
        """Write the state with the current time."""
        self.updated = time.time()
        save.mkdir(parents=True, exist_ok=True)
        write_atomically(save / STATE, json.dumps(asdict(self), indent=1))

    def begin(self, found: int | None, limit: int) -> bool:
        """Count a start from checkpoint `found`; False if more than `limit` starts made no progress."""
        reached = -1 if found is None else found
        if reached > self.progress or self.status in ("preempted", "stopped", "finished"):
            self.progress, self.tries = max(reached, self.progress), 0
        self.tries += 1
        start = {"time": time.time(), "host": socket.gethostname(), "from": found, "after": self.status}
        if job := os.environ.get("SLURM_JOB_ID"):
            start |= {"job": job, "nodes": os.environ.get("SLURM_JOB_NODELIST", "")}
        self.history = [*self.history[-_HISTORY:], start]
        if self.tries > limit:
            self.status = "stuck"
            self.reason = f"{limit} starts from iteration {max(reached, 0)} without a newer checkpoint"
            return False
        self.status, self.reason, self.unsaved = "running", "", None
        return True

    def stopped_by_disk(self, save: Path) -> str | None:
        """Message if the disk still lacks room for the last checkpoint; None if another start can save."""
        lack = None if self.unsaved is None else shortage(save)
        return lack and f"step {self.unsaved} was not saved, and there is still no room: {lack}"


def verdict(save: Path, since: float, limit: int) -> tuple[int, str]:
    """Exit code and reason for a launcher whose run, started at time `since`, has ended."""
    if holder := other_holder(save):
        # The start that ended was not one of that run, whose state and number of starts stay as they are.
        return STOP, f"{save} belongs to {holder}, which is still training"
    state = RunState.read(save)
    if state.updated < since:
        # It ended before the first rank could write anything; that counts as a start.
        may_train = state.begin(newest_complete(save)[0], limit)
        state.write(save)
        return (AGAIN, "it ended before training began") if may_train else (STOP, state.reason)
    if state.status in ("finished", "stopped"):
        return DONE, state.status
    if state.status == "preempted":
        return AGAIN, "stopped by a signal, after a checkpoint"
    if state.status == "stuck":
        return STOP, state.reason
    if reason := state.stopped_by_disk(save):
        return STOP, reason
    if state.tries >= limit and (newest_complete(save)[0] or -1) <= state.progress:
        return (
            STOP,
            f"{state.tries} starts from iteration {max(state.progress, 0)} without a newer checkpoint",
        )
    return AGAIN, state.reason or "it ended without a recorded reason: a rank or a node died"


def messages(save: Path, found: int | None, broken: list[tuple[int, str]]) -> Iterator[str]:
    """Lines about skipped checkpoints and the one that training resumes from."""
    for iteration, reason in broken:
        yield f"checkpoint {checkpoint_directory(save, iteration)} is not complete ({reason}): skipped"
    if found is not None:
        yield f"resuming from {checkpoint_directory(save, found)}"


def launcher_risk(environment: Mapping[str, str]) -> str | None:
    """Warning about torchrun settings that break its restarts; None if there are none.

    torch 2.13's torchrun gives every restart the same key-value store. A rank that is faster than the others
    reads the addresses of ranks that died, and the restart fails or hangs. A store per restart avoids that.
    """
    restarts = int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if not restarts or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return (
        f"torchrun may restart this run {restarts} times, but its shared store can hand a restart the addresses of "
        "ranks that died: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print why a run ended; returns the exit code for its launcher, see the module's docstring."""
    parser = argparse.ArgumentParser(description="why a run ended, and whether to start it again")
    parser.add_argument("save", help="the run's --save directory")
    parser.add_argument(
        "--since", type=float, default=0.0, help="when it was started, in seconds of the epoch"
    )
    parser.add_argument("--max-tries", type=int, default=3, help="starts without progress")
    options = parser.parse_args(argv)
    if not 0 <= options.since < math.inf:
        parser.error(f"--since {options.since}: must be seconds since the epoch, as `date +%s` prints them")
    if options.max_tries < 1:
        parser.error(f"--max-tries {options.max_tries}: must be at least 1")
    if not options.save:
        parser.error("the directory has an empty name: is the variable set that should hold it?")
    options.save = Path(options.save)
    if not options.save.is_dir():
        parser.error(f"{options.save}: no such directory; a launcher creates it before the first start")
    code, reason = verdict(options.save, options.since, options.max_tries)
    print(reason)
    if code != DONE and not other_holder(options.save) and RunState.read(options.save).status != "preempted":
        # Killed processes could not do it themselves; a start that resumes marks it RUNNING again.
        from megatron_internvlx.reporting.mlflow_sink import mark_failed

        mark_failed(options.save)
    return code


if __name__ == "__main__":
    sys.exit(main())
