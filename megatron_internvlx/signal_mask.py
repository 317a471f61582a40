"""Blocked signals that stay blocked while Python starts processes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def mask_kept() -> Iterator[None]:
    """Processes started inside inherit the signal mask of this thread, and after it the mask is what it was.

    Python's resource tracker, which the first semaphore or forkserver starts, unblocks SIGINT and SIGTERM in the
    thread that starts it, whatever the mask was (seen on CPython 3.12.1), just before the forkserver inherits it.
    So it is started here, by a thread of its own. While it lives nothing starts it again; should it have died, a
    process started inside may start another one: hence the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    starter = threading.Thread(target=resource_tracker.ensure_running, name="resource tracker")
    starter.start()
    starter.join()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
