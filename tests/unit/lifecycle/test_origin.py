"""Which checkpoint a run goes on from before process groups exist, and what is said of one that does not fit."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from tests import single  # noqa: F401  # isort: skip  (sets Megatron up)
import pytest
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_internvlx import files
from megatron_internvlx.lifecycle import origin, signals
from megatron_internvlx.lifecycle.continuation import Continuation
from megatron_internvlx.lifecycle.outcome import Outcome
from megatron_internvlx.lifecycle.resume import RunState
from megatron_internvlx.lifecycle.setup import setup_from
from megatron_internvlx.platform.schedule import ParameterGroupMismatch
from tests.namespaces import parsed
from tests.unit.lifecycle.test_resume import checkpoint

MADE = {
    "pipeline_model_parallel_size": 2,
    "pipeline_model_parallel_layout": "Ett|tL",
    "num_layers": 3,
    "freeze_llm": False,
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments in every checkpoint, by its name or for all; these here hold none."""
    known: dict[str, Any] = {"": Namespace(**MADE)}

    def read(folder: Path) -> Namespace:
        if isinstance(found := known.get(folder.name, known[""]), Exception):
            raise found
        return found

    monkeypatch.setattr(origin, "made_with", read)
    return known


def arguments(save: Path | None, **changes: Any) -> Namespace:
    return parsed(**{"save": save and str(save), "auto_resume": True, "world_size": 2} | MADE | changes)


def test_the_checkpoint_that_a_run_goes_on_from(tmp_path: Path, made: dict) -> None:
    save, load = tmp_path / "save", tmp_path / "load"
    assert origin.resumed_checkpoint(arguments(save)) is None  # a first start
    for iteration in (3, 5, 7):
        checkpoint(save, iteration)
        checkpoint(load, iteration)
    (save / "iter_0000007" / "metadata.json").unlink()
    made["iter_0000005"] = OSError("torn")
    assert origin.resumed_checkpoint(arguments(save)) == save / "iter_0000003"
    # --auto-resume goes before --load, as in the run itself.
    (load / files.TRACKER).write_text("7")
    assert origin.resumed_checkpoint(arguments(save, load=str(load))) == save / "iter_0000003"
    assert origin.resumed_checkpoint(arguments(save, auto_resume=False)) is None
    named = {"load": str(load)}
    assert origin.resumed_checkpoint(arguments(None, **named)) == load / "iter_0000007"
    assert origin.resumed_checkpoint(arguments(None, **named, ckpt_step=3)) == load / "iter_0000003"
    assert origin.resumed_checkpoint(arguments(None, **named, finetune=True)) is None
    with pytest.raises(ValueError, match=r"iter_0000005 is broken .*torn.*another --ckpt-step"):
        origin.layout_to_keep(arguments(None, **named, ckpt_step=5))
    (load / files.TRACKER).write_text("release")  # an import has no optimizer state
    assert origin.resumed_checkpoint(arguments(None, **named)) is None


def test_the_layout_to_keep(tmp_path: Path, made: dict) -> None:
    assert origin.layout_to_keep(arguments(tmp_path)) is None
    checkpoint(tmp_path, 3)
    assert origin.layout_to_keep(arguments(tmp_path)) == "Ett|tL"
    assert origin.layout_to_keep(arguments(tmp_path, pipeline_model_parallel_size=1)) is None
    made[""] = Namespace(**MADE | {"pipeline_model_parallel_layout": None})
    assert origin.layout_to_keep(arguments(tmp_path)) is None


