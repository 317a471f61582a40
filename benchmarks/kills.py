"""Twenty SIGKILLs of a random rank or of all at random moments, and what is left of the run.

    python -m benchmarks.kills [--kills 20]      # writes benchmarks/results/kills-DATE.md

The demo model on two ranks under torchrun, which restarts them; every second kill falls into a
checkpoint save. The final weights and optimizer state must be those of the unbroken run, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import ROOT, table, write
from megatron_internvlx import files
from megatron_internvlx.lifecycle import resume
from testing.checkpoints import differing
from tools import make_demo_data

STEPS, EVERY = 60, 3


@dataclass
class Kill:
    """One of the kills."""

    victims: str
    during_save: bool
    newest: int
    """Newest checkpoint directory at that moment."""
    complete: int
    """Newest complete one."""


def start(data: Path, save: Path, restarts: int) -> subprocess.Popen:
    """torchrun of two ranks in a session of its own."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--max-restarts", str(restarts), "--monitor-interval", "0.2", "--shutdown-timeout", "10"),
        *("pretrain_vlm.py", "--recipe", "examples/demo/demo.yaml", "--data", str(data / "meta.json")),
        *("--tokenizer-model", str(data / "tokenizer"), "--save", str(save), "--loader-workers", "1"),
        *("--train-iters", str(STEPS), "--lr-decay-iters", str(STEPS), "--save-interval", str(EVERY)),
        *("--micro-batch-size", "1", "--global-batch-size", "4", "--max-tiles", "2"),
        *("--log-interval", "1", "--auto-resume", "--max-tries", str(restarts + 1)),
        "--exit-signal-handler",
    ]
    log = (save.parent / f"{save.name}.log").open("w")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as train.sbatch, which has the reason
    }
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def ranks(save: Path) -> list[int]:
    """Process ids of the ranks that train into this directory."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            command = (entry / "cmdline").read_bytes().split(b"\0")
            if b"pretrain_vlm.py" in command[:3] and os.fsencode(save) in command:
                found.append(int(entry.name))
    return found


def strike(save: Path, rng: random.Random, during_save: bool, run: subprocess.Popen) -> Kill | None:
    """Wait for a random moment of a running attempt, and kill; None if the run ended before."""
    started = len(resume.RunState.read(save).history)
    known = set(files.iterations(save))
    moment: float | None = None
    while run.poll() is None:
        state = resume.RunState.read(save)
        if moment is None and state.status == "running" and started:
            if during_save and set(files.iterations(save)) - known:
                moment = time.monotonic() + rng.uniform(0, 0.1)
            elif not during_save:
                moment = time.monotonic() + rng.uniform(1, 8)
        started = started or len(state.history)
        if moment is not None and time.monotonic() >= moment and len(ranks(save)) == 2:
            victims = rng.choice([[0], [1], [0, 1]])
            pids = sorted(ranks(save))
            newest = (files.iterations(save) or [0])[0]
            for victim in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[victim], signal.SIGKILL)
            complete = resume.newest_complete(save)[0] or 0
            return Kill("both" if len(victims) == 2 else f"one ({victims[0]})", during_save, newest, complete)
        time.sleep(0.002)
    return None


def wait_for_restart(save: Path, attempts: int, run: subprocess.Popen) -> None:
    """Until the next attempt has begun."""
    while run.poll() is None and len(resume.RunState.read(save).history) <= attempts:
        time.sleep(0.05)


def main() -> int:
    """Run, compare, and write the table; returns 1 if the weights differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        base = Path(folder)
        make_demo_data.main(["--out", str(base / "data"), "--train", "96", "--val", "4"])
        assert start(base / "data", base / "unbroken", 0).wait() == 0, (base / "unbroken.log").read_text()
        run = start(base / "data", base / "killed", asked.kills + 5)
        kills: list[Kill] = []
        wait_for_restart(base / "killed", 0, run)
        while len(kills) < asked.kills:
            attempts = len(resume.RunState.read(base / "killed").history)
            kill = strike(base / "killed", rng, len(kills) % 2 == 1, run)
            if kill is None:
                break
            kills.append(kill)
            print(f"kill {len(kills)}: {kill}", flush=True)
            wait_for_restart(base / "killed", attempts, run)
        code = run.wait()
        final = [files.checkpoint_directory(base / name, STEPS) for name in ("unbroken", "killed")]
        different = differing(*final) if code == 0 else ["the run did not end"]
        log = (base / "killed.log").read_text()
        report(kills, different, log.count("skipped"))
        if different:
            print(log[-5000:])
    return int(bool(different))


def report(kills: list[Kill], different: list[str], skipped: int) -> None:
    """The dated table."""
    verdict = "bit-identical to the unbroken run" if not different else f"different: {different[:5]}"
    rows: list[Sequence[object]] = [("kill", "ranks", "during a save", "newest directory", "newest complete")]
    for number, kill in enumerate(kills, 1):
        during = "yes" if kill.during_save else "no"
        rows.append((number, kill.victims, during, kill.newest, kill.complete))
    text = (
        f"Weights and optimizer state after step {STEPS}: **{verdict}**. Incomplete checkpoints that a start "
        f"found and skipped: {skipped}."
    )
    write("kills", f"{len(kills)} kills", "python -m benchmarks.kills", [text, "", *table(rows)])


if __name__ == "__main__":
    sys.exit(main())
