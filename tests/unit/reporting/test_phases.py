"""Phases of a start: one line per change, with the seconds of an injected clock."""

from megatron_internvlx.reporting.phases import PHASES, StartPhases


class Clock:
    """Clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_every_phase_ends_with_its_seconds() -> None:
    clock, lines = Clock(), []
    phases = StartPhases(clock, lines.append)
    names = list(PHASES)
    phases.start(names[0])
    for name in names[1:]:
        clock.now += 2
        phases.enter(name)
    clock.now += 30.04
    phases.finish()
    assert lines[0] == "importing PyTorch and Megatron"
    assert lines[1] == "imports 2.0 s; checking arguments and data"
    assert lines[-1] == "first step 30.0 s; 42.0 s since the start"
    assert len(lines) == len(PHASES) + 1
    assert phases.seconds.keys() == PHASES.keys()
    assert phases.tracked_values()["start_imports_seconds"] == 2.0
    assert round(phases.tracked_values()["start_seconds"], 2) == 42.04


def test_hooks_do_nothing_before_a_start_and_after_it() -> None:
    """Megatron loads checkpoints and builds loaders at other times too."""
    clock, lines = Clock(), []
    phases = StartPhases(clock, lines.append)
    load = phases.before("checkpoint", lambda name, more=0: (name, more))
    phases.enter("model")
    phases.finish()
    assert load("a", more=1) == ("a", 1) and lines == []
    phases.start("imports")
    phases.finish()
    load("b")
    assert len(lines) == 2
    phases.start("imports")  # another run in the same process
    assert phases.seconds == {}


def test_a_wrapped_function_begins_its_phase() -> None:
    clock, lines = Clock(), []
    phases = StartPhases(clock, lines.append)

    def load() -> None:
        clock.now += 5

    wrapped = phases.before("checkpoint", load)
    assert wrapped.__wrapped__ is load  # type: ignore[attr-defined]
    phases.start("model")
    wrapped()
    wrapped()  # the data of another model chunk, for instance: the same phase goes on
    phases.finish()
    assert phases.seconds == {"model": 0.0, "checkpoint": 10.0}
    assert lines[1] == "model 0.0 s; loading the checkpoint"
