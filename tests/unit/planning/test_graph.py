"""What one CUDA graph cannot hold, and the limit of deterministic attention, by arguments alone."""

import argparse
import importlib.util
import sys

import pytest

from megatron_internvlx import platform

platform.setup()

from megatron.training.arguments import parse_args  # noqa: E402

from megatron_internvlx import arguments  # noqa: E402
from megatron_internvlx.planning import graph  # noqa: E402
from megatron_internvlx.platform import cards  # noqa: E402
from tests.golden_weights import GOLDEN  # noqa: E402

STATIC = """--model-preset internvlx_tiny --data x --seq-length 4096 --lr 1e-3 --train-iters 1 --global-batch-size 1
--transformer-impl transformer_engine --precision bf16 --packing --loader energon --boundary static --freeze-vision
--max-tiles-per-pack 16 --shallow-seq-length 2048 --tokenizer-model""".split()  # noqa: SIM905
STATIC.append(f"{GOLDEN}/data/tokenizers/qwen2_fast")
RECORDED = ("--cuda-graph-impl", "full_iteration")
EXACT = ("--deterministic-mode", "--max-samples-per-pack", "64")


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)

    def check(*words: str) -> argparse.Namespace:
        given = [word for word in STATIC if f"no={word}" not in words]
        given += [word for word in words if not word.startswith("no=")]
        monkeypatch.setattr(sys, "argv", ["pretrain_vlm.py", *given])
        args = parse_args(arguments.add_our_arguments)
        arguments.check_arguments(args)
        return args

    return check


def test_a_graph_has_transformer_engines_generators(checked) -> None:
    """Megatron would switch them on with a warning; its check of each loss is off, our own is not."""
    args = checked(*RECORDED)
    assert args.te_rng_tracker and not args.check_for_nan_in_loss_and_grad
    assert not checked().te_rng_tracker


def test_an_evaluation_beside_a_graph_in_fp8_is_refused(checked, monkeypatch) -> None:
    fp8 = ("--precision", "fp8_tensorwise", "--vocab-size", "512")
    monkeypatch.setattr(
        arguments, "check_precision", lambda *_, **__: None
    )  # the tiny widths do not suit FP8
    with pytest.raises(
        ValueError, match=r"--valid-data in FP8 .*evaluate the checkpoints in a job of their own"
    ):
        checked(*RECORDED, *fp8, "--valid-data", "y")
    checked(*RECORDED, *fp8)
    checked(*RECORDED, "--valid-data", "y")
    checked(*fp8, "--valid-data", "y")


def test_scores_count_the_padding_as_a_sample() -> None:
    assert graph.attention_scores(64, 8, 4096) == 65 * 8 * 4096**2
    assert graph.attention_scores(1, 32, 4096) == graph.SCORES_LIMIT  # 8B: two segments of 4,096 rows


def test_deterministic_static_packs_over_the_limit_are_refused_on_hopper(checked, monkeypatch) -> None:
    found: list[str] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found.append(name))
    monkeypatch.setattr(cards, "capability", lambda: graph.HOPPER)
    with pytest.raises(
        ValueError, match=r"\(64 samples \+ padding\) x 4 heads x 4096\^2 = 4.1 x 2\^30.*9 GB"
    ) as error:
        checked(*EXACT)
    assert "set --max-samples-per-pack 14 or less, or install flash-attn" in str(error.value)
    assert found == ["flash_attn"]
    checked("--deterministic-mode", "--max-samples-per-pack", "14")
    with pytest.raises(ValueError, match="set --max-samples-per-pack 14"):
        checked("--deterministic-mode", "--max-samples-per-pack", "15")
    checked("--max-samples-per-pack", "64")  # not deterministic
    monkeypatch.setattr(cards, "capability", lambda: (10, 0))
    checked(*EXACT)
    monkeypatch.setattr(cards, "capability", lambda: graph.HOPPER)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    checked(*EXACT)


FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
ADAPTERS = ("--lora-rank", "2", "--lora-alpha", "4", "--lora-dropout", "0.1")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (FULL, "--projector-drop-path 0.1"),  # of the injections, which is the default
        ((*FULL, "--projector-drop-path", "0", "--hidden-dropout", "0.2"), "--hidden-dropout 0.2"),
        (("--recompute-granularity", "selective", "--attention-dropout", "0.1"), "--attention-dropout 0.1"),
        (("--recompute-granularity", "selective", *ADAPTERS), "--lora-dropout 0.1"),
        (("--vision-recompute", "--vision-drop-path", "0.1"), "--vision-drop-path 0.1"),
    ],
    ids=str,
)
def test_recomputation_of_random_drops_is_refused_in_a_graph(
    checked, words: tuple[str, ...], named: str
) -> None:
    """Its generators are not set back, so the gradients would be those of another forward pass."""
    trained = ("no=--freeze-vision", "--vision-attention", "torch") if "--vision-recompute" in words else ()
    with pytest.raises(
        ValueError, match=rf"drops at random \({named}: other numbers would be drawn the second"
    ):
        checked(*RECORDED, *trained, *words)
    checked(*trained, *words)


def test_recomputation_of_what_is_not_random_is_recorded(checked) -> None:
    still = ("--projector-drop-path", "0")
    checked(*RECORDED, *FULL, *still)
    checked(*RECORDED, "--hidden-dropout", "0.1")
    checked(
        *RECORDED, "--recompute-granularity", "selective", "--hidden-dropout", "0.1"
    )  # outside of core_attn
    checked(*RECORDED, "--vision-recompute", "--vision-drop-path", "0.1")  # frozen: it has no backward pass


@pytest.mark.parametrize("name", graph.ALLOCATOR_VARIABLES)
def test_nccl_registers_nothing_in_memory_that_moves(checked, monkeypatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    monkeypatch.delenv("NCCL_GRAPH_REGISTER", raising=False)
    checked(*RECORDED)  # training sets it to 0
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "1")
    with pytest.raises(ValueError, match="NCCL_GRAPH_REGISTER above 0 with expandable_segments:True"):
        checked(*RECORDED)
    checked()
    monkeypatch.setenv(name, "expandable_segments:False")
    checked(*RECORDED)
