"""Set-up of `make test-serving`: held-out questions of the demo, and exports to ask them.

`make test` leaves this folder out: it needs the packages of servers and harnesses, and takes minutes.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_internvlx.checkpoint.end_token import add_stop_token
from megatron_internvlx.checkpoint.exporter import export_checkpoint
from megatron_internvlx.checkpoint.importer import import_checkpoint
from megatron_internvlx.checkpoint.remote_code import chat_template
from megatron_internvlx.data.conversation import IMG_CONTEXT, get_template
from tests.converting import internvl, make_directory, native, with_lvtc
from tools.make_demo_data import make_demo_data

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "runs" / "demo"
VOCABULARY = 512
DECODER: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 8192}
VISION: dict[str, Any] = {"image_size": 112, "patch_size": 14}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect this folder only when it is named."""
    return None if any("tests/serving" in argument for argument in config.args) else True


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of the demo with its held-out pictures and only a few others; the tokenizer is the demo's."""
    out = tmp_path_factory.mktemp("demo") / "data"
    make_demo_data(out, train=8, val=60, seed=0, vocab_size=VOCABULARY, force=False)
    return out


def never_special(source: Path, tokenizer: Path) -> None:
    """Keep a random model from writing special tokens, such as an image's, which no trained model does."""
    tokens = json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]
    weights = load_file(source / "model.safetensors")
    (head,) = (name for name in weights if name.endswith("lm_head.weight"))
    weights[head][[token["id"] for token in tokens]] = 0.0  # far below the largest of hundreds of logits
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


def random_export(root: Path, kind: str, tokenizer: Path) -> Path:
    """An export of a small model with random weights, large enough that its answers vary.

    `kind`: lvtc; mlp (released names, exported with our code) or native.
    """
    released = internvl("Qwen2ForCausalLM", "qwen2", vision=VISION, **DECODER) | {
        "template": "internvl2_5",
        "force_image_size": 112,
        "rvtc": "edge",
        "rvtc_version": 2,
    }
    config = {
        "lvtc": with_lvtc(released, low_ratio=0.125, expand_layer=2, inject_layers=[3]),
        "mlp": released,
        "native": native(
            vision={"image_size": [112, 112], "patch_size": [14, 14]}, **DECODER
        ) | {"image_token_id": 5, "image_seq_length": 16},
    }[kind]  # fmt: skip
    source = make_directory(root / "source", config, scale=2.0)
    never_special(source, tokenizer)
    shutil.copytree(tokenizer, source, dirs_exist_ok=True)
    if kind == "native":  # such a directory brings its template and its end of an answer
        template = get_template("internvl2_5")
        (source / "chat_template.jinja").write_text(chat_template(template, IMG_CONTEXT))
        add_stop_token(source, template.end)
    import_checkpoint(source, root / "ck", processes=1, quiet=True)
    export_checkpoint(root / "ck", root / "hf", remote_code=kind == "mlp", processes=1, quiet=True)
    return root / "hf"


@pytest.fixture(scope="session")
def demo_export(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Path:
    """The trained demo where `make demo` was run with this version, else a model with random weights."""
    config = DEMO / "hf" / "config.json"
    if config.is_file() and "AutoModelForMultimodalLM" in json.loads(config.read_text()).get("auto_map", {}):
        return DEMO / "hf"
    return random_export(tmp_path_factory.mktemp("export"), "lvtc", demo_data / "tokenizer")
