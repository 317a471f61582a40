"""Start of a run: the phases before the second step, each with its seconds, on the first rank.

It imports nothing that takes time: the program uses it before PyTorch is imported.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from megatron_internvlx.ranks import is_first_rank

PHASES = {
    "imports": ("imports", "importing PyTorch and Megatron"),
    "arguments": ("arguments and data checked in", "checking arguments and data"),
    "groups": ("process groups", "creating the process groups"),
    "model": ("model", "building the model and the optimizer"),
    "checkpoint": ("checkpoint", "loading the checkpoint"),
    "data": ("data", "starting the data loaders"),
    "first_step": ("first step", "taking the first step, which compiles kernels on a GPU"),
}
"""Phases in their order: name -> (text when it has ended, text when it begins)."""


class StartPhases:
    """Clock of the phases of a start, which prints one line at each change.

    It does nothing before `start` and after `finish`, so that hooks may stay where they are for the whole run.

    Args:
        clock: time in seconds from any origin.
        report: receiver of the lines.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, report: Callable[[str], None] | None = None
    ) -> None:
        self._clock, self._report = clock, report or _print_on_first_rank
        self._current: str | None = None
        self._since = 0.0
        self.seconds: dict[str, float] = {}
        """Seconds of the phases that have ended, by name."""

    def start(self, phase: str) -> None:
        """Begin the first phase of a start; earlier ones are forgotten."""
        self.seconds = {}
        self._current, self._since = phase, self._clock()
        self._report(PHASES[phase][1])

    def enter(self, phase: str) -> None:
        """End the current phase and begin another; nothing if that one is current or no start is going on."""
        if self._current is None or phase == self._current:
            return
        ended = self._end()
        self._current = phase
        self._report(f"{ended}; {PHASES[phase][1]}")

    def finish(self) -> None:
        """End the last phase and the start; nothing if no start is going on."""
        if self._current is None:
            return
        ended = self._end()
        self._current = None
        self._report(f"{ended}; {sum(self.seconds.values()):.1f} s since the start")

    def before(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function, so that a phase begins with its first call."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter(phase)
            return function(*args, **kwargs)

        call.__wrapped__ = function  # type: ignore[attr-defined]
        return call

    def tracked_values(self) -> dict[str, float]:
        """Seconds of every phase and of the start, for trackers such as MLflow."""
        each = {f"start_{name}_seconds": value for name, value in self.seconds.items()}
        return {**each, "start_seconds": sum(self.seconds.values())}

    def _end(self) -> str:
        """Add the seconds of the current phase; returns the text about it."""
        assert self._current is not None
        now = self._clock()
        seconds, self._since = now - self._since, now
        self.seconds[self._current] = self.seconds.get(self._current, 0.0) + seconds
        return f"{PHASES[self._current][0]} {seconds:.1f} s"


def _print_on_first_rank(text: str) -> None:
    if is_first_rank():
        print(f"pretrain_vlm.py: {text}", file=sys.stderr, flush=True)


START = StartPhases()
"""Phases of this process's start."""
