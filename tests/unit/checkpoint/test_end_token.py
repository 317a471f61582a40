"""An answer ends where harnesses and servers look: at the exported tokenizer's `eos_token`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_internvlx.checkpoint.end_token import add_stop_token, stop_ids, write_end_token
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.export_files import write_files
from megatron_internvlx.checkpoint.export_plan import plan_export
from megatron_internvlx.checkpoint.exporter import export_checkpoint
from megatron_internvlx.checkpoint.importer import import_checkpoint
from megatron_internvlx.checkpoint.remote_code import load_tokenizer
from megatron_internvlx.data.conversation import encode
from tests.converting import FAMILIES, TOKENIZER, differences, make_directory

END = "<|im_end|>"
TOKENIZERS = {
    "qwen2": (TOKENIZER, "<|endoftext|>"),
    "internlm2": (TOKENIZER.parent / "internlm2_fast", "</s>"),
}
CONVERSATION = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat, 猫."}]


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def exported(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An export with LVTC, and the directory of the tokenizer before it."""
    root, (tokenizer, _) = tmp_path_factory.mktemp(request.param), TOKENIZERS[request.param]
    config = FAMILIES["lvtc_internlm2" if request.param == "internlm2" else "lvtc"]
    source = make_directory(root / "source", config)
    shutil.copytree(tokenizer, source, dirs_exist_ok=True)
    import_checkpoint(source, root / "ck", processes=1, quiet=True)
    export_checkpoint(root / "ck", root / "hf", processes=1, quiet=True)
    return root / "hf", tokenizer


def test_only_the_end_token_of_the_tokenizer_changes(exported) -> None:
    hf, original = exported
    before, after = load_tokenizer(original), load_tokenizer(hf)
    assert (before.eos_token, after.eos_token) == (dict(TOKENIZERS.values())[original], END)
    for path in original.iterdir():
        old, new = path.read_text(), (hf / path.name).read_text()
        if path.name in ("tokenizer_config.json", "special_tokens_map.json"):
            assert len(old.splitlines()) == len(new.splitlines())
            changed = [(a, b) for a, b in zip(old.splitlines(), new.splitlines(), strict=True) if a != b]
            assert [(a.replace(before.eos_token, END), b) for a, b in changed] == [(changed[0][1],) * 2]
        else:
            assert old == new
    text = "<|im_start|>user\nAny text, ünïcode 也.<|im_end|>"
    assert before(text).input_ids == after(text).input_ids
    assert (before.bos_token_id, before.pad_token_id) == (after.bos_token_id, after.pad_token_id)


def test_all_files_agree(exported) -> None:
    hf, original = exported
    before, after = load_tokenizer(original), load_tokenizer(hf)
    config = json.loads((hf / "config.json").read_text())
    generation = json.loads((hf / "generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"]
    assert after.eos_token_id in generation["eos_token_id"]
    assert before.eos_token_id in generation["eos_token_id"] or before.eos_token == before.unk_token
    rendered = after.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenize=False
    )
    assert rendered.rstrip("\n").endswith(f"b{after.eos_token}")
    assert "| End of an answer | `<|im_end|>`" in (hf / "README.md").read_text()


def test_training_does_not_see_the_end_token(exported) -> None:
    hf, original = exported
    encoded = [
        encode(load_tokenizer(directory), "internvl2_5", CONVERSATION, image_tokens=[4], max_length=None)
        for directory in (original, hf)
    ]
    for name in ("input_ids", "labels", "is_visual"):
        assert getattr(encoded[0], name).tolist() == getattr(encoded[1], name).tolist()


def test_export_of_an_import_of_an_export_is_the_same(exported, tmp_path: Path) -> None:
    import_checkpoint(exported[0], tmp_path / "ck", processes=1, quiet=True)
    export_checkpoint(tmp_path / "ck", tmp_path / "hf", processes=1, quiet=True)
    assert differences(exported[0], tmp_path / "hf") == []
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):  # which that leaves out
        assert (tmp_path / "hf" / name).read_bytes() == (exported[0] / name).read_bytes()


