"""The names of the table are those of the released models and of transformers' classes.

Those of Qwen3-MoE, which transformers stacks when it reads them, are proven by reading: `parity/test_transformers.py`.
"""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from megatron_internvlx.checkpoint.hf_config import model_config
from megatron_internvlx.checkpoint.mapping import output_names, table
from megatron_internvlx.checkpoint.torch_dist import location
from megatron_internvlx.model.sizes import model_sizes
from tests.converting import FAMILIES, MARKS, Named, native
from tests.golden_weights import GOLDEN, MANIFEST
from tests.parity.released import ReleasedModel


def shapes_of(config: dict[str, Any], *marks: str) -> dict[str, tuple[int, ...]]:
    ours = model_config(config, Named(*marks))
    entries = table(model_sizes(ours.arguments), ours.family, ours.layout)
    return {name: shape for e in entries for name, shape in zip(e.theirs, e.shapes, strict=True)}


@pytest.mark.parametrize("model", ["internlm2_tiny", "qwen2_tiny"])
def test_released_names_and_shapes(model: str) -> None:
    config = json.loads((GOLDEN / "models" / model / "config.json").read_text())
    golden = json.loads(MANIFEST.read_text())[f"models/{model}/model.safetensors"]["shapes"]
    expected = {name: tuple(shape) for name, shape in golden.items()}
    assert shapes_of(config, "projector.cls_scale") == expected


@pytest.mark.parametrize("model", ["internlm2_tiny", "qwen2_tiny"])
def test_golden_tensors_go_where_the_parity_tests_put_them(model: str) -> None:
    """Bit for bit, against a table of its own, with which `parity/test_model.py` gets the golden logits.

    Names alone do not tell: w1 and w3, or ls1 and ls2, have the same shape, and a round trip undoes a swap.
    """
    folder = GOLDEN / "models" / model
    config, golden = (
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "model.safetensors"),
    )
    ours = model_config(config, Named(*golden))
    entries = table(model_sizes(ours.arguments), ours.family, ours.layout)
    found = {e.ours: e.op.to_ours([golden[name] for name in e.theirs]) for e in entries}
    expected = ReleasedModel.from_config(config).to_ours(golden)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    back = {n: t for e in entries for n, t in zip(e.theirs, e.op.to_theirs(found[e.ours]), strict=True)}
    assert back.keys() == golden.keys()
    assert [name for name, tensor in golden.items() if not torch.equal(back[name], tensor)] == []


@pytest.mark.parametrize("family", ["qwen2_tied", "qwen3", "llama"])
def test_decoder_names_are_those_of_transformers(family: str) -> None:
    config = dict(FAMILIES[family])
    text = {k: v for k, v in config["llm_config"].items() if k != "architectures"}
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text))
    expected = {f"language_model.{n}": tuple(t.shape) for n, t in theirs.named_parameters()}
    found = shapes_of(config)
    assert {n: s for n, s in found.items() if n.startswith("language_model.")} == expected


def test_native_names_are_those_of_transformers() -> None:
    config = native(vision={"use_qk_norm": True})
    text = {k: v for k, v in config["text_config"].items() if k != "architectures"}
    full = AutoConfig.for_model(**{**config, "text_config": text})
    with torch.device("meta"):
        theirs = AutoModelForImageTextToText.from_config(full)
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.named_parameters()}
    assert shapes_of(config, "model.") == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_named_twice(family: str) -> None:
    config = {k: v for k, v in FAMILIES[family].items() if k not in MARKS}
    ours = model_config(config, Named("projector.cls_scale"))
    entries = table(model_sizes(ours.arguments), ours.family, ours.layout)
    theirs = [name for entry in entries for name in entry.theirs]
    assert len({e.ours for e in entries}) == len(entries)
    assert len(set(theirs)) == len(theirs)
    assert len({location(e.ours) for e in entries}) == len(entries)
    head, embedding = output_names(ours.family, ours.layout)
    assert embedding in theirs
    assert (head in theirs) is (not ours.tied)
