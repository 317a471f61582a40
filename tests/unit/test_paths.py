"""Paths are looked at before Megatron is imported, and nothing is refused that the whole parser would take."""

from pathlib import Path

import pytest

from megatron_internvlx import paths


def command(folder: Path, **changes: str | None) -> list[str]:
    """A command line whose paths are all there, but for the changes (None: left out)."""
    named: dict[str, str | None] = {}
    for flag in paths.PATH_FLAGS:
        path = folder / flag.strip("-")
        path.mkdir(exist_ok=True)
        named[flag] = str(path)
    named |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return ["--lr", "1e-4", *(word for flag, path in named.items() if path for word in (flag, path))]


@pytest.mark.parametrize("flag", paths.PATH_FLAGS)
def test_a_mistyped_path_is_named(tmp_path, flag):
    name = flag[2:].replace("-", "_")
    paths.check_command_line(command(tmp_path))
    with pytest.raises(ValueError, match=f"{flag} nowhere: no such (file or )?directory"):
        paths.check_command_line(command(tmp_path, **{name: "nowhere"}))
    with pytest.raises(ValueError, match=f"{flag} nowhere"):
        paths.check_command_line([*command(tmp_path, **{name: None}), f"{flag}=nowhere"])
    paths.check_command_line(command(tmp_path, **{name: "msc://bucket/nowhere"}))
    paths.check_command_line([*command(tmp_path), flag])  # without a value: for the whole parser to say


def test_the_last_one_counts(tmp_path):
    paths.check_command_line(["--data", "nowhere", *command(tmp_path)])


@pytest.mark.parametrize("flag", paths.WEIGHT_FLAGS)
def test_the_own_directory_may_come_later(tmp_path, flag):
    new = str(tmp_path / "new")
    paths.check_command_line(command(tmp_path, **{flag[2:].replace("-", "_"): new, "save": new}))


def test_a_dry_run_needs_a_recipe_alone(tmp_path):
    words = ["--dry-run", "--data", "nowhere", "--tokenizer-model", "nowhere", "--load", "nowhere"]
    paths.check_command_line(words)
    with pytest.raises(ValueError, match="--recipe nowhere"):
        paths.check_command_line([*words, "--recipe", "nowhere"])


def test_one_rank_of_a_node_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    paths.check_command_line(command(tmp_path, data="nowhere"))