def test_an_answer_ends_with_the_arguments_of_a_harness(exported) -> None:
    """The tokens of two rows of the output layer are exchanged, so that the answer has an end in its middle."""
    hf, original = exported
    model = AutoModelForImageTextToText.from_pretrained(hf, trust_remote_code=True, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(hf, trust_remote_code=True)
    inputs = processor(text="<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    start, tokenizer = inputs["input_ids"].shape[1], processor.tokenizer
    free = model.generate(**inputs, max_new_tokens=12, eos_token_id=None)[0, start:].tolist()
    at = next(i for i in range(4, 12) if free[i] not in free[:i])
    head = model.get_output_embeddings().weight.data
    end = tokenizer.convert_tokens_to_ids(END)
    head[[free[at], end]] = head[[end, free[at]]].clone()

    def answer(**arguments: Any) -> list[int]:
        return model.generate(**inputs, max_new_tokens=12, do_sample=False, **arguments)[0, start:].tolist()

    ended = [*free[:at], end]
    assert answer(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id) == ended
    assert answer(eos_token_id=tokenizer.eos_token_id) == ended
    assert answer() == ended
    # What a harness did with an export of before.
    assert answer(eos_token_id=load_tokenizer(original).eos_token_id)[: at + 1] == ended
    assert len(answer(eos_token_id=load_tokenizer(original).eos_token_id)) == 12


@pytest.mark.parametrize("kind", ["llama", "native"])
def test_exports_with_other_names_agree_too(tmp_path: Path, kind: str) -> None:
    hf = make_directory(tmp_path / "hf", FAMILIES[kind], tokenizer=True)
    (hf / "generation_config.json").write_text('{"eos_token_id": 5, "top_k": 3}')
    import_checkpoint(hf, tmp_path / "ck", processes=1, quiet=True)
    for iteration in (0, 5):
        out = tmp_path / f"out{iteration}"
        out.mkdir()
        write_files(replace(plan_export(tmp_path / "ck"), iteration=iteration), out)
    for path in (tmp_path / "ck" / "hf").glob("*token*"):  # of a model that was not trained: as they were
        assert (tmp_path / "out0" / path.name).read_bytes() == path.read_bytes()
    tokenizer = load_tokenizer(tmp_path / "out5")
    assert tokenizer.eos_token == END
    old = load_tokenizer(hf).eos_token_id
    generation = json.loads((tmp_path / "out5" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": sorted({5, old, tokenizer.eos_token_id}), "top_k": 3}
    scratch = tmp_path / "scratch"
    shutil.copytree(TOKENIZER, scratch)
    add_stop_token(scratch, END)
    assert stop_ids(scratch) == {old, tokenizer.eos_token_id}


def test_an_original_template_that_writes_eos_is_replaced(tmp_path: Path) -> None:
    """It would write another token, now that `eos_token` is the end of an answer."""
    hf = make_directory(tmp_path / "hf", FAMILIES["llama"], tokenizer=True)
    (hf / "chat_template.jinja").write_text("{{ messages[0].content + eos_token }}")
    import_checkpoint(hf, tmp_path / "ck", processes=1, quiet=True)
    for iteration in (0, 5):
        out = tmp_path / f"out{iteration}"
        out.mkdir()
        write_files(replace(plan_export(tmp_path / "ck"), iteration=iteration), out)
        kept = (out / "chat_template.jinja").read_bytes() == (hf / "chat_template.jinja").read_bytes()
        assert kept == (iteration == 0)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ('{"a": 1,\r\n"eos_token":"</s>"}', '{"a": 1,\r\n"eos_token":"<|im_end|>"}'),
        ('{"x": {"eos_token": "</s>"}, "eos_token": null}', '{"x": {"eos_token": "</s>"}, "eos_token": "<|im_end|>"}'),
        (
            '{"eos_token": {"content": "</s>",  "lstrip": false}}',
            '{"eos_token": {"content": "<|im_end|>",  "lstrip": false}}',
        ),
        (r'{"t": "\"eos_token\": 1", "eos_token": "a"}', r'{"t": "\"eos_token\": 1", "eos_token": "<|im_end|>"}'),
        ("{}", '{\n  "eos_token": "<|im_end|>"\n}\n'),
        ('{"eos_token": "<|im_end|>" }', '{"eos_token": "<|im_end|>" }'),
        ('{"eos_token": {"content": 3}}', '{"eos_token": {"content": "<|im_end|>"}}'),
    ],
)  # fmt: skip
def test_the_rest_of_a_file_stays(tmp_path: Path, text: str, changed: str) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(text.encode())
    write_end_token(tmp_path, END)
    assert path.read_bytes().decode() == changed


def test_strange_files(tmp_path: Path) -> None:
    shutil.copytree(TOKENIZER, tmp_path / "t")
    for found in ('{"eos_token_id": true}', '{"eos_token_id": ["a", -1, 1.5]}', "{}"):
        (tmp_path / "t" / "generation_config.json").write_text(found)
        assert stop_ids(tmp_path / "t") == set()
    (tmp_path / "t" / "generation_config.json").write_text("[")
    with pytest.raises(ConversionError, match="not JSON"):
        add_stop_token(tmp_path / "t", END)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "tokenizer.json").write_text('{"added_tokens": [1, {"content": 2}]}')
    add_stop_token(tmp_path / "none", END)
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["tokenizer.json"]
