"""Signals that end a run after its step, and the clock of a step that hangs."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from megatron_internvlx.lifecycle import signals, stall
from megatron_internvlx.lifecycle.saves import GuardedSaves
from megatron_internvlx.lifecycle.setup import RunSetup
from megatron_internvlx.lifecycle.signals import StopSignals
from megatron_internvlx.lifecycle.stall import Position, StallClock
from megatron_internvlx.training.step import ForwardStep


def watch(
    args: argparse.Namespace,
    setup: RunSetup,
    stop: StopSignals,
    step: ForwardStep,
    saves: GuardedSaves,
    failed: Callable[[str], None],
) -> None:
    """Take Megatron's place in handling signals, and start the clock; without `--exit-signal-handler`, let them kill.

    Args:
        args: Megatron's arguments, in which it counts the steps of this run.
        setup: the run's directory and ranks.
        stop: answers Megatron's question whether to stop.
        step: knows what this rank does.
        saves: knows whether a checkpoint is being written.
        failed: called with the reason when a step takes too long.
    """
    if not setup.handles_signals:
        signals.unblock_stop_signals()
        return

    def position() -> Position:
        """Where this rank is, for those who wait for it."""
        doing = step.doing
        if saves.saving:
            doing = "saving a checkpoint"
        elif stop.waiting:
            doing = "at the end of the step, where it waits for the others"
        # Megatron sets the first when training begins, the second when a checkpoint was loaded.
        done = getattr(args, "curr_iteration", getattr(args, "iteration", 0))
        return Position(done + 1, step.passes, doing)

    import megatron.training.global_vars as global_vars

    # Instead of Megatron's, which handles one signal and waits for the device at every step.
    global_vars._GLOBAL_SIGNAL_HANDLER = stop
    signals.catch_in_other_threads()
    folder = setup.save / stall.FOLDER if setup.save else None
    seconds = setup.settings.stall_minutes * 60
    stop.clock = StallClock(seconds, folder, setup.rank, setup.world_size, position, failed)
