"""PEFT directories: what the exported configuration says, what is refused, and what a merge loses."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_internvlx.checkpoint.adapters import adapted_weights
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.export_plan import plan_export
from megatron_internvlx.checkpoint.exporter import export_checkpoint, lost_share
from megatron_internvlx.checkpoint.importer import import_checkpoint
from megatron_internvlx.checkpoint.merger import merge_checkpoint
from megatron_internvlx.checkpoint.peft_files import CONFIG, ROOT, WEIGHTS, export_peft, unique_suffix
from megatron_internvlx.checkpoint.peft_import import import_peft, plan_peft_import
from megatron_internvlx.checkpoint.peft_summary import lora_flags, peft_import_summary
from megatron_internvlx.checkpoint.sources import ModelWeights
from megatron_internvlx.checkpoint.torch_dist import CheckpointReader
from megatron_internvlx.commands import convert
from tests.converting import FAMILIES, lvtc_config, make_directory, read_all

RANK, ALPHA = 2, 6.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases `lvtc` and `chat` (InternLM2 with fused matrices, bf16), and PEFT directories `lvtc_peft`, `chat_peft`."""
    root = tmp_path_factory.mktemp("peft")
    for name, config in (("lvtc", lvtc_config()), ("chat", FAMILIES["internlm2"])):
        import_checkpoint(make_directory(root / "hf" / name, config, tokenizer=True), root / name, quiet=True)
    write_peft(root / "lvtc", root / "lvtc_peft", ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"])
    write_peft(root / "chat", root / "chat_peft", ["attention.wqkv"])
    return root


def write_peft(base: Path, out: Path, targets: list[str], *, rank: int = RANK, **settings: Any) -> None:
    """A PEFT directory for a base: random adapters on the modules whose names end like this."""
    plan = plan_export(base)
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for weight in adapted_weights(plan.sizes, plan.entries, ("decoder_attention", "decoder_mlp")):
        for name, (rows, inputs) in zip(weight.entry.theirs, weight.entry.shapes, strict=True):
            module = name.removesuffix(".weight")
            if module.endswith(tuple(targets)):
                tensors[f"{ROOT}{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
                tensors[f"{ROOT}{module}.lora_B.weight"] = 0.1 * torch.randn(rows, rank, generator=generator)
    out.mkdir()
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": targets, **settings}
    (out / CONFIG).write_text(json.dumps(config))


def changed(source: Path, out: Path, *, tensors: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A copy of a PEFT directory with other settings or tensors; None removes one."""
    shutil.copytree(source, out)
    config = json.loads((out / CONFIG).read_text()) | settings
    (out / CONFIG).write_text(json.dumps(config))
    if tensors:
        held = load_file(out / WEIGHTS) | tensors
        save_file({name: t for name, t in held.items() if t is not None}, out / WEIGHTS)
    return out


def test_configuration_of_an_export(root: Path, tmp_path: Path) -> None:
    import_peft(root / "lvtc_peft", tmp_path / "lora", root / "lvtc")
    made = export_peft(tmp_path / "lora", tmp_path / "out", base_name="hub/model")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    projections = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == projections
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (
        RANK,
        ALPHA,
        "hub/model",
    )
    assert config["rank_pattern"] == {} and config["modules_to_save"] is None
    assert made.modules == 7 * 4 and made.saved == ()
    given, written = load_file(root / "lvtc_peft" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(written[name], tensor) for name, tensor in given.items())
    assert all(not t.any() for name, t in written.items() if name not in given and "lora_B" in name)


def test_fused_matrices_get_the_rank_of_their_projections(root: Path, tmp_path: Path) -> None:
    """One adapter of rank 2 on wqkv is three that share A; together they have rank 6, and the same scale."""
    for number, rslora in enumerate((False, True)):
        peft = changed(root / "chat_peft", tmp_path / f"peft{number}", use_rslora=rslora)
        plan = import_peft(peft, tmp_path / f"lora{number}", root / "chat")
        assert plan.settings.lora_rank == RANK and plan.settings.targets == ("decoder_attention",)
        export_peft(tmp_path / f"lora{number}", tmp_path / f"out{number}")
        config = json.loads((tmp_path / f"out{number}" / CONFIG).read_text())
        assert config["target_modules"] == ["attention.wo", "attention.wqkv"] or config["target_modules"] == [
            "wo",
            "wqkv",
        ]
        assert list(config["rank_pattern"].values()) == [3 * RANK]
        divisor = (3 * RANK) ** 0.5 if rslora else 3 * RANK
        scale = ALPHA / (RANK**0.5 if rslora else RANK)
        assert next(iter(config["alpha_pattern"].values())) / divisor == pytest.approx(scale)
        again = import_peft(tmp_path / f"out{number}", tmp_path / f"again{number}", root / "chat")
        assert again.settings == plan.settings
        for name in CheckpointReader(tmp_path / f"lora{number}" / "release").tensors:
            first, second = (
                ModelWeights(tmp_path / f"{kind}{number}").find(name).read() for kind in ("lora", "again")
            )
            assert torch.equal(first, second), name


def test_merge_in_bf16_says_what_rounding_lost(root: Path, tmp_path: Path) -> None:
    """A change as large as a weight's last bit is rounded away; in fp32 nothing is."""
    import_peft(root / "chat_peft", tmp_path / "lora", root / "chat")
    plan = export_checkpoint(tmp_path / "lora", tmp_path / "hf", processes=1, quiet=True)
    assert plan.rounding is not None and "wqkv" in plan.rounding[0] and 1e-4 < plan.rounding[1] < 0.1
    exact = export_checkpoint(tmp_path / "lora", tmp_path / "fp32", dtype="float32", processes=1, quiet=True)
    assert exact.rounding is not None and exact.rounding[1] == 0
    merged = merge_checkpoint(tmp_path / "lora", tmp_path / "merged", processes=1, quiet=True)
    assert merged.rounding is not None and merged.rounding[1] == pytest.approx(plan.rounding[1])
    weights, base = read_all(tmp_path / "fp32"), read_all(root / "hf" / "chat")
    adapter = load_file(root / "chat_peft" / WEIGHTS)
    name = "language_model.model.layers.1.attention.wqkv"
    change = ALPHA / RANK * adapter[f"{ROOT}{name}.lora_B.weight"] @ adapter[f"{ROOT}{name}.lora_A.weight"]
    found = weights[f"{name}.weight"] - base[f"{name}.weight"].float()
    assert torch.allclose(found, change, atol=1e-6)
    untouched = "language_model.model.layers.1.feed_forward.w1.weight"
    assert torch.equal(weights[untouched], base[untouched].float())
    one = torch.ones(1)
    assert lost_share([one + 2**-9], [one], torch.full((1,), 2**-9)) == 1.0


def test_base_is_checked_and_may_have_moved(root: Path, tmp_path: Path) -> None:
    import_peft(root / "lvtc_peft", tmp_path / "lora", root / "lvtc")
    with pytest.raises(
        ConversionError, match=r"chat.* \(fingerprint \w+\) is not the base .* \(fingerprint \w+\)"
    ):
        plan_export(tmp_path / "lora", base=root / "chat")
    shutil.copytree(root / "lvtc", tmp_path / "moved")
    assert plan_export(tmp_path / "lora", base=tmp_path / "moved").adapters
    with pytest.raises(ConversionError, match="has no adapters"):
        plan_export(root / "lvtc", base=root / "chat")
    with pytest.raises(ConversionError, match="nothing to merge"):
        merge_checkpoint(root / "lvtc", tmp_path / "out", quiet=True)
    with pytest.raises(ConversionError, match="no adapters"):
        export_peft(root / "lvtc", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_finds_what_it_checks(root: Path, tmp_path: Path) -> None:
    """Arguments that lifecycle/base.py compares, and the flags that the summary prints."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    plan = import_peft(root / "lvtc_peft", tmp_path / "lora", root / "lvtc")
    made = load_common_state_dict(tmp_path / "lora" / "release")["args"]
    assert isinstance(made, Namespace)
    assert made.lora_base == str(root / "lvtc") and len(made.lora_base_fingerprint) == 64
    assert (made.lora_rank, made.lora_alpha, made.lora_rslora) == (RANK, ALPHA, False)
    assert (made.freeze_vision, made.freeze_projectors, made.freeze_llm) == (True, True, False)
    text = "\n".join(peft_import_summary(plan, tmp_path / "lora", root / "lvtc"))
    assert "12 modules" in text and "16 more modules" in text
    assert "--lora-rank 2 --lora-alpha 6 --lora-targets decoder_attention decoder_mlp" in text
    assert "--freeze-vision --freeze-projectors" in text and "--freeze-llm" not in text


@pytest.mark.parametrize(("rank", "alpha"), [(15, 8.0), (32, 22.627417)])
def test_printed_alpha_is_the_stored_one(root: Path, tmp_path: Path, rank: int, alpha: float) -> None:
    """Of rsLoRA too, where the way over the scale leaves 7.999999999999999 of 8."""
    targets = ["attention.wqkv", "attention.wo"]
    write_peft(root / "chat", tmp_path / "peft", targets, rank=rank, lora_alpha=alpha, use_rslora=True)
    import_peft(tmp_path / "peft", tmp_path / "lora", root / "chat")
    export_peft(tmp_path / "lora", tmp_path / "out")
    plan = plan_peft_import(tmp_path / "out", root / "chat")
    flags = lora_flags(plan)
    assert float(flags[flags.index("--lora-alpha") + 1]) == plan.settings.alpha


Q0 = f"{ROOT}language_model.model.layers.0.self_attn.q_proj"
HEAD = f"{ROOT}language_model.lm_head"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "other method": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "DoRA": ({"use_dora": True}, "use_dora is True.*merge_and_unload"),
    "biases": ({"bias": "all"}, "bias is 'all'"),
    "changed base": ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights too"),
    "rank as text": ({"r": "2"}, "r is '2'"),
    "scale": ({"lora_alpha": -1}, "lora_alpha is -1"),
    "pattern": ({"rank_pattern": {"(": 2}}, "rank_pattern"),
    "targets": ({"target_modules": "("}, "not a regular expression"),
    "another rank": ({"r": 3}, r"lora_A is \[2, 96\], expected \[3, 96\]"),
    "other ranks": (
        {
            "rank_pattern": {"layers.0.self_attn.q_proj": 1},
            "tensors": {f"{Q0}.lora_A.weight": torch.ones(1, 64), f"{Q0}.lora_B.weight": torch.ones(64, 1)},
        },
        "q_proj has rank 1 and .* 2; all adapters must have the same rank",
    ),
    "other scales": ({"alpha_pattern": {"layers.0.self_attn.q_proj": 1}}, "the same alpha / rank"),
    "missing B": ({"tensors": {f"{Q0}.lora_B.weight": None}}, "1 modules of adapter_config.json lack tensors"),
    "missing module": (
        {"tensors": {f"{Q0}.lora_A.weight": None, f"{Q0}.lora_B.weight": None}}, "lack tensors: .*0.self_attn.q_proj",
    ),
    "shape": ({"tensors": {f"{Q0}.lora_A.weight": torch.ones(2, 63)}}, r"lora_A is \[2, 63\], expected \[2, 64\]"),
    "not a number": ({"tensors": {f"{Q0}.lora_A.weight": torch.full((2, 64), float("nan"))}}, "not finite"),
    "integers": ({"tensors": {f"{Q0}.lora_A.weight": torch.ones(2, 64, dtype=torch.int8)}}, "not a float type"),
    "output layer": (
        {"tensors": {f"{HEAD}.lora_A.weight": torch.ones(2, 64), f"{HEAD}.lora_B.weight": torch.ones(713, 2)}},
        "1 adapted modules are not ones that training adapts .*lm_head",
    ),
    "decoder saved whole": (
        {"tensors": {f"{ROOT}language_model.model.norm.weight": torch.ones(64)}}, "neither adapters nor weights",
    ),
    "part of a projector": (
        {"tensors": {f"{ROOT}projector.mlp1.1.weight": torch.ones(64, 512)}}, "is missing, expected",
    ),
    "no projector saved whole": ({"modules_to_save": ["projector"]}, "modules_to_save .* missing: projector"),
    "output layer saved whole": ({"modules_to_save": ["lm_head"]}, "modules_to_save .* missing: .*lm_head"),
    "foreign name": ({"tensors": {"model.x": torch.ones(1)}}, "names must begin with"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(root: Path, tmp_path: Path, case: str) -> None:
    settings, message = BAD[case]
    peft = changed(root / "lvtc_peft", tmp_path / "peft", **settings)
    with pytest.raises(ConversionError, match=message):
        import_peft(peft, tmp_path / "lora", root / "lvtc")
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


@pytest.mark.parametrize("size", [0, 7, 400, -1])
def test_truncated_weights_are_refused(root: Path, tmp_path: Path, size: int) -> None:
    peft = changed(root / "lvtc_peft", tmp_path / "peft")
    content = (peft / WEIGHTS).read_bytes()
    (peft / WEIGHTS).write_bytes(content[:size])
    with pytest.raises(ConversionError, match="not a complete safetensors file"):
        import_peft(peft, tmp_path / "lora", root / "lvtc")


def test_directories_that_are_not_adapters(root: Path, tmp_path: Path) -> None:
    peft = changed(root / "lvtc_peft", tmp_path / "peft")
    (peft / WEIGHTS).rename(peft / "adapter_model.bin")
    with pytest.raises(ConversionError, match="a pickle; save it as safetensors"):
        import_peft(peft, tmp_path / "lora", root / "lvtc")
    import_peft(root / "lvtc_peft", tmp_path / "lora", root / "lvtc")
    with pytest.raises(ConversionError, match="holds adapters itself"):
        import_peft(root / "lvtc_peft", tmp_path / "twice", tmp_path / "lora")


WRONG_COMMANDS = {
    "no base": (["import", "--peft", "{peft}", "--save", "{new}"], "adapters need --base"),
    "base of a model": (["import", "--hf", "{hf}", "--base", "{base}", "--save", "{new}"], "a whole model has no base"),
    "another model": (
        ["import", "--peft", "{peft}", "--base", "{base}", "--save", "{new}", "--expand-layer", "2", "--init-missing"],
        "--expand-layer, --init-missing: adapters have their base's model",
    ),
    "no adapters": (["import", "--peft", "{hf}", "--base", "{base}", "--save", "{new}"], "no adapter_config.json"),
    "no such base": (["export", "--load", "{base}", "--base", "{new}", "--hf", "{new}"], "no such directory"),
    "a name for nothing": (["export", "--load", "{base}", "--hf", "{new}", "--base-name", "x"], "it needs --peft"),
    "options of a directory": (
        ["export", "--load", "{base}", "--peft", "{new}", "--like", "{hf}", "--max-shard-size", "1GB"],
        "--like, --max-shard-size: only a Hugging Face directory has that",
    ),
    "code of a merge": (["export", "--load", "{base}", "--save", "{new}", "--remote-code"], "--remote-code: only a"),
    "types of a merge": (["export", "--load", "{base}", "--save", "{new}", "--dtype", "float32"], "types of its base"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_COMMANDS)
def test_wrong_commands(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    words, message = WRONG_COMMANDS[case]
    places = {
        "peft": root / "lvtc_peft", "base": root / "lvtc", "hf": root / "hf" / "lvtc", "new": tmp_path / "new",
    }  # fmt: skip
    assert convert.main([word.format(**places) for word in words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_commands(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The three ways out, and the way in, as a user types them."""
    base, lora, one = str(root / "chat"), str(tmp_path / "lora"), ["--processes", "1", "--quiet"]
    peft, merged = str(tmp_path / "peft"), str(tmp_path / "merged")
    assert (
        convert.main(["import", "--peft", str(root / "chat_peft"), "--base", base, "--save", lora, *one]) == 0
    )
    assert "train on with" in capsys.readouterr().out
    assert convert.main(["export", "--load", lora, "--peft", peft, *one]) == 0
    assert "give --base-name" in capsys.readouterr().out
    assert convert.main(["export", "--load", lora, "--save", merged, *one]) == 0
    assert "that lost at most" in capsys.readouterr().out
    assert convert.main(["export", "--load", lora, "--hf", str(tmp_path / "hf"), *one]) == 0
    assert "that lost at most" in capsys.readouterr().out
    assert convert.main(["export", "--load", merged, "--hf", str(tmp_path / "hf2"), *one]) == 0
    assert "that lost at most" not in capsys.readouterr().out
    first, second = read_all(tmp_path / "hf"), read_all(tmp_path / "hf2")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shortest_unique_end_of_a_name() -> None:
    others = {"projector.mlp.w1", "projector.attn.proj"}
    assert unique_suffix("layers.0.attention.wqkv", others) == "wqkv"
    assert unique_suffix("layers.0.feed_forward.w1", others) == "feed_forward.w1"
    assert unique_suffix("layers.0.attn.proj", others) == "0.attn.proj"