@pytest.mark.parametrize(
    ("made_then", "now", "said"),
    [
        (
            {"rvtc": "area"},
            {"rvtc": "area"},
            "called edge today .area before., and --rvtc is area: .* --rvtc edge",
        ),
        ({"rvtc": "area"}, {"rvtc": "off"}, "called edge today"),
        ({"rvtc": "area"}, {"rvtc": "edge"}, None),
        ({"rvtc": "edge"}, {"rvtc": "edge"}, None),
        (
            {"rvtc": "edge"},
            {"rvtc": "edge", "min_tiles": 2},
            "--min-tiles 2 it differs from all present ones",
        ),
        ({"rvtc": "off"}, {"rvtc": "area"}, None),
        ({"rvtc": "area", "static_image_size": True}, {"rvtc": "area"}, None),
        ({"rvtc": "area", "rvtc_version": 2}, {"rvtc": "area"}, None),
        ({}, {"rvtc": "area"}, None),
    ],
)
def test_a_resumed_run_keeps_its_tiles(
    tmp_path: Path, made: dict, made_then: dict, now: dict, said: str | None
) -> None:
    """Names of before the version: `area` was the rule that is `edge` today."""
    made[""] = Namespace(**MADE | made_then)
    origin.check_tile_rule(arguments(tmp_path, **now))  # nothing to resume
    checkpoint(tmp_path, 3)
    if said is None:
        origin.check_tile_rule(arguments(tmp_path, **now))
        return
    with pytest.raises(ValueError, match=f"iter_0000003 was trained with .*{said}"):
        origin.check_tile_rule(arguments(tmp_path, **now))


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch):
    """What a caller is told of an error that ends training with these arguments; it is recorded, too."""
    monkeypatch.setattr(signals.interrupts, "last_acts", [])

    def record(args: Namespace, error: BaseException) -> ValueError | None:
        mistake = origin.mistake_behind(args, error)
        Outcome(setup_from(args), signals.StopSignals()).crashed(error, mistake)
        return mistake

    return record


def failure() -> CheckpointException:
    return CheckpointException("load", {1: (ValueError("Size mismatch between saved 3 and current 4"), None)})  # type: ignore[dict-item]


def test_a_checkpoint_that_does_not_fit(tmp_path: Path, made: dict, crash) -> None:
    checkpoint(tmp_path, 3)
    now = arguments(tmp_path, pipeline_model_parallel_layout="Et|ttL", freeze_llm=True)
    told = crash(now, failure())
    assert str(told).startswith(
        f"{tmp_path / 'iter_0000003'} does not fit this run, checkpoint -> arguments: "
        "--pipeline-model-parallel-layout 'Ett|tL' -> 'Et|ttL', --freeze-llm False -> True: give what"
    )
    state = RunState.read(tmp_path)
    assert state.status == "failed"
    assert state.reason.endswith(str(told))


@pytest.mark.parametrize("changes", [{}, {"num_layers": 4, "curr_iteration": 3}], ids=["fits", "later"])
def test_another_failure_is_recorded_as_itself(tmp_path: Path, made: dict, crash, changes: dict) -> None:
    checkpoint(tmp_path, 3)
    assert crash(arguments(tmp_path, **changes), failure()) is None
    state = RunState.read(tmp_path)
    assert state.status == "failed"
    assert state.reason.endswith(": ValueError: Size mismatch between saved 3 and current 4")


def test_other_groups_are_a_mistake(tmp_path: Path, crash) -> None:
    error = ParameterGroupMismatch("of others")
    assert crash(arguments(tmp_path), error) is error
    assert RunState.read(tmp_path).reason.endswith("of others")


def continuation(args: Namespace) -> Continuation:
    return Continuation(args, setup_from(args), signals.StopSignals())


def test_ranks_that_found_other_layouts_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_rank_0(objects: list, src: int) -> None:
        objects[0] = "Et|ttL"

    monkeypatch.setattr(dist, "broadcast_object_list", of_rank_0)
    continuation(arguments(tmp_path, pipeline_model_parallel_layout="Et|ttL")).check_layout()
    with pytest.raises(RuntimeError, match=r"'Ett\|tL' and that of rank 0 'Et\|ttL'"):
        continuation(arguments(tmp_path)).check_layout()
    monkeypatch.undo()
    continuation(arguments(tmp_path, pipeline_model_parallel_layout=None)).check_layout()


def test_ranks_that_counted_other_epochs_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_rank_0(objects: list, src: int) -> None:
        objects[0] = 11

    monkeypatch.setattr(dist, "broadcast_object_list", of_rank_0)
    continuation(arguments(tmp_path, epochs=1, train_iters=11)).check_length()
    with pytest.raises(RuntimeError, match="--epochs 1 are 10 steps on this rank and 11 on rank 0"):
        continuation(arguments(tmp_path, epochs=1)).check_length()
    continuation(arguments(tmp_path)).check_length()
