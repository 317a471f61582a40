"""Chat template and model card of exports without LVTC: the original's where they are right, else ours."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_internvlx.checkpoint.exporter import plan_export, write_files
from megatron_internvlx.checkpoint.importer import import_checkpoint
from megatron_internvlx.checkpoint.remote_code import load_tokenizer
from megatron_internvlx.data.conversation import render_prompt
from tests.converting import FAMILIES, TOKENIZER, make_directory

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
RENDERED = [{"from": "human", "value": "<image>\nWhat?"}]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imports `chat` and `native` of directories whose tokenizer has a template of its own, and a README."""
    root = tmp_path_factory.mktemp("templates")
    for name, config in (("chat", FAMILIES["llama"]), ("native", FAMILIES["native"])):
        hf = make_directory(root / "hf" / name, config, tokenizer=True)
        (hf / "chat_template.jinja").write_text("original")
        (hf / "README.md").write_text("# Original\n")
        settings = json.loads((hf / "tokenizer_config.json").read_text())
        (hf / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "older"}))
        import_checkpoint(hf, root / name, processes=1, quiet=True)
    return root


def exported(
    checkpoint: Path, out: Path, *, iteration: int = 0, scratch: bool = False, **trained: Any
) -> Path:
    plan = plan_export(checkpoint)
    if scratch:
        plan = replace(plan, notes={}, side=TOKENIZER, layout="chat")
    out.mkdir()
    write_files(replace(plan, arguments=plan.arguments | trained, iteration=iteration), out)
    return out


def prompt(directory: Path) -> str:
    return load_tokenizer(directory).apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)


def test_the_original_template_stays_while_it_is_the_models(checkpoints: Path, tmp_path: Path) -> None:
    for name, iteration in (("chat", 0), ("chat", 5), ("native", 0)):
        out = exported(checkpoints / name, tmp_path / f"{name}{iteration}", iteration=iteration)
        assert prompt(out) == "original"
        assert (out / "README.md").read_text() == "# Original\n"
        for file in ("config.json", "tokenizer_config.json"):
            assert (out / file).read_bytes() == (checkpoints / name / "hf" / file).read_bytes()


@pytest.mark.parametrize("iteration", [0, 5])
def test_another_template_replaces_it(checkpoints: Path, tmp_path: Path, iteration: int) -> None:
    given = {"conversation_template": "internvl2_5"}
    out = exported(checkpoints / "chat", tmp_path / "out", iteration=iteration, **given)
    assert prompt(out) == render_prompt("internvl2_5", RENDERED, generation_prompt=True)
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert json.loads((out / "config.json").read_text())["template"] == "internvl2_5"


def test_training_makes_its_template_the_native_formats(checkpoints: Path, tmp_path: Path) -> None:
    """With the placeholder that transformers' processor replaces."""
    out = exported(checkpoints / "native", tmp_path / "out", iteration=5)
    expected = render_prompt("internvl2_5", RENDERED, generation_prompt=True)
    assert prompt(out) == expected.replace("<image>", "<IMG_CONTEXT>")


def test_training_makes_its_template_that_of_an_original_with_one_unknown_here(tmp_path: Path) -> None:
    config = FAMILIES["llama"] | {"template": "phi4"}
    import_checkpoint(make_directory(tmp_path / "hf", config, tokenizer=True), tmp_path / "ck", quiet=True)
    before = exported(tmp_path / "ck", tmp_path / "before")
    assert json.loads((before / "config.json").read_text())["template"] == "phi4"
    assert not (before / "chat_template.jinja").exists()
    after = exported(tmp_path / "ck", tmp_path / "after", iteration=5)
    assert json.loads((after / "config.json").read_text())["template"] == "internvl2_5"
    assert prompt(after) == render_prompt("internvl2_5", RENDERED, generation_prompt=True)


def test_a_model_from_scratch_has_template_and_card(checkpoints: Path, tmp_path: Path) -> None:
    """Its tokenizer's directory has neither, or another model's."""
    given = {"conversation_template": "Hermes-2", "rvtc": "area"}
    out = exported(checkpoints / "chat", tmp_path / "out", iteration=5, scratch=True, **given)
    assert prompt(out) == render_prompt("Hermes-2", RENDERED, generation_prompt=True)
    card = (out / "README.md").read_text()
    assert "compressed when the image is cut into tiles (RVTC)." in card
    assert "`InternVLChatModel` loads" in card
    assert "| Visual tokens | 4 tokens per tile |" in card
    assert "| Chat template | Hermes-2 |" in card
    assert "LVTC" not in card
    assert "trust_remote_code" not in card
