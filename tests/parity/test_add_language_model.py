"""The worked example of a new family: its rows through conversion and Megatron, against transformers' own class.

Measured worst logits difference, fp32: 2.1e-6 (values up to 5.1). Without the biases of q, k and v the weights do not
even fit the table.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_internvlx.checkpoint import families
from megatron_internvlx.checkpoint.exporter import export_checkpoint
from megatron_internvlx.checkpoint.importer import SIDE, import_checkpoint
from megatron_internvlx.checkpoint.request import Layout, Request
from megatron_internvlx.checkpoint.verify import verify
from megatron_internvlx.model import presets
from tests.converting import differences, internvl, make_directory, read_all
from tests.distributed import Pool
from tests.parallel.test_examples import load
from tests.parallel.test_verify import rank_job
from tests.parity.test_transformers import rows

EXAMPLE = load("add_language_model/seed_oss.py")
PREFIX = "language_model."


def rank_job_with_the_family(request: Request) -> None:
    EXAMPLE.register()
    try:
        rank_job(request)
    finally:  # the rank goes on to other tests
        del families.FAMILIES[EXAMPLE.NAME], presets.PRESETS[EXAMPLE.PRESET_NAME]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny InternVL with the new decoder; the family is known for one test."""
    monkeypatch.setitem(families.FAMILIES, EXAMPLE.NAME, EXAMPLE.FAMILY)
    monkeypatch.setitem(presets.PRESETS, EXAMPLE.PRESET_NAME, EXAMPLE.PRESET)
    return make_directory(tmp_path / "hf", internvl("SeedOssForCausalLM", EXAMPLE.NAME, head_dim=16))


def test_only_settings_are_taken_that_our_decoder_has() -> None:
    theirs = AutoConfig.for_model(EXAMPLE.NAME)
    for key, fine in EXAMPLE.FAMILY.refused:
        assert (None in fine) is (getattr(theirs, key) in fine), key


def test_import_and_export_give_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    import_checkpoint(directory, tmp_path / "ck", processes=1, quiet=True)
    export_checkpoint(
        tmp_path / "ck", tmp_path / "again", like=tmp_path / "ck" / SIDE, processes=1, quiet=True
    )
    assert differences(directory, tmp_path / "again") == []


def test_megatron_computes_what_transformers_does(pool: Pool, directory: Path, tmp_path: Path) -> None:
    decoder = {n.removeprefix(PREFIX): t for n, t in read_all(directory).items() if n.startswith(PREFIX)}
    alone = tmp_path / "decoder"
    alone.mkdir()
    save_file(decoder, alone / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps(config["llm_config"]))
    model, report = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]

    inputs = rows(torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.eval()(**inputs)
    save_file(inputs, tmp_path / "case.safetensors")
    request = Request("", str(tmp_path / "case.safetensors"), Layout(), False, None, hf=str(directory))
    start = partial(start_ranks, pool)
    found = verify(request, tmp_path / "out.safetensors", start=start).tensors
    keep = inputs["attention_mask"].bool()
    assert (found["logits"][keep] - expected.logits[keep]).abs().max() < 1e-4
    assert abs(float(found["loss"][0]) - float(expected.loss)) < 1e-5


def start_ranks(pool: Pool, request: Request, ranks: int) -> object:
    return pool.run(ranks, partial(rank_job_with_the_family, request))


def test_preset_has_the_size_of_the_model() -> None:
    sizes = {
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_query_groups",
        "head_dim": "kv_channels",
        "intermediate_size": "ffn_hidden_size",
        "vocab_size": "vocab_size",
    }
    config = AutoConfig.for_model(EXAMPLE.NAME, **{k: EXAMPLE.PRESET[v] for k, v in sizes.items()})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9) == 36
