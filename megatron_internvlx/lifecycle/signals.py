"""Signals that end a run: SIGUSR1 and SIGTERM after the current step, with a checkpoint; Ctrl-C likewise, or at once.

The signals are blocked rather than handled. SLURM sends them to every process of a job step, and a mask
is inherited by everything that a rank starts (loader workers, Megatron's savers), while a handler is lost
in a new program: a worker that died of the signal would fail the step that has yet to be saved.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from typing import TYPE_CHECKING

from megatron_internvlx.lifecycle.interrupt import Interrupts
from megatron_internvlx.lifecycle.stall import StallClock
from megatron_internvlx.signal_mask import keep_signal_mask

if TYPE_CHECKING:  # the script imports this file before it says that torch is being imported
    import torch.distributed as dist

STOP = (signal.SIGUSR1, signal.SIGTERM)
_SIGNALED, _INTERRUPTED = 1, 2

_caught: set[int] = set()
interrupts = Interrupts(on_sigterm=_caught.add)
"""Ctrl-C handling of this process."""


def block_stop_signals() -> None:
    """Block the stop signals; they stay pending until asked for. Call it before any process or thread is started."""
    _caught.clear()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    with keep_signal_mask():  # Python's tracker blocks SIGUSR1 from its start, as every process here does
        pass
    atexit.unregister(_end_daemons)
    atexit.register(_end_daemons)


def unblock_stop_signals() -> None:
    """Restore the usual effect of the signals, for runs without a checkpoint at that moment."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
    for number in _caught:  # signals that the thread waiting for Ctrl-C has received meanwhile
        signal.raise_signal(number)


def catch_in_other_threads() -> None:
    """Record signals that reach a thread without the mask: libraries start some when imported."""
    for number in STOP:
        signal.signal(number, lambda caught, _frame: _caught.add(caught))


def pending() -> bool:
    """Whether this process received a stop signal."""
    return bool(_caught or signal.sigpending().intersection(STOP))


def end_children(*, daemons_only: bool = False) -> None:
    """Kill loader workers that still run: with SIGTERM blocked, nothing else would end them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their end for a failure
    for child in multiprocessing.active_children():
        if child.daemon or not daemons_only:
            child.kill()


def _end_daemons() -> None:
    """Kill daemon workers when Python exits: multiprocessing would send SIGTERM, which they block, and wait forever."""
    if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        end_children(daemons_only=True)


class StopSignals:
    """Replacement for Megatron's signal handler, which Megatron asks after every step on every rank.

    The ranks agree over a host group, so nothing waits for the device. Each call restarts the clock that
    detects a hung step.
    """

    def __init__(self) -> None:
        self.received = False
        self.interrupted = False
        """Whether it was Ctrl-C."""
        self.clock: StallClock | None = None
        self.waiting = False
        """Whether this rank finished its step and waits for the others."""
        self._group: dist.ProcessGroup | None = None

    def signals_received(self) -> list[bool]:
        """Whether any rank received a stop signal, as the list that Megatron expects."""
        import torch
        import torch.distributed as dist

        signal_code = torch.tensor([_INTERRUPTED if interrupts.asked else _SIGNALED if pending() else 0])
        if dist.get_world_size() > 1:
            if self._group is None:
                self._group = dist.new_group(backend="gloo")
            self.waiting = True
            dist.all_reduce(signal_code, op=dist.ReduceOp.MAX, group=self._group)
            self.waiting = False
        if self.clock is not None:
            self.clock.restart()
        # If Python's resource tracker was killed and restarted, that unblocked them (signal_mask.py).
        signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP, signal.SIGINT))
        self.received = bool(signal_code.item())
        self.interrupted = signal_code.item() == _INTERRUPTED
        # From now on Ctrl-C waits for the end of a step. Ranks reach this line at slightly different times: a
        # Ctrl-C in between, in the first step only, ends at once those that have not, and so the run.
        interrupts.can_finish_step = True
        return [self.received]

    def release(self) -> None:
        """Stop the clock; the signals stay blocked, so that nothing disturbs the end."""
        interrupts.can_finish_step = False
        if self.clock is not None:
            self.clock.release()
