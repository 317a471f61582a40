"""Signals that end a run after its step, and the clock of a step that hangs."""

from __future__ import annotations

from collections.abc import Callable

from megatron_internvlx.lifecycle import signals, stall
from megatron_internvlx.lifecycle.saves import GuardedSaves
from megatron_internvlx.lifecycle.setup import RunSetup
from megatron_internvlx.lifecycle.signals import StopSignals
from megatron_internvlx.lifecycle.stall import Position, StallClock
from megatron_internvlx.megatron_settings import Progress
from megatron_internvlx.training.step import ForwardStep


def watch(
    progress: Progress,
    setup: RunSetup,
    stop: StopSignals,
    step: ForwardStep,
    saves: GuardedSaves,
    failed: Callable[[str], None],
) -> None:
    """Handle signals instead of Megatron and start the clock; without `--exit-signal-handler`, let signals kill.

    Args:
        progress: steps of this run so far.
        setup: the run's directory and ranks.
        stop: handler that Megatron asks after each step; it gets the clock.
        step: the forward step, which records what this rank is doing.
        saves: records whether a checkpoint is being written.
        failed: called with the reason when a step takes too long.
    """
    if not setup.handles_signals:
        signals.unblock_stop_signals()
        return

    def position() -> Position:
        """Position of this rank, for its heartbeat."""
        doing = step.doing
        if saves.saving:
            doing = "saving a checkpoint"
        elif stop.waiting:
            doing = "at the end of the step, where it waits for the others"
        return Position(progress.finished_steps + 1, step.passes, doing)

    import megatron.training.global_vars as global_vars

    # Instead of Megatron's, which handles one signal and waits for the device at every step.
    global_vars._GLOBAL_SIGNAL_HANDLER = stop
    signals.catch_in_other_threads()
    folder = setup.save / stall.FOLDER if setup.save else None
    seconds = setup.settings.stall_minutes * 60
    stop.clock = StallClock(seconds, folder, setup.rank, setup.world_size, position, failed)
