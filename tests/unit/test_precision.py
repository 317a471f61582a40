"""Named precisions become Megatron's arguments, and impossible sizes end with numbers and a remedy."""

import argparse
import sys
from dataclasses import replace

import pytest
import torch

from megatron_internvlx import platform

platform.setup()

from megatron.core.enums import Fp8Recipe  # noqa: E402
from megatron.training.argument_utils import core_transformer_config_from_args  # noqa: E402
from megatron.training.arguments import parse_args  # noqa: E402

from megatron_internvlx import arguments  # noqa: E402
from megatron_internvlx.config import TrainSettings  # noqa: E402
from megatron_internvlx.model.builder import fp8_parts  # noqa: E402
from megatron_internvlx.model.internvit import internvit_transformer_config  # noqa: E402
from megatron_internvlx.model.internvit_config import internvit_preset  # noqa: E402
from megatron_internvlx.model.sizes import model_sizes  # noqa: E402
from megatron_internvlx.precision import (  # noqa: E402
    PRECISIONS,
    DecoderWidths,
    Precision,
    check_precision,
    precision_defaults,
    row_alignment,
)
from megatron_internvlx.training.builder import ModelProvider  # noqa: E402

BASE = ["--model-preset", "internvlx_2b", "--seq-length", "4096", "--lr", "1e-3", "--train-iters", "1"]
BASE += ["--global-batch-size", "1", "--dry-run", "--transformer-impl", "transformer_engine"]


FP8 = Precision(
    bf16=True,
    fp16=False,
    fp8="hybrid",
    fp8_recipe="tensorwise",
    fp8_param_gather=False,
    first_last_layers_bf16=False,
    transformer_impl="transformer_engine",
    tensor_model_parallel_size=1,
    sequence_parallel=False,
)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch):
    def parse(*flags: str) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["pretrain_vlm.py", *BASE, *flags])
        tensor = (
            flags.index("--tensor-model-parallel-size") if "--tensor-model-parallel-size" in flags else None
        )
        monkeypatch.setenv("WORLD_SIZE", "1" if tensor is None else flags[tensor + 1])
        monkeypatch.setattr(platform, "pretend_hopper", lambda: None)
        args = parse_args(arguments.add_our_arguments)
        arguments.check_arguments(args)
        return args

    return parse


@pytest.mark.parametrize(
    "name,format_,recipe",
    [
        ("bf16", None, None),
        ("fp8_tensorwise", "hybrid", "tensorwise"),
        ("fp8_delayed", "hybrid", "delayed"),
        ("fp8_blockwise", "e4m3", "blockwise"),
        ("mxfp8", "e4m3", "mxfp8"),
    ],
)
def test_names_become_megatrons_arguments(parsed, name: str, format_: str | None, recipe: str | None) -> None:
    args = parsed("--precision", name)
    assert args.bf16 and args.fp8 == format_
    if recipe is None:
        assert row_alignment(args) == 1
        return
    assert args.fp8_recipe == recipe == Fp8Recipe[recipe].value
    assert row_alignment(args) == (32 if recipe == "mxfp8" else 16)
    if recipe == "delayed":
        assert (args.fp8_amax_history_len, args.fp8_amax_compute_algo) == (1024, "max")


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_gpu_tests_have_valid_arguments(parsed, name: str) -> None:
    """What tests/gpu runs in every precision passes all checks on any machine."""
    from tests.gpu.production import arguments as production

    args = parsed(*production(name))
    arguments.validate(args)
    assert ("vision" in (args.fp8_parts or ())) == bool(args.fp8)
    assert model_sizes(args).injection_layers == (2, 3)


def test_every_name_is_tested() -> None:
    marks = test_names_become_megatrons_arguments.pytestmark
    assert {case[0] for mark in marks for case in mark.args[1]} == set(PRECISIONS)


def test_megatron_takes_them(parsed) -> None:
    """Through Megatron's own checks to the config that its layers read."""
    args = parsed(
        "--precision", "fp8_tensorwise", "--first-last-layers-bf16", "--num-layers-at-start-in-bf16", "2"
    )
    arguments.validate(args)
    config = core_transformer_config_from_args(args)
    assert (config.fp8, config.fp8_recipe, config.bf16) == ("hybrid", "tensorwise", True)
    assert config.first_last_layers_bf16 and config.num_layers_at_start_in_bf16 == 2


def test_later_flags_and_recipes_win(parsed, tmp_path) -> None:
    assert parsed("--precision", "fp8_tensorwise", "--fp8-recipe", "blockwise").fp8_recipe == "blockwise"
    recipe = tmp_path / "r.yaml"
    recipe.write_text("precision: fp8_delayed\nfp8_amax_history_len: 16\n")
    args = parsed("--recipe", str(recipe))
    assert (args.fp8_recipe, args.fp8_amax_history_len) == ("delayed", 16)
    assert parsed("--recipe", str(recipe), "--precision", "mxfp8").fp8_recipe == "mxfp8"


