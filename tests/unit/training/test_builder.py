"""Training and the planner's measurement build one and the same model."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.single import single  # isort: skip  (sets Megatron up)
from megatron.training.arguments import parse_args

from megatron_internvlx import arguments
from megatron_internvlx.model import internvlx
from megatron_internvlx.planning.measure import reduced_model
from megatron_internvlx.training import builder

FEATURES = """
--num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --normalization RMSNorm
--swiglu --disable-bias-linear --position-embedding-type rope --use-rope-scaling --rope-scaling-factor 3
--vision-preset internvit_tiny --image-size 56 --patch-size 14 --vocab-size 64 --max-tiles 2
--make-vocab-size-divisible-by 1 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 1
--global-batch-size 1 --lr 1e-3 --train-iters 1 --expand-layer 1 --inject-layers 3 --freeze-vision
--vision-recompute --data none --tokenizer-model none --loss-weighting square
--boundary static --shallow-seq-length 64 --max-tiles-per-pack 3
"""


@pytest.fixture
def args(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    single()
    monkeypatch.setattr(sys, "argv", ["pretrain_vlm.py", *FEATURES.split()])
    parsed = parse_args(arguments.add_our_arguments)
    arguments.check_arguments(parsed)
    arguments.validate(parsed)
    parsed.padded_vocab_size = 64
    return parsed


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What InternVLX was asked for, each time; it is then built without FP8, which needs a GPU."""
    seen: list[dict[str, Any]] = []
    build: Callable[..., internvlx.InternVLX] = internvlx.InternVLX

    def spy(config: Any, sizes: Any, **more: Any) -> internvlx.InternVLX:
        shown = {name: value for name, value in more.items() if name not in ("loss_weight", "pg_collection")}
        seen.append(shown | {"sizes": sizes})
        return build(config, sizes, **more | {"vision_fp8": False, "projector_fp8": False})

    monkeypatch.setattr("megatron_internvlx.model.builder.InternVLX", spy)
    return seen


def test_what_is_measured_is_what_trains(args: argparse.Namespace, asked: list[dict[str, Any]]) -> None:
    trained, measured = builder.ModelProvider(args)(), reduced_model(args)
    assert str(trained) == str(measured)  # every module, its class and sizes
    shapes = [
        {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}
        for model in (trained, measured)
    ]
    assert shapes[0] == shapes[1]
    assert asked[0] == asked[1]
    assert asked[1]["rope_scaling_factor"] == 3
    assert asked[1]["sizes"].tied
    assert trained.rotary.inv_freq.equal(measured.rotary.inv_freq)
    assert not any("output_layer.weight" in name for name in shapes[1])  # tied


def test_the_vision_encoder_is_measured_in_its_precision(
    args: argparse.Namespace, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = builder.core_transformer_config_from_args(args)
    for module in ("megatron_internvlx.training.builder", "megatron_internvlx.planning.measure"):
        monkeypatch.setattr(f"{module}.core_transformer_config_from_args", lambda _: plain)
    args.fp8, args.fp8_parts = "hybrid", ["decoder", "vision", "projectors"]
    reduced_model(args)
    assert asked[0]["vision_fp8"] and asked[0]["projector_fp8"]
