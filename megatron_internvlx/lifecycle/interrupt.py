"""Ctrl-C: one line and the end of the run, at whatever moment, and a checkpoint first where SIGTERM would make one.

SIGINT is blocked, also in everything that a rank starts, and a thread waits for it. An exception in the main
thread would not do: it is raised only when Python code runs there (a rank may wait for others in a collective),
in the middle of anything, and comes out as a traceback of every rank and every loader worker.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from megatron_internvlx import files
from megatron_internvlx.lifecycle import complaint
from megatron_internvlx.ranks import is_first_rank
from megatron_internvlx.signal_mask import keep_signal_mask

INTERRUPTED = 130  # what a shell reports after SIGINT
_WATCHED = (signal.SIGINT, signal.SIGTERM)
_LAST_ACTS = 10.0  # seconds for what a run does when it is ended


class Interrupts:
    """What Ctrl-C does to this process. `arm` is called before anything heavy is imported.

    Args:
        told: called with SIGTERM, which the thread may take in the main thread's place.
    """

    def __init__(self, told: Callable[[int], None] = lambda number: None) -> None:
        self.told = told
        self.asked = False
        """The run ends after this step, with a checkpoint."""
        self.ending = False
        self.can_finish_step = False
        """Whether somebody will look at `asked` after the step."""
        self.newest: Callable[[], str] = lambda: "training has not begun"
        """Says what is left of the run, when it is known."""
        self.last_acts: list[Callable[[], None]] = []
        """Called when the run is ended at once, in another thread than the main one, for 10 s at most."""
        self._thread: threading.Thread | None = None

    def arm(self) -> None:
        """From now on Ctrl-C is taken by this object; safe to repeat."""
        self.asked = self.ending = self.can_finish_step = False
        self.newest, self.last_acts = lambda: "training has not begun", []
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        with keep_signal_mask():  # no semaphore of a library unblocks it later
            pass
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._watch, name="interrupts", daemon=True)
            self._thread.start()
        watcher = self._thread.ident
        assert watcher is not None
        # For threads that were there before, and do not block it.
        signal.signal(signal.SIGINT, lambda number, _frame: signal.pthread_kill(watcher, number))

    def yield_to_end(self) -> None:
        """Wait for the end if this process is being ended: its errors are those of ranks that have gone."""
        if self.ending:
            threading.Event().wait()

    def _watch(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are meant for the main thread
        # Where SIGTERM is not blocked, it ends the process and never comes here.
        while (number := signal.sigwait(_WATCHED)) == signal.SIGTERM:
            if complaint.said():
                # torchrun clears up after a rank that has named a mistake: there is nothing to save.
                os._exit(128 + signal.SIGTERM)
            self.told(number)
        if self.can_finish_step:
            self.asked = True
            self._say(
                "Ctrl-C: the run ends after this step, with a checkpoint; press it again to end at once"
            )
            signal.sigwait(_WATCHED)  # torchrun sends SIGTERM when it is told a second time
        self.end()

    def end(self) -> None:
        """End this process, after one line and the last acts; Ctrl-C again cuts those short."""
        self.ending = True
        acts = threading.Thread(target=self._act, daemon=True)
        acts.start()
        for _ in range(int(_LAST_ACTS / 0.1)):
            acts.join(0.1)
            if not acts.is_alive() or signal.sigtimedwait([signal.SIGINT], 0):
                break
        _silence()
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(INTERRUPTED)

    def _act(self) -> None:
        self._say(f"interrupted: {self.newest()}")
        for act in self.last_acts:
            with contextlib.suppress(Exception):
                act()
        _silence()
        # As every exit does first: semaphores that are not given back are complained about by Python's tracker.
        multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined]

    def _say(self, text: str) -> None:
        if not is_first_rank():
            return
        # A terminal shows ^C, or half a progress bar.
        start = "\n" if os.isatty(2) else ""
        with contextlib.suppress(OSError):
            os.write(2, f"{start}pretrain_vlm.py: {text}\n".encode())


def _silence() -> None:
    """What comes from now on is about ranks and workers that end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def newest_checkpoint(save: Path | None) -> str:
    """What is left of an interrupted run, from the directory alone: neither torch nor the run is asked."""
    if save is None:
        return "without --save there is no checkpoint"
    for iteration in files.iterations(save):
        checkpoint = files.checkpoint_directory(save, iteration)
        if (checkpoint / "metadata.json").is_file():  # Megatron writes it last
            return f"the newest checkpoint is {checkpoint}"
    return f"there is no checkpoint in {save} yet"
