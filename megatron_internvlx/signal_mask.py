"""Keep signals blocked while Python starts processes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def keep_signal_mask() -> Iterator[None]:
    """Context in which new processes inherit this thread's signal mask; the mask is restored afterwards.

    Python's resource tracker, which the first semaphore or forkserver starts, unblocks SIGINT and SIGTERM in the
    thread that starts it, whatever the mask was (seen on CPython 3.12.1), just before the forkserver inherits it.
    So it is started here, in a separate thread, and is not started again while it runs. If it has died, a process
    started in the block may start a new one and change the mask, so the mask is restored at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    starter = threading.Thread(target=resource_tracker.ensure_running, name="resource tracker")
    starter.start()
    starter.join()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
