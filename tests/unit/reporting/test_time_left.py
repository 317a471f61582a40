"""Time left: steps, evaluations and checkpoints to come, from an injected clock."""

import pytest

from megatron_internvlx.reporting.time_left import Left, TimeLeft, _events


class Clock:
    """Clock that a test sets."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_unknown_until_a_step_after_the_first_has_ended() -> None:
    """The first step compiles for half a minute, and Megatron's mean of the first interval holds it."""
    clock = Clock()
    left = TimeLeft(clock=clock)
    assert left.after(0, 100) is None
    left.first_step_ended(1)
    left.interval_ended(1, 30.0)
    assert left.after(1, 100) is None
    clock.now += 9 * 2
    left.interval_ended(10, (30.0 + 9 * 2) / 10)
    assert left.after(10, 100) == Left(90 * 2.0, complete=True)


def test_known_with_the_first_line_of_a_resumed_run() -> None:
    """Steps that an earlier start made do not count, pauses neither."""
    clock = Clock()
    left = TimeLeft(eval_interval=405, save_interval=1000, clock=clock)
    left.first_step_ended(401)
    clock.now += 9 * 2 + 7 + 5
    left.evaluated(7.0)
    left.saved(5.0)
    left.interval_ended(410, 4.8)
    # 590 steps of 2 s; evaluations after 810 and 1,000; a checkpoint after 1,000
    assert left.after(410, 1000) == Left(590 * 2.0 + 2 * 7 + 5, complete=True)


def test_one_slow_interval_changes_nothing() -> None:
    clock = Clock()
    left = TimeLeft(clock=clock)
    left.first_step_ended(1)
    clock.now += 9
    for step, seconds in ((10, 4.0), (20, 1.0), (30, 1.1), (40, 90.0), (50, 0.9)):
        left.interval_ended(step, seconds)
    assert left.after(50, 100) == Left(50.0, complete=True)


def test_what_was_never_timed_makes_it_a_lower_bound() -> None:
    clock = Clock()
    left = TimeLeft(eval_interval=20, save_interval=50, clock=clock)
    left.first_step_ended(1)
    clock.now += 9
    left.interval_ended(10, 1.0)
    assert str(left.after(10, 100)) == "> 1 min 30 s"
    left.evaluated(4.0)
    assert left.after(10, 100) == Left(90 + 5 * 4.0, complete=False)  # after 20, 40, 60, 80 and 100
    left.saved(10.0)
    left.saved(100.0)
    left.saved(11.0)
    assert left.after(10, 100) == Left(90 + 5 * 4.0 + 2 * 11.0, complete=True)
    assert left.after(100, 100) == Left(4.0 + 11.0, complete=True)


@pytest.mark.parametrize(
    ("step", "steps", "interval", "events"),
    [
        (0, 40, 10, 5), (20, 40, 10, 3), (21, 40, 10, 2), (30, 40, 10, 2), (31, 40, 10, 1),
        (40, 40, 10, 1), (3, 45, 20, 3), (3, 5, 1000, 1), (50, 40, 10, 1),
    ],
)  # fmt: skip
def test_events_after_a_line(step: int, steps: int, interval: int, events: int) -> None:
    """The line of a step comes before its evaluation, and the last step's are made in any case."""
    assert _events(step, steps, interval) == events
