"""Adapters in PEFT, in Megatron and merged: the same logits, for every family of decoders.

Adapters are made by peft itself on an exported base, with random values, and imported. Measured worst differences of
logits, fp32 (values up to 4.5, which the adapters change by 2.6 to 5): PEFT after a round trip 3.5e-6, merged 4.6e-6,
Megatron's own adapters 3.6e-6. Adapters under half their scale differ by 1.
"""

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText

from megatron_internvlx.checkpoint.export_plan import plan_export
from megatron_internvlx.checkpoint.exporter import export_checkpoint
from megatron_internvlx.checkpoint.importer import import_checkpoint
from megatron_internvlx.checkpoint.merger import merge_checkpoint
from megatron_internvlx.checkpoint.peft_files import WEIGHTS, export_peft
from megatron_internvlx.checkpoint.peft_import import import_peft
from megatron_internvlx.checkpoint.peft_summary import lora_flags
from megatron_internvlx.checkpoint.request import Layout, Request
from megatron_internvlx.lora_settings import TARGETS
from tests.converting import (
    INTERNLM2,
    LLAMA3_ROPE,
    MOE,
    SIX_B,
    internvl,
    make_directory,
    native,
    read_all,
    with_lvtc,
)
from tests.distributed import Pool
from tests.parallel.test_verify import run

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
PLACEHOLDER = 705
TOLERANCE = 1e-5

# Directory, PEFT's settings, and a layout of Megatron.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], Layout]] = {
    # The vision encoder has one matrix for queries, keys and values: rank 4 of each projection there, or of all three.
    "internlm2": (
        with_lvtc(INTERNLM2),
        {
            "target_modules": r".*(q_proj|k_proj|v_proj|o_proj|encoder.*(qkv|attn.proj|fc1|fc2))",
            "modules_to_save": ["projector", "lvtc_projectors.1", "lvtc_projectors.2"],
        },
        Layout(tensor=2, extra=("--sequence-parallel",)),
    ),
    "qwen2": (
        with_lvtc(internvl("Qwen2ForCausalLM", "qwen2")),
        {"target_modules": [*ATTENTION, *MLP], "use_rslora": True, "lora_alpha": 3},
        Layout(tensor=2, pipeline=2),
    ),
    # Only some projections; the others get adapters that add zero.
    "qwen3": (
        with_lvtc(internvl("Qwen3ForCausalLM", "qwen3", head_dim=16, vision=SIX_B)),
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        Layout(),
    ),
    "llama": (
        with_lvtc(
            internvl("LlamaForCausalLM", "llama", rope_theta=500000.0, rope_scaling=LLAMA3_ROPE), projector="mlp"
        ),
        {
            "target_modules": [*ATTENTION, *MLP],
            "modules_to_save": ["mlp1", "lvtc_projectors.1", "lvtc_projectors.2"],
        },
        Layout(pipeline=2),
    ),
    "qwen3_moe": (
        with_lvtc(internvl("Qwen3MoeForCausalLM", "qwen3_moe", head_dim=16, **MOE)),
        {"target_modules": ATTENTION},
        Layout(),
    ),
    # transformers' own class.
    "native": (native(), {"target_modules": r".*language_model.*(self_attn|mlp)\.\w+_proj"}, Layout()),
}  # fmt: skip


def load(directory: Path) -> Any:
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    auto = AutoModelForImageTextToText if kind == "internvl" else AutoModel
    return auto.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()


