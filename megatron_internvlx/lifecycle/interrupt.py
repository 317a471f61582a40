"""Ctrl-C: one line and the end of the run at any moment, after a checkpoint where SIGTERM would save one.

SIGINT is blocked, in every child process too, and a thread waits for it. A KeyboardInterrupt in the main thread
is not enough: Python raises it only while Python code runs there (a rank may wait in a collective), in the middle
of anything, and it prints a traceback for every rank and every loader worker.
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
from megatron_internvlx.exit_codes import INTERRUPTED
from megatron_internvlx.lifecycle import complaint
from megatron_internvlx.ranks import is_first_rank
from megatron_internvlx.signal_mask import keep_signal_mask

_WATCHED = (signal.SIGINT, signal.SIGTERM)
_LAST_ACTS = 10.0  # seconds that `last_acts` may take


class Interrupts:
    """Ctrl-C handling of this process. Call `arm` before importing anything heavy.

    Args:
        on_sigterm: called with SIGTERM, which the thread may receive instead of the main thread.
    """

    def __init__(self, on_sigterm: Callable[[int], None] = lambda number: None) -> None:
        self.on_sigterm = on_sigterm
        self.asked = False
        """Whether the run is to end after this step, with a checkpoint."""
        self.ending = False
        """Whether this process is ending at once."""
        self.can_finish_step = False
        """Whether the training loop checks `asked` after the step."""
        self.newest: Callable[[], str] = lambda: "training has not begun"
        """Describes the newest checkpoint, once the run knows its directory."""
        self.last_acts: list[Callable[[], None]] = []
        """Functions to call when the run ends at once: from another thread than the main one, within 10 s in all."""
        self._thread: threading.Thread | None = None

    def arm(self) -> None:
        """Start handling Ctrl-C here; safe to repeat."""
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
        """Block forever if this process is ending: errors raised now come from ranks that are gone."""
        if self.ending:
            threading.Event().wait()

    def _watch(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are meant for the main thread
        # Where SIGTERM is not blocked, it ends the process and never comes here.
        while (number := signal.sigwait(_WATCHED)) == signal.SIGTERM:
            if complaint.mistake_was_reported():
                # torchrun clears up after a rank that has named a mistake: there is nothing to save.
                os._exit(128 + signal.SIGTERM)
            self.on_sigterm(number)
        if self.can_finish_step:
            self.asked = True
            self._print(
                "Ctrl-C: the run ends after this step, with a checkpoint; press it again to end at once"
            )
            signal.sigwait(_WATCHED)  # torchrun sends SIGTERM when it receives a second SIGINT
        self.end()

    def end(self) -> None:
        """End this process after one line and `last_acts`; a second Ctrl-C skips the rest of those."""
        self.ending = True
        acts = threading.Thread(target=self._run_last_acts, daemon=True)
        acts.start()
        for _ in range(int(_LAST_ACTS / 0.1)):
            acts.join(0.1)
            if not acts.is_alive() or signal.sigtimedwait([signal.SIGINT], 0):
                break
        _discard_output()
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(INTERRUPTED)

    def _run_last_acts(self) -> None:
        self._print(f"interrupted: {self.newest()}")
        for act in self.last_acts:
            with contextlib.suppress(Exception):
                act()
        _discard_output()
        # As every exit does first: Python's tracker warns about semaphores that are not released.
        multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined]

    def _print(self, text: str) -> None:
        if not is_first_rank():
            return
        # A terminal shows ^C, or half a progress bar.
        start = "\n" if os.isatty(2) else ""
        with contextlib.suppress(OSError):
            os.write(2, f"{start}pretrain_vlm.py: {text}\n".encode())


def _discard_output() -> None:
    """Discard further output, which is only about ranks and workers that end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def newest_checkpoint(save: Path | None) -> str:
    """Describe the newest complete checkpoint in a directory; reads file names only, without torch."""
    if save is None:
        return "without --save there is no checkpoint"
    for iteration in files.iterations(save):
        checkpoint = files.checkpoint_directory(save, iteration)
        if (checkpoint / "metadata.json").is_file():  # Megatron writes it last
            return f"the newest checkpoint is {checkpoint}"
    return f"there is no checkpoint in {save} yet"
