"""The command line: presets, recipes, refusals with a message, and flags that users rely on."""

import argparse
import re
import sys
from pathlib import Path

from tests import single  # noqa: F401  # isort: skip  (sets Megatron up)
import pytest
import torch
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import parse_args

from megatron_internvlx import arguments
from megatron_internvlx.config import SETTINGS
from megatron_internvlx.model.presets import PRESETS, preset
from tests.golden_weights import GOLDEN

TOKENIZER = GOLDEN / "data" / "tokenizers" / "qwen2_fast"
TINY = ["--model-preset", "internvlx_tiny"]
NEEDED = ["--tokenizer-model", str(TOKENIZER), "--data", "meta.json", "--seq-length", "256"]
NEEDED += ["--lr", "1e-3", "--train-iters", "1", "--global-batch-size", "1"]


def parsed(monkeypatch: pytest.MonkeyPatch, *flags: str) -> argparse.Namespace:
    """All of `arguments.parse` but Megatron's global variables, which a process can set only once."""
    monkeypatch.setattr(sys, "argv", ["pretrain_vlm.py", *flags])
    args = parse_args(arguments.add_our_arguments)
    arguments.check_arguments(args)
    arguments.validate(args)
    return args


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Megatron asks the device whether it has grouped matrix products, for the mixture of experts.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    args = parsed(monkeypatch, "--model-preset", name, *NEEDED)
    for setting, value in PRESETS[name].items():
        if setting != "vocab_size":
            assert getattr(args, setting) == value, setting
    # Released vocabularies may be larger than the tokenizer; small models follow it.
    size = arguments.tokenizer_size(str(TOKENIZER))
    assert args.vocab_size == (size if "tiny" in name else max(size, PRESETS[name]["vocab_size"]))


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"--model-preset internvlx_3b: unknown; one of .*internvlx_2b"):
        preset("internvlx_3b")


def test_order_of_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preset, then recipe, then command line."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_preset: internvlx_tiny\nexpand-layer: 4\ninject_layers: [5]\nseq_length: 128\n")
    args = parsed(monkeypatch, "--recipe", str(recipe), *NEEDED)
    assert (args.num_layers, args.expand_layer, args.inject_layers) == (6, 4, [5])
    assert args.seq_length == 256
    args = parsed(monkeypatch, "--recipe", str(recipe), *NEEDED, "--expand-layer", "2", "--vocab-size", "900")
    assert (args.expand_layer, args.vocab_size) == (2, 900)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("a: [1\n", "not YAML"),
        ("- seq_length\n", "a recipe is a flat mapping of argument names to values"),
        ("seq_length: 8\nexpand_layr: 3\nzeta: 1\n", "unknown arguments expand_layr, zeta"),
    ],
)
def test_bad_recipes(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"--recipe {re.escape(str(path))}: {message}"):
        parsed(monkeypatch, *TINY, *NEEDED, "--recipe", str(path))


def test_a_preset_that_this_megatron_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "strange", {"num_lairs": 3, "hidden_size": 16})
    with pytest.raises(ValueError, match="these settings are no arguments of this Megatron: num_lairs"):
        parsed(monkeypatch, "--model-preset", "strange", *NEEDED)


