"""What a first start begins from: named weights are there, and an import is not passed over."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_internvlx import files
from megatron_internvlx.commands import convert
from megatron_internvlx.lifecycle import start
from megatron_internvlx.megatron_settings import CheckpointFiles
from megatron_internvlx.model.presets import preset
from tests.unit.lifecycle.test_resume import checkpoint

ROOT = Path(__file__).parents[3]


def check_start(*, auto_resume: bool = True, freeze_llm: bool = False, **given: Any) -> None:
    unset = {"load": None, "pretrained_checkpoint": None, "save": None, "ckpt_step": None, "finetune": False}
    start.check_start(CheckpointFiles(**unset | given), auto_resume=auto_resume, freeze_llm=freeze_llm)


@pytest.fixture
def imported(tmp_path: Path) -> str:
    (tmp_path / "imported" / "release").mkdir(parents=True)
    (tmp_path / "imported" / files.TRACKER).write_text("release")
    return str(tmp_path / "imported")


def test_an_import_as_save_is_not_passed_over(imported: str) -> None:
    """Megatron would train from random weights, and move the import's tracker on."""
    with pytest.raises(ValueError, match=re.escape(f"--pretrained-checkpoint {imported}, and another")):
        check_start(save=imported)
    with pytest.raises(ValueError, match="no flag loads its weights"):
        check_start(save=imported, auto_resume=False)
    check_start(save=imported, load=imported)
    check_start(save=imported, pretrained_checkpoint=imported)


def test_a_run_that_resumes_needs_no_name(imported: str) -> None:
    checkpoint(Path(imported), 3)
    check_start(save=imported)
    (files.checkpoint_directory(Path(imported), 3) / "metadata.json").unlink()
    with pytest.raises(ValueError, match="no flag loads its weights"):  # it would set the broken one aside
        check_start(save=imported)


@pytest.mark.parametrize("flag", ["load", "pretrained_checkpoint"])
def test_a_directory_without_a_checkpoint(imported: str, tmp_path: Path, flag: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl_chat"}))
    with pytest.raises(ValueError, match=f"{tmp_path}: no checkpoint is in it"):
        check_start(**{flag: str(tmp_path)})
    check_start(**{flag: imported})
    check_start(load=str(tmp_path), save=str(tmp_path))  # its first start


def test_a_frozen_random_language_model_is_told(
    imported: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in ({}, {"load": str(tmp_path / "run")}):
        check_start(save=str(tmp_path / "run"), freeze_llm=True, **given)
        assert "the language model stays random" in capsys.readouterr().err
    check_start(save=str(tmp_path / "run"), freeze_llm=True, pretrained_checkpoint=imported)
    check_start(save=str(tmp_path / "run"))
    assert capsys.readouterr().err == ""


def test_the_import_that_the_readme_shows_is_the_model_of_its_recipes() -> None:
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^(?:ivlx|python tools/convert_checkpoint.py) import (.*)$", text, re.M)
    given = convert.parser("import").parse_args(shlex.split(command))
    recipes = set(re.findall(r"examples/recipes/internvlx_\S+\.yaml", text))
    assert len(recipes) == 2
    for recipe in recipes:
        model = preset(yaml.safe_load((ROOT / recipe).read_text())["model_preset"])
        assert (given.projector, given.expand_layer, given.inject_layers) == (
            model.get("projector", "pvtc"), model["expand_layer"], model["inject_layers"],
        )  # fmt: skip
    assert text.count(f"--pretrained-checkpoint {given.save}") == 1


@pytest.mark.parametrize("load", [None, "elsewhere"])
def test_checkpoints_of_an_earlier_run_are_not_written_over(tmp_path: Path, load: str | None) -> None:
    checkpoint(tmp_path, 700)
    if load:
        (tmp_path / load).mkdir()
        (tmp_path / load / files.TRACKER).write_text("3")
        load = str(tmp_path / load)
    with pytest.raises(
        ValueError, match=r"holds checkpoints of an earlier run, up to step 700: .*--auto-resume"
    ):
        check_start(save=str(tmp_path), auto_resume=False, load=load)
    check_start(save=str(tmp_path))
    check_start(save=str(tmp_path), auto_resume=False, load=str(tmp_path), ckpt_step=700)
