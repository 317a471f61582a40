"""What Python's resource tracker does to a thread's signal mask is undone."""

import signal
from multiprocessing import resource_tracker

import pytest

from megatron_internvlx.signal_mask import keep_signal_mask

HELD = {signal.SIGINT, signal.SIGTERM}


def now() -> set[int]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.fixture
def tracker(monkeypatch):
    """One that nothing has started yet."""
    new = resource_tracker.ResourceTracker()
    monkeypatch.setattr(resource_tracker, "ensure_running", new.ensure_running)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    yield new
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    new._stop()


def test_python_still_forgets_the_mask(tracker):
    """Otherwise signal_mask.py has no reason to be."""
    tracker.ensure_running()
    assert not HELD & now()


def test_processes_started_inside_inherit_the_mask(tracker):
    with keep_signal_mask():
        assert tracker._fd is not None
        tracker.ensure_running()
        assert now() >= HELD
    assert now() >= HELD


def test_a_tracker_that_is_started_anew_inside(tracker):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # as without --exit-signal-handler
    with keep_signal_mask():
        tracker._stop()
        tracker.ensure_running()
    assert HELD & now() == {signal.SIGINT}