STATIC = ["--boundary", "static", "--max-tiles-per-pack", "13", "--shallow-seq-length", "128"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*TINY, "--image-size", "225"], "image_size 225 is not a multiple of patch_size 28"),
        ([*TINY, "--vision-preset", "clip"], "unknown vision encoder 'clip'"),
        ([*TINY, "--select-layer", "9"], "select_layer 9 is outside -4..3"),
        ([], "--num-layers is not set: give it, or a --model-preset"),
        (["--num-layers", "4", "--hidden-size", "64"], "--num-attention-heads is not set"),
        ([*TINY, "--expand-layer", "6"], "--expand-layer 6 is outside 1..5"),
        ([*TINY, "--high-ratio", "0.3"], "--high-ratio 0.3 does not fit 8x8 patches"),
        ([*TINY, "--hidden-size", "136"], "--hidden-size 136 is not a multiple of 16"),
        ([*TINY, "--context-parallel-size", "2"], "--context-parallel-size: not supported with InternVL-X"),
        ([*TINY, "--mtp-num-layers", "1"], "--mtp-num-layers: not supported"),
        (
            [*TINY, "--multi-latent-attention", "--use-torch-fsdp2"],
            "--multi-latent-attention, --use-torch-fsdp2: not supported",
        ),
        ([*TINY, "--use-megatron-fsdp"], "--use-megatron-fsdp: not supported"),
        ([*TINY, "--cuda-graph-impl", "local"], "--cuda-graph-impl: not supported"),
        ([*TINY, "--heterogeneous-layers-config-path", "x"], "--heterogeneous-layers-config-path: not supp"),
        (
            [*TINY, "--num-experts", "4", "--recompute-modules", "moe"],
            "--recompute-modules moe: a recomputed router",
        ),
        (
            [*TINY, "--max-position-embeddings", "128"],
            "--seq-length 256 is more than the model's --max-position-embeddings 128",
        ),
        ([*TINY, "--boundary", "static"], "--boundary static needs --max-tiles-per-pack and --shallow-seq"),
        ([*TINY, *STATIC, "--seq-length", "208"], "--seq-length 208 does not hold the 208 visual rows"),
        (
            [*TINY, "--freeze-vision", "--freeze-llm", "--freeze-projectors"],
            "--freeze-vision --freeze-llm --freeze-projectors: nothing is left to train",
        ),
        ([*TINY, "--min-tiles", "0"], "--min-tiles 0 --max-tiles 12: want 1 <= min <= max"),
        ([*TINY, "--min-tiles", "7", "--max-tiles", "6"], "--min-tiles 7 --max-tiles 6: want"),
        ([*TINY, "--data", ""], "--data is not set: the meta.json of the training data"),
        (
            [*TINY, "--tokenizer-model", ""],
            "--tokenizer-model is not set: a Hugging Face tokenizer directory",
        ),
        ([*TINY, "--train-samples", "3"], "Megatron refuses the arguments: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parsed(monkeypatch, *NEEDED, *flags)


def test_per_token_loss_cannot_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("calculate_per_token_loss: false\n")
    with pytest.raises(ValueError, match="the loss weights need Megatron's --calculate-per-token-loss"):
        parsed(monkeypatch, *TINY, *NEEDED, "--recipe", str(recipe))


def test_static_boundary_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parsed(monkeypatch, *TINY, *NEEDED, *STATIC)
    assert (args.boundary, args.max_tiles_per_pack, args.shallow_seq_length) == ("static", 13, 128)


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, 1),
        ({"sequence_parallel": True, "tensor_model_parallel_size": 4}, 4),
        ({"tensor_model_parallel_size": 4}, 1),
        ({"fp8": "hybrid"}, 16),
        ({"fp8": "hybrid", "fp8_recipe": "mxfp8"}, 32),
        (
            {
                "fp8": "e4m3",
                "fp8_recipe": "mxfp8",
                "sequence_parallel": True,
                "tensor_model_parallel_size": 2,
            },
            64,
        ),
    ],
)
def test_row_alignment(changes: dict, rows: int) -> None:
    defaults = {
        "fp8": None,
        "fp8_recipe": "delayed",
        "sequence_parallel": False,
        "tensor_model_parallel_size": 1,
    }
    assert arguments.row_alignment(argparse.Namespace(**defaults | changes)) == rows


def test_complain_once(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert arguments.complain(ValueError("no such thing")) == 2
    assert capsys.readouterr().err == ""
    assert arguments.complain(ValueError("no such thing"), from_any_rank=True) == 2
    monkeypatch.setenv("RANK", "0")
    assert arguments.complain(ValueError("no such thing")) == 2
    assert capsys.readouterr().err == "pretrain_vlm.py: no such thing\n" * 2


def test_flags_stay() -> None:
    """Users' scripts and recipes hold these: do not rename or remove one without a word in the changelog."""
    parser = argparse.ArgumentParser(add_help=False)
    for settings in SETTINGS:
        ArgumentGroupFactory(settings).build_group(parser, title=settings.__name__)
    flags = {option for action in parser._actions for option in action.option_strings}
    lost = set(FLAGS.split()) - flags
    assert not lost


FLAGS = """
--auto-resume --boundary --conversation-template --data --dry-run --dry-run-world-size --expand-layer
--freeze-llm --freeze-projectors --freeze-vision --gpu-memory-gib --high-ratio --image-size
--inject-layers --loader-workers --loss-weighting --low-ratio --max-rejects --max-tiles
--max-tiles-per-pack --max-tries --min-tiles --model-preset --no-thumbnail --patch-size
--pixel-shuffle-version --predictions-file --projector --projector-drop-path --rejects-file
--released-quirks --report-file --rvtc --select-layer --shallow-seq-length
--static-image-size --upsample --valid-data --vision-drop-path --vision-overrides --vision-preset
--vision-recompute
"""
