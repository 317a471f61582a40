"""What an import says and writes for training: one screen, and a command that runs as it is printed."""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

from tests import single  # noqa: F401  # isort: skip  (sets Megatron up)
import pytest
import yaml

from megatron_internvlx import arguments
from megatron_internvlx.checkpoint.checks import tokenizer_is_code
from megatron_internvlx.checkpoint.import_recipe import fine_tune_settings
from megatron_internvlx.checkpoint.summary import count_by_part, model_part
from megatron_internvlx.commands.convert import main
from megatron_internvlx.lifecycle.start import check_paths
from tests.converting import FAMILIES, TOKENIZER, make_directory

COMPRESSORS = ["--projector", "pvtc", "--expand-layer", "1", "--inject-layers", "2", "--init-missing"]


def imported(tmp_path: Path, capsys: pytest.CaptureFixture, *more: str, tokenizer: bool = True) -> list[str]:
    hf = make_directory(tmp_path / "hf", FAMILIES["native"], tokenizer=tokenizer)
    assert main(["import", "--hf", str(hf), "--save", str(tmp_path / "c k"), "--quiet", *more]) == 0
    return capsys.readouterr().out.splitlines()


def parsed(monkeypatch: pytest.MonkeyPatch, words: list[str], *, save: str) -> argparse.Namespace:
    """What `pretrain_vlm.py` makes of a printed command."""
    assert words[:2] == ["python", "pretrain_vlm.py"]
    monkeypatch.setattr(sys, "argv", words[1:])
    monkeypatch.setattr(arguments, "set_global_variables", lambda args: None)
    args = arguments.parse()
    check_paths(args)
    assert args.save == save
    return args


def test_the_printed_command_runs(tmp_path: Path, capsys, monkeypatch) -> None:
    said = imported(tmp_path, capsys)
    args = parsed(monkeypatch, shlex.split(said[-1]), save=str(tmp_path / "c k-trained"))
    assert {name: getattr(args, name) for name in fine_tune_settings()} == fine_tune_settings()
    # Without these Megatron stops, some of them only when it builds the optimizer.
    assert min(args.lr, args.train_iters, args.global_batch_size, args.save_interval) > 0
    assert args.load == str(tmp_path / "c k")
    assert args.tokenizer_model == str(tmp_path / "c k" / "hf")
    assert args.data == "meta.json"
    # An everyday change needs nothing else.
    words = [*shlex.split(said[-1]), "--lr", "1e-6", "--train-iters", "7", "--global-batch-size", "2"]
    assert parsed(monkeypatch, words, save=args.save).lr == 1e-6


def test_a_directory_without_tokenizer_is_told(tmp_path: Path, capsys, monkeypatch) -> None:
    said = imported(tmp_path, capsys, tokenizer=False)
    words = shlex.split(said[-1])
    assert words[-2:] == ["--tokenizer-model", "TOKENIZER_DIRECTORY"]
    parsed(monkeypatch, [*words[:-1], str(TOKENIZER)], save=str(tmp_path / "c k-trained"))


@pytest.mark.parametrize(("name", "told"), [("TheirTokenizer", True), ("InternLM2Tokenizer", False)])
def test_a_tokenizer_that_is_code_is_told(tmp_path: Path, capsys, name: str, told: bool) -> None:
    """InternLM2's is read without its code."""
    hf = make_directory(tmp_path / "hf", FAMILIES["llama"])
    settings = {"tokenizer_class": name, "auto_map": {"AutoTokenizer": [f"theirs.{name}", None]}}
    (hf / "tokenizer_config.json").write_text(json.dumps(settings))
    (hf / "tokenizer.model").write_bytes(b"pieces")
    assert main(["import", "--hf", str(hf), "--save", str(tmp_path / "ck")]) == 0
    assert ("tokenizer is Python code, which training does not run" in capsys.readouterr().out) is told
    (hf / "tokenizer.json").write_text("{}")
    assert not tokenizer_is_code(hf)


def test_every_setting_of_the_recipe_is_explained(tmp_path: Path, capsys) -> None:
    imported(tmp_path, capsys)
    text = (tmp_path / "c k" / "recipe.yaml").read_text()
    recipe = yaml.safe_load(text)
    assert recipe.items() >= fine_tune_settings().items()
    lines = dict(re.findall(r"^(\w+): .*?# (.+)$", text, re.M))
    assert lines.keys() == {*fine_tune_settings(), "rvtc"}
    assert recipe["train_iters"] * recipe["global_batch_size"] == 128_000
    assert "128,000 samples" in lines["train_iters"]
    assert "InternVL's rule" in lines["rvtc"]
    assert "edge: RVTC, as in the released InternVL-X" in lines["rvtc"]
    assert max(map(len, text.splitlines())) < 130


def test_new_compressors_are_summed_up(tmp_path: Path, capsys) -> None:
    said = imported(tmp_path, capsys, *COMPRESSORS)
    assert len(said) <= 8
    (new,) = [line for line in said if "initialised" in line]
    assert new.startswith("81 tensors initialised")
    assert new.endswith(": projector 27, projector of layer 1 27, projector of layer 2 27")
    assert any(line.startswith("6 tensors not used: multi_modal_projector 6") for line in said)
    assert any(line.startswith("rvtc is off, as in the directory") for line in said)
    notes = json.loads((tmp_path / "c k" / "hf" / "conversion.json").read_text())
    assert (len(notes["initialised"]), len(notes["unused"])) == (81, 6)


def test_an_import_without_changes_says_nothing_of_rvtc(tmp_path: Path, capsys) -> None:
    assert len(imported(tmp_path, capsys)) == 3


def test_parts() -> None:
    names = ["mlp1.0.weight", "lvtc_projectors.7.cls_scale", "lvtc_projectors.7.mlp1.0.weight"]
    assert count_by_part(names) == "mlp1 1, projector of layer 7 2"
    assert (
        model_part("model.language_model.layers.0.self_attn.rotary_emb.inv_freq") == "language_model.layers"
    )
    assert model_part("vision_model.encoder.layers.3.attn.proj.weight") == "vision_model"
