"""Chat template and model card of exports without LVTC: the original's where they are right, else ours."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer

from megatron_internvlx.checkpoint.export_files import write_files
from megatron_internvlx.checkpoint.export_plan import plan_export
from megatron_internvlx.checkpoint.exporter import export_checkpoint
from megatron_internvlx.checkpoint.importer import import_checkpoint
from megatron_internvlx.checkpoint.remote_code import load_tokenizer, tokenizer_problem
from megatron_internvlx.data.conversation import render_prompt
from megatron_internvlx.hf.processing_internvlx import InternVLXProcessor
from tests.converting import FAMILIES, TOKENIZER, lvtc_config, make_directory
from tests.internlm2_files import directory_of, train

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
        # Training makes the template's end the tokenizer's (test_end_token.py).
        for file in ("config.json", *([] if iteration else ["tokenizer_config.json"])):
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


def whole_export(kind: str, tmp_path: Path) -> Path:
    """A trained model's directory, of an original that had no processor; `scratch`: of no original."""
    config = {"lvtc": lvtc_config(), "native": FAMILIES["native"]}.get(kind, FAMILIES["llama"])
    # Room for the system message, which this tokenizer spells in bytes.
    part = config["text_config" if kind == "native" else "llm_config"] | {"max_position_embeddings": 2048}
    config = config | {"text_config" if kind == "native" else "llm_config": part}
    hf = make_directory(tmp_path / "hf", config, tokenizer=True)
    import_checkpoint(hf, tmp_path / "ck", processes=1, quiet=True)
    export_checkpoint(tmp_path / "ck", tmp_path / "out", processes=1, quiet=True)
    out = exported(tmp_path / "ck", tmp_path / "files", iteration=5, scratch=kind == "scratch")
    for weights in (tmp_path / "out").glob("*.safetensors"):
        shutil.copyfile(weights, out / weights.name)
    return out


@pytest.mark.parametrize("kind", ["lvtc", "native", "chat", "scratch"])
def test_the_code_of_the_card_runs(tmp_path: Path, monkeypatch, capsys, kind: str) -> None:
    """Copied from the README into Python, in a directory with a picture."""
    out = whole_export(kind, tmp_path)
    (code,) = re.findall(r"^```python\n(.+?)^```", (out / "README.md").read_text(), re.M | re.S)
    Image.new("RGB", (40, 20), "red").save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace('"DIRECTORY"', repr(str(out))), names)
    assert type(names["processor"]).__name__ == "InternVLXProcessor"
    inputs = names["inputs"]
    # Two tiles of the wide picture and the whole of it, each of 4 tokens.
    image_token = names["processor"].tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert inputs["pixel_values"].shape == (3, 3, 16, 16)
    assert (inputs["input_ids"] == image_token).sum() == 12
    if kind in ("lvtc", "native"):
        assert names["output"].shape[1] > inputs["input_ids"].shape[1]
        assert capsys.readouterr().out.strip()


def test_both_placeholders_stand_for_images(tmp_path: Path) -> None:
    processor = InternVLXProcessor(load_tokenizer(TOKENIZER), tile_size=16, tokens_per_tile=2, max_tiles=1)
    image = Image.new("RGB", (16, 16))
    one = processor(images=[image, image], text="a<image>b<image>c")
    other = processor(images=[image, image], text="a<IMG_CONTEXT>b<IMG_CONTEXT>c")
    assert one["input_ids"].tolist() == other["input_ids"].tolist()
    assert one["pixel_values"].shape == (2, 3, 16, 16)
    filled = "a<img><IMG_CONTEXT><IMG_CONTEXT></img>b"
    assert processor(text=filled)["input_ids"].tolist() == [processor.tokenizer(filled)["input_ids"]]


def test_an_original_processor_stays(tmp_path: Path) -> None:
    hf = make_directory(tmp_path / "hf", FAMILIES["native"], tokenizer=True)
    (hf / "processor_config.json").write_text('{"processor_class": "InternVLProcessor"}')
    import_checkpoint(hf, tmp_path / "ck", processes=1, quiet=True)
    out = exported(tmp_path / "ck", tmp_path / "out", iteration=5)
    assert (out / "processor_config.json").read_bytes() == (hf / "processor_config.json").read_bytes()
    assert not (out / "processing_internvlx.py").exists()
    assert "trust_remote_code" not in (out / "README.md").read_text()


def test_our_processor_follows_the_training(tmp_path: Path) -> None:
    """That of an earlier export has the tiles of that time."""
    hf = make_directory(tmp_path / "hf", FAMILIES["llama"], tokenizer=True)
    import_checkpoint(hf, tmp_path / "ck", processes=1, quiet=True)
    export_checkpoint(tmp_path / "ck", tmp_path / "hf2", processes=1, quiet=True)
    import_checkpoint(tmp_path / "hf2", tmp_path / "ck2", processes=1, quiet=True)
    out = exported(tmp_path / "ck2", tmp_path / "out", iteration=5, max_tiles=3, rvtc="edge")
    settings = json.loads((out / "processor_config.json").read_text())
    assert (settings["max_tiles"], settings["rvtc"]) == (3, "edge")


def test_a_card_without_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    import_checkpoint(
        make_directory(tmp_path / "hf", FAMILIES["native"]), tmp_path / "ck", processes=1, quiet=True
    )
    card = (exported(tmp_path / "ck", tmp_path / "out", iteration=5) / "README.md").read_text()
    assert "This directory is not complete: it has no tokenizer." in card
    assert card.index("not complete") < card.index("```python")
    assert (tmp_path / "out" / "processor_config.json").is_file()
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert tokenizer_problem(tmp_path / "out") == "its tokenizer has no token <IMG_CONTEXT>"


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
    assert 'AutoProcessor.from_pretrained("DIRECTORY", trust_remote_code=True)' in card
    assert "AutoModel" not in card
    assert "not complete" not in card


def test_internlm2s_tokenizer_needs_no_code_in_an_export_that_has_ours(tmp_path: Path) -> None:
    hf = make_directory(tmp_path / "hf", lvtc_config(), tokenizer=True)
    for path in hf.glob("*token*"):
        path.unlink()
    for path in directory_of(tmp_path / "tokenizer", train(True, False)).iterdir():
        shutil.copyfile(path, hf / path.name)
    import_checkpoint(hf, tmp_path / "ck", processes=1, quiet=True)
    export_checkpoint(tmp_path / "ck", tmp_path / "out", quiet=True)
    assert (
        not list((tmp_path / "out").glob("tokenization*")) and (tmp_path / "out" / "tokenizer.json").is_file()
    )
    text = "<|im_start|>user\n<IMG_CONTEXT> What?<|im_end|>"
    before = load_tokenizer(tmp_path / "ck" / "hf")
    after = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert before(text).input_ids == after(text).input_ids
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["image_token_id"] == before.convert_tokens_to_ids("<IMG_CONTEXT>")
