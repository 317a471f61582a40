"""Files that are broken, or made to do harm: a message that names the file and the value, never a traceback."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_internvlx.checkpoint.exporter import export_checkpoint
from megatron_internvlx.checkpoint.importer import import_checkpoint
from megatron_internvlx.commands.convert import main
from tests.converting import FAMILIES, lvtc_config, make_directory, read_all

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Intact directories and checkpoints."""
    root = tmp_path_factory.mktemp("made")
    moe = FAMILIES["qwen3_moe"]
    paths = {name: make_directory(root / name, config, shards=3) for name, config in (
        ("native", FAMILIES["native"]), ("chat", FAMILIES["llama"]), ("lvtc", lvtc_config()), ("moe", moe),
    )}  # fmt: skip
    import_checkpoint(paths["chat"], root / "ck", quiet=True)
    return paths | {"ck": root / "ck"}


def set_value(config: dict[str, Any], path: str, value: Any) -> None:
    *parts, last = path.split(".")
    for part in parts:
        config = config[part]
    if value is ...:
        del config[last]
    else:
        config[last] = value


def run_import(hf: Path, save: Path, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Import what must be refused; returns the message."""
    assert main(["import", "--hf", str(hf), "--save", str(save), "--quiet", *arguments]) == 2
    assert not [path.name for path in save.parent.iterdir() if path.name.startswith(save.name)]
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("chat", "llm_config", ..., "llm_config is missing"),
        ("chat", "llm_config", [], "llm_config is not an object"),
        ("native", "vision_config", None, "vision_config is missing"),
        ("chat", "llm_config.num_attention_heads", 0, "llm_config.num_attention_heads is 0; it must be a whole"),
        ("chat", "llm_config.hidden_size", "64", "llm_config.hidden_size is '64'; it must be a whole number"),
        ("chat", "llm_config.intermediate_size", 1.5, "intermediate_size is 1.5"),
        ("chat", "llm_config.num_key_value_heads", 3, "num_attention_heads 8 must be a multiple of num_key_value"),
        ("chat", "llm_config.rms_norm_eps", "small", "rms_norm_eps is 'small'; it must be a positive number"),
        ("chat", "llm_config.rope_scaling", "x", "rope_scaling is 'x'; it must be an object or null"),
        ("chat", "llm_config.vocab_size", ..., "'vocab_size' is missing"),
        ("chat", "vision_config.patch_size", 0, "vision_config.patch_size is 0"),
        ("native", "vision_config.patch_size", [4, "4"], "vision_config.patch_size is [4, '4']"),
        ("chat", "ps_version", "v3", "ps_version is 'v3'; it must be v1 or v2"),
        ("chat", "torch_dtype", "float7", "dtype 'float7' must be one of float32, bfloat16, float16"),
        ("chat", "min_dynamic_patch", 9, "min_dynamic_patch is 9 and max_dynamic_patch 6"),
        ("chat", "downsample_ratio", "half", "downsample_ratio is 'half'"),
        ("chat", "select_layer", "last", "select_layer is 'last'"),
        ("lvtc", "compression", None, "compression is missing"),
        ("lvtc", "compression.projector", "qformer", "compression.projector is 'qformer'; it must be pvtc or mlp"),
        ("lvtc", "compression.inject_layers", "2", "compression: expand_layer and inject_layers must be whole numbers"),
        ("lvtc", "compression.depth", 3, "compression has unknown settings depth"),
        ("moe", "llm_config.num_experts_per_tok", 9, "num_experts_per_tok 9 must be at most the number of experts, 4"),
        ("chat", "llm_config.num_hidden_layers", 10**9, "is 1000000000, but the weights have 4 decoder layers:"),
        ("native", "text_config.num_hidden_layers", 5, "is 5, but the weights have 4 decoder layers (without number 4"),
        ("chat", "vision_config.num_hidden_layers", 10**9, "is 1000000000, but the weights have 2 layers"),
        ("native", "vision_config.num_hidden_layers", 1, "is 1, but the weights have 2 layers"),
        ("moe", "llm_config.num_experts", 10**9, "num_experts is 1000000000, but the weights have 4 experts"),
        ("moe", "llm_config.moe_intermediate_size", 10**30, f"expected [{10**30}, 64]"),
        ("chat", "llm_config.hidden_size", 64 * 10**30, "tensors have other shapes than expected from it; correct"),
        ("chat", "llm_config.vocab_size", 10**30, f"is [713, 64], expected [{10**30}, 64]"),
        ("chat", "llm_config.vocab_size", True, "vocab_size is True; it must be a whole number of at least 1"),
        ("chat", "llm_config.rms_norm_eps", float("nan"), "rms_norm_eps is nan; it must be a positive number"),
        ("chat", "llm_config.rope_theta", float("inf"), "rope_theta is inf; it must be a positive number"),
        ("chat", "llm_config.rope_theta", 10**400, "it must be a positive number"),
        ("chat", "llm_config.rope_parameters", {"rope_theta": "x"}, "rope_parameters.rope_theta is 'x'; it must be"),
        ("chat", "vision_config.initializer_range", "x", "vision_config.initializer_range is 'x'; it must be a number"),
        ("chat", "vision_config.drop_path_rate", 1.5, "drop_path_rate 1.5 must be at least 0 and below 1"),
        ("chat", "vision_config.qkv_bias", "false", "vision_config.qkv_bias is 'false'; it must be true or false"),
        ("chat", "llm_config.tie_word_embeddings", "no", "tie_word_embeddings is 'no'; it must be true or false"),
        ("chat", "use_thumbnail", "no", "config.json: use_thumbnail is 'no'; it must be true or false"),
        ("chat", "max_dynamic_patch", 10**9, "max_dynamic_patch 1000000000; both must be whole numbers from 1 to 1024"),
        ("chat", "downsample_ratio", 1e-320, "downsample_ratio is 1e-320; it must be a number above 0"),
        ("chat", "downsample_ratio", float("inf"), "downsample_ratio is inf; it must be a number above 0"),
        ("chat", "select_layer", 10**9, "select_layer 1000000000 is outside -3..2"),
        ("lvtc", "compression.low_ratio", 1e-320, "low_ratio and high_ratio numbers above 0 and at most 1"),
        ("lvtc", "compression.expand_layer", 10**9, "--expand-layer 1000000000 must be between 1 and 3"),
    ],
)  # fmt: skip
def test_config_values(made, tmp_path: Path, capsys, kind: str, key: str, value: Any, message: str) -> None:
    hf = Path(shutil.copytree(made[kind], tmp_path / "hf"))
    config = json.loads((hf / "config.json").read_text())
    set_value(config, key, value)
    (hf / "config.json").write_text(json.dumps(config))
    found = run_import(hf, tmp_path / "ck", capsys)
    assert "config.json: " in found
    assert message in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: [1], "not a JSON object"),
        (lambda index: {"weight_map": ["a"]}, "it has no weight_map"),
        (lambda index: {"weight_map": {"a": 3}}, "a is in 3, which must be the name of a .safetensors file"),
        (lambda index: {"weight_map": {"a": "../x.safetensors"}}, "a is in '../x.safetensors', which must be the name"),
        (lambda index: {"weight_map": {**index["weight_map"], "a": SECOND}}, "1 tensors that are not in its files: a"),
    ],
)  # fmt: skip
def test_weight_index(made, tmp_path: Path, capsys, change: Any, message: str) -> None:
    """A file name that leads out of the directory would be written to by the export."""
    hf = Path(shutil.copytree(made["native"], tmp_path / "hf"))
    (hf / INDEX).write_text(json.dumps(change(json.loads((hf / INDEX).read_text()))))
    assert message in run_import(hf, tmp_path / "ck", capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("[1]", "not a JSON object"),
        ("{}", "model_type None (architectures none) cannot be imported"),
        ('{"a":' * 100_000, "brackets are nested too deeply"),
        (
            '{"model_type": "internvl_chat", "select_layer": ' + "9" * 5000 + "}",
            "not JSON: Exceeds the limit",
        ),
    ],
    ids=["empty", "list", "empty object", "brackets", "digits"],
)
def test_config_that_is_no_configuration(made, tmp_path: Path, capsys, content: str, message: str) -> None:
    hf = Path(shutil.copytree(made["chat"], tmp_path / "hf"))
    (hf / "config.json").write_text(content)
    found = run_import(hf, tmp_path / "ck", capsys)
    assert message in found
    assert found.count("\n") == 1


def test_types_that_cannot_be_converted(made, tmp_path: Path, capsys) -> None:
    hf = Path(shutil.copytree(made["native"], tmp_path / "hf"))
    tensors = load_file(hf / SECOND)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name].to(torch.complex64)}, hf / SECOND)
    assert f"{SECOND}: {name} has type C64; only F64, F32" in run_import(hf, tmp_path / "ck", capsys)


def test_no_directory(tmp_path: Path, capsys) -> None:
    assert f"{tmp_path}/hf: no such directory" in run_import(tmp_path / "hf", tmp_path / "ck", capsys)


@pytest.mark.parametrize("where", ["file/ck", "link", "x" * 250])
def test_impossible_targets(made, tmp_path: Path, capsys, where: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert main(["import", "--hf", str(made["native"]), "--save", str(tmp_path / where), "--quiet"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


class Harm:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("harm", "it must contain only tensors"),
        ("cut", "not a complete file of tensors"),
        ("old", "not the zip format"),
        ("nested", "1 entries are not tensors (state_dict)"),
        ("list", "not a dictionary of tensors: list"),
    ],
)
def test_broken_pickles(made, tmp_path: Path, capsys, content: str, message: str) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    shutil.copyfile(made["chat"] / "config.json", hf / "config.json")
    path, tensors = hf / "pytorch_model.bin", read_all(made["chat"])
    held: dict[str, Any] = {"harm": Harm(tmp_path / "harm"), "nested": {"state_dict": tensors}, "list": [1]}
    torch.save(held.get(content, tensors), path, _use_new_zipfile_serialization=content != "old")
    if content == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    assert message in run_import(hf, tmp_path / "ck", capsys, "--allow-pickle")
    assert not (tmp_path / "harm").exists()


def test_missing_shard_of_pickles(made, tmp_path: Path, capsys) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    shutil.copyfile(made["chat"] / "config.json", hf / "config.json")
    torch.save(read_all(made["chat"]), hf / "pytorch_model-00001-of-00002.bin")
    files = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (hf / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    message = run_import(hf, tmp_path / "ck", capsys, "--allow-pickle")
    assert "1 of 2 weight files are missing: pytorch_model-00002-of-00002.bin" in message


def broken_checkpoint(ck: Path, what: str) -> None:
    if what == "harm":
        (ck / "release" / ".metadata").write_bytes(pickle.dumps(Harm(ck.parent / "harm")))
    elif what == "notes":
        (ck / "hf" / "conversion.json").write_text('{"tensors": {"a": {"file": "../a", "dtype": "float32"}}}')
    elif what == "notes of another kind":
        notes = json.loads((ck / "hf" / "conversion.json").read_text())
        (ck / "hf" / "conversion.json").write_text(json.dumps(notes | {"layout": "sideways"}))
    elif what == "arguments of notes":
        notes = json.loads((ck / "hf" / "conversion.json").read_text())
        (ck / "hf" / "conversion.json").write_text(json.dumps(notes | {"arguments": [1]}))
    elif what == "long tracker":
        (ck / "latest_checkpointed_iteration.txt").write_text("9" * 5000)
    elif what == "config":
        (ck / "hf" / "config.json").unlink()
    elif what == "arguments":
        (ck / "release" / "__common.distcp").write_bytes(b"x" * 5000)
    elif what == "no arguments":
        (ck / "release" / "__common.distcp").unlink()
    elif what == "tracker":
        (ck / "latest_checkpointed_iteration.txt").write_bytes(b"\xff")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("harm", "is not allowed in it"),
        ("notes", "conversion.json: not written by an import"),
        ("notes of another kind", "conversion.json: not written by an import; remove it"),
        ("arguments of notes", "conversion.json: not written by an import; remove it"),
        ("long tracker", "must be an iteration or 'release'"),
        ("config", "config.json: No such file"),
        ("arguments", "the arguments of the checkpoint cannot be read"),
        ("no arguments", "data files are missing: __common.distcp"),
        ("tracker", "must be an iteration or 'release'"),
    ],
)
def test_broken_checkpoints(made, tmp_path: Path, capsys, what: str, message: str) -> None:
    ck = Path(shutil.copytree(made["ck"], tmp_path / "ck"))
    broken_checkpoint(ck, what)
    assert main(["export", "--load", str(ck), "--hf", str(tmp_path / "out"), "--quiet"]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]


def test_like_must_be_there(made, tmp_path: Path, capsys) -> None:
    like = ["--like", str(tmp_path / "none")]
    command = ["export", "--load", str(made["ck"]), "--hf", str(tmp_path / "out"), "--quiet", *like]
    assert main(command) == 2
    assert f"--like {tmp_path}/none: no such directory" in capsys.readouterr().err


def test_tokenizer_code_is_not_run(tmp_path: Path, capsys, monkeypatch) -> None:
    """Neither run, nor is the terminal asked whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    hf = make_directory(tmp_path / "hf", lvtc_config(), tokenizer=True)
    import_checkpoint(hf, tmp_path / "ck", quiet=True)
    export_checkpoint(tmp_path / "ck", tmp_path / "first", quiet=True)
    # An export has code of its own in config.json; to be converted again it need not be run either.
    import_checkpoint(tmp_path / "first", tmp_path / "ck2", quiet=True)
    export_checkpoint(tmp_path / "ck2", tmp_path / "second", quiet=True)
    side = tmp_path / "ck2" / "hf"
    (side / "tokenizer.json").unlink()
    config = json.loads((side / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "TheirTokenizer",
        "auto_map": {"AutoTokenizer": ["theirs.TheirTokenizer", None]},
    }
    (side / "tokenizer_config.json").write_text(json.dumps(config))
    (side / "theirs.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'harm')!r})\nclass TheirTokenizer: pass\n"
    )
    assert main(["export", "--load", str(tmp_path / "ck2"), "--hf", str(tmp_path / "third"), "--quiet"]) == 2
    assert "its tokenizer needs Python code, which is not run here" in capsys.readouterr().err
    assert not (tmp_path / "harm").exists()


def test_an_unknown_chat_template_is_told(made, tmp_path: Path, capsys) -> None:
    hf = Path(shutil.copytree(made["chat"], tmp_path / "hf"))
    config = json.loads((hf / "config.json").read_text()) | {"template": "vicuna"}
    (hf / "config.json").write_text(json.dumps(config))
    assert main(["import", "--hf", str(hf), "--save", str(tmp_path / "ck"), "--quiet"]) == 0
    assert "chat template 'vicuna'; the recipe uses 'internvl2_5'" in capsys.readouterr().out


def test_an_export_without_tokenizer_is_told(made, tmp_path: Path, capsys) -> None:
    command = ["export", "--load", str(made["ck"]), "--hf", str(tmp_path / "out"), "--quiet"]
    assert main(command) == 0
    assert "cannot be used yet: it has no tokenizer. Export again with --like" in capsys.readouterr().out
