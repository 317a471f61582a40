"""What trackers get: every metric has its line in the guide, and TensorBoard gets what Megatron does not write."""

import argparse
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from tests import single  # noqa: F401  # isort: skip  (sets Megatron up)
import megatron.training.training
from megatron.training import global_vars

from megatron_internvlx.data.rejects import CAUSES
from megatron_internvlx.reporting import tracking
from megatron_internvlx.reporting.lines import tracked_values
from megatron_internvlx.reporting.phases import PHASES, StartPhases
from megatron_internvlx.training import step
from tests.unit.reporting.test_lines import RECORD, TOTALS

GUIDE = (Path(__file__).parents[3] / "docs" / "tracking.md").read_text()


def start_names() -> set[str]:
    phases = StartPhases(report=lambda text: None)
    phases.start("imports")
    for name in PHASES:
        phases.enter(name)
    phases.finish()
    return set(phases.tracked_values())


def test_the_guide_explains_every_metric_and_no_other() -> None:
    rejects = dataclasses.replace(TOTALS, rejects={CAUSES[0]: 1})
    names = {
        "rejects_CAUSE" if name == f"rejects_{CAUSES[0]}" else name
        for name in tracked_values(RECORD, rejects, world_size=1)
    }
    names |= start_names()
    # The two that the forward step reports; `test_validation.py` looks at the values.
    reported = set(re.findall(r'report\["(\w+)"\]|"(loss)"', inspect.getsource(step)))
    names |= {f"validation_{a or b}" for a, b in reported}
    explained = re.findall(r"^\| `(\w+)` \|", GUIDE, flags=re.MULTILINE)
    assert len(explained) == len(set(explained))
    assert set(explained) == names


def test_megatrons_names_in_the_guide_are_megatrons() -> None:
    source = inspect.getsource(megatron.training.training)
    for name in ("learning-rate", "grad-norm", "batch-size", "loss-scale"):
        assert f"`{name}`" in GUIDE and f"add_scalar('{name}'" in source


class Writer:
    """Instead of TensorBoard's."""

    def __init__(self) -> None:
        self.values: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.values.append((name, value, step))

    def flush(self) -> None:
        raise OSError("No space left on device")


def test_tensorboard_gets_what_megatron_does_not_write() -> None:
    writer = Writer()
    sink = tracking.TensorboardSink(lambda: writer)
    sink.metrics(7, {"loss": 1.0, "tokens_per_s": 5.0, "mfu": None, "validation_accuracy": 0.5})
    sink.artifact("report.png")
    sink.close("FAILED")  # a full disk does not hide why the run failed
    assert writer.values == [("internvlx/tokens_per_s", 5.0, 7)]


def test_no_tensorboard_before_megatron_has_a_writer(monkeypatch: Any) -> None:
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", None)
    args = argparse.Namespace(mlflow_experiment=None, tensorboard_dir="runs/tb", exit_signal_handler=False)
    args.exit_duration_in_mins = None
    (sink,) = tracking.sinks(args, Path())
    sink.metrics(1, {"tokens_per_s": 5.0})
    sink.close("FINISHED")
    args.tensorboard_dir = None
    assert tracking.sinks(args, Path()) == []
