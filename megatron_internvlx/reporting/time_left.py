"""Time until the end of a run: the steps, evaluations and checkpoints that are still to come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from megatron_internvlx.planning.epoch import duration

RECENT = (
    20  # log intervals; a shorter memory follows every hiccup of a cluster, a longer one hides a slow node
)


@dataclass(frozen=True)
class Left:
    """Estimate of the time until a run ends."""

    seconds: float
    complete: bool
    """False if evaluations or checkpoints are to come of which none has been timed yet: it takes longer."""

    def __str__(self) -> str:
        return ("" if self.complete else "> ") + duration(self.seconds)


class TimeLeft:
    """Estimator of the time until the last step, from this start's own steps, evaluations and checkpoints.

    Steps count with the median of recent log intervals, evaluations and checkpoints with their own medians. The first
    step, which compiles kernels, is left out, so that a resumed run has an estimate with its first line.

    Args:
        eval_interval: steps between two evaluations; None without held-out data.
        save_interval: steps between two checkpoints; None without any.
        clock: time in seconds from any origin.
    """

    def __init__(
        self,
        *,
        eval_interval: int | None = None,
        save_interval: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._eval_interval, self._save_interval = eval_interval, save_interval
        self._clock = clock
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._evaluations: deque[float] = deque(maxlen=RECENT)
        self._saves: deque[float] = deque(maxlen=RECENT)
        self._first_step: tuple[int, float] | None = None

    def first_step_ended(self, step: int) -> None:
        """Note the end of the first step of this start, and its number."""
        self._first_step = step, self._clock()

    def evaluated(self, seconds: float) -> None:
        """Note the time that an evaluation took."""
        self._evaluations.append(seconds)

    def saved(self, seconds: float) -> None:
        """Note the time that a checkpoint took."""
        self._saves.append(seconds)

    def interval_ended(self, step: int, seconds: float) -> None:
        """Note a log interval.

        Args:
            step: its last step.
            seconds: time per step, without evaluations and checkpoints.
        """
        if self._steps:
            self._steps.append(seconds)
        elif self._first_step is not None and step > self._first_step[0]:
            # These seconds are a mean with the first step in it.
            first, end = self._first_step
            pauses = sum(self._evaluations) + sum(self._saves)
            self._steps.append(max(self._clock() - end - pauses, 0.0) / (step - first))

    def after(self, step: int, steps: int) -> Left | None:
        """Estimate after a step, before the evaluation and the checkpoint that may follow it; None if not known.

        Args:
            step: number of the step.
            steps: number of the last step of the run.
        """
        if not self._steps:
            return None
        seconds = median(self._steps) * max(steps - step, 0)
        complete = True
        for interval, timed in (
            (self._eval_interval, self._evaluations),
            (self._save_interval, self._saves),
        ):
            if interval is None:
                continue
            if timed:
                seconds += median(timed) * _events(step, steps, interval)
            else:
                complete = False
        return Left(seconds, complete)


def _events(step: int, steps: int, interval: int) -> int:
    """Number of evaluations (or checkpoints) to come: every `interval` steps, and one after the last step."""
    if step >= steps:
        return 1
    return -(-steps // interval) - -(-step // interval) + 1
