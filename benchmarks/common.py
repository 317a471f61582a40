"""What every benchmark needs: interleaved repetitions in processes of their own, and dated tables."""

from __future__ import annotations

import json
import os
import platform as machine
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import date, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"


class Worker:
    """A process that holds one model and runs a training step when asked; idle otherwise.

    Args:
        settings: what benchmarks/worker.py builds.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(settings)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._answer()

    def step(self) -> dict[str, float]:
        """Seconds and what else the worker reports of one step."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise RuntimeError(f"a benchmark worker ended with code {self.process.wait()}")

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def interleaved(workers: dict[str, Worker], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every worker's steps; the workers take turns, so that all meet the same disturbances."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for repeat in range(warmup + repeats):
        for name, worker in workers.items():
            taken = worker.step()["seconds"]
            if repeat >= warmup:
                seconds[name].append(taken)
    return seconds


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over the repetitions of the ratio within one round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def spread(seconds: Sequence[float]) -> str:
    """Median and range, in milliseconds."""
    low, middle, high = (f(seconds) * 1e3 for f in (min, statistics.median, max))
    return f"{middle:.0f} ({low:.0f}-{high:.0f})"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # from a folder on the path, without metadata, or not there
        return "-"


def commit() -> str:
    """Short name of the checkout's commit."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def packages(more: Sequence[str] = ()) -> str:
    """Versions of the packages that every figure depends on, and of `more`."""
    return ", ".join(f"{name} {_version(name)}" for name in ("torch", "megatron-core", "transformers", *more))


def about(command: str, arithmetic: str = "fp32, ", more: Sequence[str] = ()) -> str:
    """Hardware, versions, commit and command, for the head of a table; `more` packages with their versions."""
    load = os.getloadavg()[0]
    gpu = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda}), " if torch.cuda.is_available() else ""
    return (
        f"`{command}`, commit {commit()}, {packages(more)}; "
        f"{gpu}{os.cpu_count()} CPU cores ({machine.machine()}), {arithmetic}"
        f"load average {load:.1f} at the end; {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}."
    )


def table(rows: list[Sequence[Any]]) -> list[str]:
    """Markdown; the first row is the head."""
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def write(
    name: str,
    title: str,
    command: str,
    lines: list[str],
    arithmetic: str = "fp32, ",
    more: Sequence[str] = (),
) -> Path:
    """Print the text and write it to results/NAME-DATE.md."""
    text = "\n".join([f"# {title}, {date.today()}", "", about(command, arithmetic, more), "", *lines]) + "\n"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{date.today()}.md"
    path.write_text(text)
    print(text)
    return path
