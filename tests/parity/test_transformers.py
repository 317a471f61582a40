"""Decoders, and the native InternVL, as transformers' own classes compute them, against Megatron.

Measured worst logits difference, fp32: 2.9e-6 (values up to 4.8), of the tied decoder 7.6e-6 (up to 23). InternLM2 is
not among those classes; its golden cases are of the released code (`parallel/test_verify.py`).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from megatron_internvlx.checkpoint.request import Layout, Request
from tests.converting import LLAMA3_ROPE, MOE, internvl, make_directory, native, read_all
from tests.distributed import Pool
from tests.parallel.test_verify import run

IMAGE_TOKEN = 705
DECODERS = {
    "qwen2_tied": internvl("Qwen2ForCausalLM", "qwen2", tie_word_embeddings=True),
    "qwen3": internvl("Qwen3ForCausalLM", "qwen3", head_dim=16),
    "qwen3_moe": internvl("Qwen3MoeForCausalLM", "qwen3_moe", head_dim=16, **MOE),
    "llama3": internvl("LlamaForCausalLM", "llama", rope_theta=500000.0, rope_scaling=LLAMA3_ROPE),
}
RMS = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}
NATIVE = {
    "layer_norm": native(),
    "rms_norm": native(vision=RMS),
    "older_names": native() | {"old": True},
}


def compare(pool: Pool, directory: Path, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Logits and loss where the attention mask is 1."""
    with torch.no_grad():
        expected = model.eval()(**inputs)
    case = directory.with_suffix(".case.safetensors")
    save_file(inputs, case)
    image_token = IMAGE_TOKEN if "pixel_values" in inputs else None
    request = Request("", str(case), Layout(), False, image_token, hf=str(directory))
    found = run(pool, request, directory.with_suffix(".out.safetensors"))
    keep = inputs["attention_mask"].bool()
    assert (found["logits"][keep] - expected.logits[keep]).abs().max() < 1e-4
    assert abs(float(found["loss"][0]) - float(expected.loss)) < 1e-5


def rows(rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Two texts, the second one shorter; long enough for every frequency of RoPE."""
    ids = torch.randint(1, 700, (2, 250), generator=rng)
    mask = torch.ones_like(ids)
    mask[1, 100:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("family", DECODERS)
def test_decoder(pool: Pool, tmp_path: Path, family: str) -> None:
    config = DECODERS[family]
    directory = make_directory(tmp_path / "source", config)
    prefix = "language_model."
    decoder = {n.removeprefix(prefix): t for n, t in read_all(directory).items() if n.startswith(prefix)}
    (tmp_path / "decoder").mkdir()
    save_file(decoder, tmp_path / "decoder" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "decoder" / "config.json").write_text(json.dumps(config["llm_config"]))
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "decoder", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    compare(pool, directory, model, rows(torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind", NATIVE)
def test_native(pool: Pool, tmp_path: Path, kind: str) -> None:
    directory = make_directory(tmp_path / "source", NATIVE[kind])
    model, report = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    rng = torch.Generator().manual_seed(2)
    inputs = rows(rng)
    inputs["input_ids"][0, 5:13] = inputs["input_ids"][1, 20:24] = IMAGE_TOKEN  # two tiles, and one
    inputs["labels"][:, :30] = -100
    inputs["pixel_values"] = torch.randn(3, 3, 16, 16, generator=rng)
    compare(pool, directory, model, inputs)