def make_adapter(exported: Path, out: Path, **settings: Any) -> Any:
    """PEFT's adapter on an exported base, with random values, written by PEFT itself; returns the model."""
    model = peft.get_peft_model(load(exported), peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(out)
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    """Two rows with one and two tiles of four tokens."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 700, (2, 30), generator=generator)
    ids[0, 5:9] = ids[1, 3:11] = PLACEHOLDER
    tiles = torch.randn(3, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "pixel_values": tiles, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(**inputs()).logits


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_adapter_everywhere(pool: Pool, tmp_path: Path, family: str) -> None:
    """Made by PEFT; the same in Megatron, merged both ways, and in PEFT after an import and an export."""
    config, settings, layout = FAMILIES[family]
    source = make_directory(tmp_path / "source", config, tokenizer=True)
    import_checkpoint(source, tmp_path / "base", processes=1, quiet=True)
    export_checkpoint(tmp_path / "base", tmp_path / "exported", processes=1, quiet=True)
    expected = logits_of(make_adapter(tmp_path / "exported", tmp_path / "adapter", **settings))
    plain = load(tmp_path / "exported")
    differing = worst(logits_of(plain), expected)
    assert differing > 0.1

    import_peft(tmp_path / "adapter", tmp_path / "lora", tmp_path / "base")
    export_peft(tmp_path / "lora", tmp_path / "again", base_name="exported")
    found = {"peft": logits_of(peft.PeftModel.from_pretrained(plain, tmp_path / "again").eval())}
    assert export_checkpoint(tmp_path / "lora", tmp_path / "merged_hf", processes=1, quiet=True).rounding
    found["merged"] = logits_of(load(tmp_path / "merged_hf"))
    save_file(inputs(), tmp_path / "case.safetensors")
    request = Request(
        "", str(tmp_path / "case.safetensors"), layout, False, PLACEHOLDER, load=str(tmp_path / "lora")
    )
    found["megatron"] = run(pool, request, tmp_path / "out.safetensors")["logits"]
    differences = {name: worst(logits, expected) for name, logits in found.items()}
    print(family, f"adapter changes logits by {differing:.2g}", differences, float(expected.abs().max()))
    assert max(differences.values()) < TOLERANCE

    merge_checkpoint(tmp_path / "lora", tmp_path / "merged", processes=1, quiet=True)
    export_checkpoint(tmp_path / "merged", tmp_path / "merged_again", processes=1, quiet=True)
    first, second = read_all(tmp_path / "merged_hf"), read_all(tmp_path / "merged_again")
    assert all(torch.equal(first[name], second[name]) for name in first)


def load_and_save_adapters(layout: list[str], base: str, lora: str, out: str, flags: list[str]) -> None:
    """On a rank: training's own loading of base and imported adapters, and a checkpoint of the layout."""
    from megatron_internvlx import platform

    platform.setup()
    import megatron.training.checkpointing as checkpointing
    import megatron.training.training as training
    from megatron.core.enums import ModelType
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import get_model

    from megatron_internvlx import arguments
    from megatron_internvlx.lifecycle.base import check_base, load_base_first
    from megatron_internvlx.training.builder import ModelProvider

    # The ranks of the pool are daemons, which may not start the process that Megatron writes from.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    saved, sys.argv = sys.argv, [
        "load_and_save", "--recipe", f"{base}/recipe.yaml", "--pretrained-checkpoint", base, "--load", lora,
        "--data", "none", "--train-iters", "1", "--lr", "1e-3", "--global-batch-size", "8", "--seq-length", "256",
        "--save-interval", "1", "--save", out, "--no-save-optim", "--no-save-rng", *flags, *layout,
    ]  # fmt: skip
    try:
        args = arguments.parse()
    finally:
        sys.argv = saved
    initialize_megatron()
    check_base(args)
    model = get_model(ModelProvider(args), ModelType.encoder_or_decoder, wrap_with_ddp=False)
    load_base_first(args)
    training.load_checkpoint(model, None, None)
    checkpointing.save_checkpoint(1, model, None, None, 0)


def test_imported_adapters_go_through_training(pool: Pool, tmp_path: Path) -> None:
    """All four targets, each rank with its share of them: what training saves is what was imported, bit for bit."""
    source = make_directory(tmp_path / "source", with_lvtc(INTERNLM2), tokenizer=True)
    import_checkpoint(source, tmp_path / "base", processes=1, quiet=True)
    export_checkpoint(tmp_path / "base", tmp_path / "exported", processes=1, quiet=True)
    everything = r"(?!.*lm_head).*(_proj|qkv|attn.proj|fc1|fc2|attn\.[qkv]|mlp\.w[123]|mlp[123]\.1)"
    make_adapter(tmp_path / "exported", tmp_path / "adapter", target_modules=everything)
    plan = import_peft(tmp_path / "adapter", tmp_path / "lora", tmp_path / "base")
    assert plan.settings.lora_targets == list(TARGETS) and not plan.added
    layout = [
        *("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel"),
    ]
    places = (str(tmp_path / name) for name in ("base", "lora", "trained"))
    pool.run(4, load_and_save_adapters, layout, *places, lora_flags(plan), timeout=300)
    trained = plan_export(tmp_path / "trained").weights
    names = [name for weight in plan.weights for name in weight.names]
    assert sum(not key.endswith("_extra_state") for key in trained.reader.tensors) == len(
        plan_export(tmp_path / "lora").weights.reader.tensors
    )
    imported = plan_export(tmp_path / "lora").weights
    for name in names:
        assert torch.equal(trained.find(name).read(), imported.find(name).read()), name
    export_peft(tmp_path / "trained", tmp_path / "again")
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "again"))
    for name in (n for n in first if n.endswith("lora_A.weight")):
        # A fused matrix has rank 12 now; the product is the same.
        other = name.replace("lora_A", "lora_B")
        assert torch.allclose(second[other] @ second[name], first[other] @ first[name], atol=1e-5), name