def test_sequence_parallel_rows_align_on_every_rank(parsed) -> None:
    args = parsed("--precision", "mxfp8", "--tensor-model-parallel-size", "4", "--sequence-parallel")
    assert row_alignment(args) == 32 * 4


def test_parts(parsed) -> None:
    named = ("--fp8-parts", "decoder", "projectors")
    assert fp8_parts(parsed("--precision", "fp8_tensorwise")) == []
    assert fp8_parts(parsed("--precision", "bf16", *named)) == []
    assert fp8_parts(parsed("--precision", "fp8_tensorwise", *named)) == ["decoder", "projectors"]
    static = ["--boundary", "static", "--shallow-seq-length", "2048", "--max-tiles-per-pack", "16"]
    parsed("--precision", "fp8_tensorwise", "--fp8-parts", "decoder", "vision", *static)


@pytest.mark.parametrize("parts", [("decoder",), ("decoder", "vision")])
def test_the_vision_encoder_stays_in_bf16_unless_named(parsed, monkeypatch, parts: tuple[str, ...]) -> None:
    """From the flags through the builder to the encoder's own config."""
    static = ["--boundary", "static", "--shallow-seq-length", "2048", "--max-tiles-per-pack", "16"]
    args = parsed("--precision", "fp8_delayed", "--fp8-parts", *parts, *static)
    arguments.validate(args)
    config = core_transformer_config_from_args(args)
    asked = {}

    def record(*_: object, **fields: object) -> None:
        asked.update(fields)
        raise InterruptedError("seen enough")

    monkeypatch.setattr("megatron_internvlx.model.builder.InternVLX", record)
    with pytest.raises(InterruptedError):
        ModelProvider(args)(config=config)
    encoder = internvit_transformer_config(
        internvit_preset("internvit_300m"), config, fp8=asked["vision_fp8"]
    )
    found = (encoder.fp8, encoder.bf16, encoder.params_dtype)
    assert found == ("hybrid" if "vision" in parts else None, True, torch.bfloat16)
    if "vision" in parts:
        fields = ("fp8_recipe", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_margin")
        assert [getattr(encoder, name) for name in fields] == [getattr(config, name) for name in fields]
        assert encoder.fp8_amax_history_len == 1024


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--precision fp9", "--precision fp9: unknown; one of bf16, fp8_tensorwise"),
        ("--precision mxfp8 --fp8-parts eyes", "--fp8-parts eyes: unknown"),
        ("--precision mxfp8 --fp8-parts vision", "--fp8-parts without decoder"),
        (
            "--precision fp8_tensorwise --transformer-impl local",
            "it is local: without a GPU use --precision bf16",
        ),
        (
            "--precision fp8_delayed --first-last-layers-bf16",
            "delayed scaling cannot leave single layers out",
        ),
        ("--precision fp8_tensorwise --fp8-param-gather", "name projectors in --fp8-parts"),
        (
            "--precision fp8_tensorwise --ffn-hidden-size 8200",
            "--ffn-hidden-size 8200 is not a multiple of 16",
        ),
        (
            "--precision mxfp8 --ffn-hidden-size 8256 --tensor-model-parallel-size 8",
            "8256 is not a multiple of 256: mxfp8 FP8 needs 32 on each of 8 tensor-parallel ranks",
        ),
        (
            "--precision fp8_tensorwise --fp8-parts decoder vision",
            "a tile has 1025 tokens.*--max-tiles-per-pack a multiple of 16",
        ),
        (
            "--precision fp8_tensorwise --fp8-parts decoder vision --boundary static "
            "--shallow-seq-length 2048 --max-tiles-per-pack 13",
            "--max-tiles-per-pack 13 makes 13325 rows on each of 1",
        ),
    ],
)
def test_impossible_precisions(parsed, flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(*flags.split())


def test_projector_rows_must_align() -> None:
    widths = DecoderWidths(64, 4, 16, True, 4, 64, None, None)
    projectors = TrainSettings(fp8_parts=["decoder", "projectors"])
    with pytest.raises(ValueError, match="4 rows per tile are not a multiple of 16"):
        check_precision(FP8, widths, projectors, tokens_per_tile=65, cells=(4, 16))
    check_precision(FP8, widths, TrainSettings(), tokens_per_tile=65, cells=(4, 16))


def test_no_name_changes_nothing() -> None:
    assert precision_defaults(None) == {}


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
    precision = replace(FP8, **{"fp8": None} | changes)
    assert precision.row_alignment == row_alignment(vars(precision)) == rows


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "fp8 tensorwise"),
        ({"fp8": None}, "bfloat16"),
        ({"fp8": None, "bf16": False, "fp16": True}, "float16"),
        ({"fp8": None, "bf16": False}, "float32"),
    ],
)
def test_description(changes: dict, text: str) -> None:
    assert replace(FP8, **changes).description == text
