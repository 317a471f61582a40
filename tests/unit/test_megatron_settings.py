"""Typed views of Megatron's arguments: what they add to its values."""

from dataclasses import fields
from pathlib import Path

import pytest

from megatron_internvlx.config import settings_from
from megatron_internvlx.megatron_settings import (
    Batches,
    CheckpointFiles,
    Execution,
    Loop,
    Parallelism,
    Progress,
)
from tests.namespaces import parsed


@pytest.mark.parametrize("view", [Batches, CheckpointFiles, Execution, Loop, Parallelism])
def test_every_view_is_made_from_the_namespace(view: type) -> None:
    args = parsed()
    expected = {field.name: vars(args).get(field.name, field.default) for field in fields(view)}
    assert vars(settings_from(args, view)) == expected


@pytest.mark.parametrize(("rank", "last"), [(0, False), (2, False), (3, True)])
def test_the_last_rank(rank: int, last: bool) -> None:
    assert settings_from(parsed(rank=rank, world_size=4), Parallelism).is_last_rank is last


@pytest.mark.parametrize(
    ("save", "folder"), [(None, None), ("", None), ("msc://bucket/run", None), ("runs/a", Path("runs/a"))]
)
def test_the_directory_of_save(save: str | None, folder: Path | None) -> None:
    assert settings_from(parsed(save=save), CheckpointFiles).save_folder == folder


def test_progress_follows_the_namespace() -> None:
    args = parsed()
    progress = Progress(args)
    assert (progress.has_begun, progress.loaded_step, progress.finished_steps) == (False, 0, 0)
    args.load, args.iteration = "run", 5  # a checkpoint is chosen and loaded
    assert (progress.has_begun, progress.loaded_step, progress.finished_steps) == (False, 5, 5)
    assert progress.loaded_from == "run"
    args.curr_iteration = 7
    assert (progress.has_begun, progress.loaded_step, progress.finished_steps) == (True, 5, 7)
