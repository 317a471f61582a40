"""What one CUDA graph cannot hold, and the limit of deterministic attention, by arguments alone."""

import argparse
import ast
import importlib.util
import inspect
import sys
import textwrap

import pytest

from megatron_internvlx import platform

platform.setup()

from megatron.training.arguments import parse_args  # noqa: E402

from megatron_internvlx import arguments  # noqa: E402
from megatron_internvlx.planning import graph  # noqa: E402
from megatron_internvlx.platform import cards  # noqa: E402
from tests.golden_weights import GOLDEN  # noqa: E402

STATIC = """--model-preset internvlx_tiny --data x --seq-length 4096 --lr 1e-3 --train-iters 1 --global-batch-size 2
--transformer-impl transformer_engine --precision bf16 --packing --loader energon --boundary static --freeze-vision
--max-tiles-per-pack 16 --shallow-seq-length 2048 --tokenizer-model""".split()  # noqa: SIM905
STATIC.append(f"{GOLDEN}/data/tokenizers/qwen2_fast")
RECORDED = ("--cuda-graph-impl", "full_iteration")
EXACT = ("--deterministic-mode", "--max-samples-per-pack", "64")


def parsed(monkeypatch: pytest.MonkeyPatch, *words: str) -> argparse.Namespace:
    """STATIC and more words on one rank, not checked yet; "no=WORD" takes a word away."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    given = [word for word in STATIC if f"no={word}" not in words]
    given += [word for word in words if not word.startswith("no=")]
    monkeypatch.setattr(sys, "argv", ["pretrain_vlm.py", *given])
    return parse_args(arguments.add_our_arguments)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch):
    def check(*words: str) -> argparse.Namespace:
        args = parsed(monkeypatch, *words)
        arguments.check_arguments(args)
        return args

    return check


@pytest.fixture(scope="module")
def recorded() -> argparse.Namespace:
    """A command line that one graph can hold: parsed once, because Megatron's parser takes a while to make."""
    with pytest.MonkeyPatch.context() as patch:
        return parsed(patch, *RECORDED)


@pytest.fixture
def check_changed(recorded, monkeypatch: pytest.MonkeyPatch):
    """Checks `recorded` with other values, by the names that they have after parsing."""
    monkeypatch.setattr(
        arguments, "check_precision", lambda *_, **__: None
    )  # the tiny widths do not suit FP8

    def check(**values: object) -> argparse.Namespace:
        assert values.keys() <= vars(recorded).keys()
        args = argparse.Namespace(**{**vars(recorded), **values})
        arguments.check_arguments(args)
        return args

    return check


def test_a_graph_has_transformer_engines_generators(checked) -> None:
    """Megatron would switch them on with a warning; its check of each loss is off, our own is not."""
    args = checked(*RECORDED)
    assert args.te_rng_tracker and not args.check_for_nan_in_loss_and_grad
    assert not checked().te_rng_tracker


EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
FP8 = {"fp8": "e4m3"}
TRAINED = {"freeze_vision": False}
# Values of arguments, and what the message says: which setting, why, and what to do where more than leaving it out is
# possible. One for each entry of `check_graph`; those that depend on more than one value are tested below.
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "boundary": (
        {"boundary": "variable"},
        "--boundary variable (micro-batches of different shapes; use static)",
    ),
    "local": ({"transformer_impl": "local"}, "--transformer-impl local (no GPU kernels)"),
    "pipeline": (
        {"world_size": 2, "pipeline_model_parallel_size": 2},
        "--pipeline-model-parallel-size above 1 (messages between stages were never recorded)",
    ),
    "experts": (EXPERTS, "--num-experts (tokens per expert are read on the host)"),
    "fp16": ({"bf16": False, "fp16": True}, "--fp16 (its loss scale changes on the host; use --bf16)"),
    "ramp-up": (
        {"rampup_batch_size": [1, 1, 8]},
        "--rampup-batch-size (a graph has as many micro-batches as it was recorded with)",
    ),
    "clipping": (
        {"clip_grad": 0.0},
        "--clip-grad 0 (the norm shows bad gradients, for which a graph has no other check)",
    ),
    "warm-up": (
        {"cuda_graph_warmup_steps": 0},
        "--cuda-graph-warmup-steps 0 (kernels are chosen and compiled in the first step)",
    ),
    "timers": ({"timing_log_level": 1}, "--timing-log-level above 0 (timers wait for the GPU)"),
    "evaluation in FP8": (
        {**FP8, "valid_data": "y"},
        "--valid-data in FP8 (an evaluation frees FP8 weights that the graph has recorded; leave it out, and evaluate "
        "the checkpoints in a job of their own)",
    ),
    "trained vision": (
        TRAINED,
        "a trained vision encoder with Transformer Engine's attention (the first replay ended with an illegal memory "
        "access; add --vision-attention torch or --freeze-vision)",
    ),
}
# What the table of docs/performance.md says runs in a graph.
ALLOWED: dict[str, dict[str, object]] = {
    "frozen vision": {},
    "full recompute": {
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
        "projector_drop_path": 0.0, "vision_recompute": True,
    },
    "drop path": {"projector_drop_path": 0.1, "vision_drop_path": 0.1},
    "distributed optimizer": {
        "world_size": 2, "use_distributed_optimizer": True, "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "vision trained with torch's attention": {**TRAINED, "vision_attention": "torch"},
    "FP8": FP8,
    "frozen parts": {"freeze_llm": True},
    "adapters": {"lora_rank": 3, "lora_alpha": 9.0, "lora_dropout": 0.1},
    "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "tensor and sequence parallelism": {
        "world_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True,
    },
    "replicas": {"world_size": 2},
    "validation": {"valid_data": "y"},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_graph_is_refused(check_changed, name: str) -> None:
    """For one reason and nothing else; without the graph the same arguments are valid."""
    values, reason = REFUSED[name]
    with pytest.raises(ValueError) as error:
        check_changed(**values)
    remedy = "--cuda-graph-impl none trains without a graph"
    assert str(error.value) == f"--cuda-graph-impl full_iteration cannot go with {reason}. {remedy}"
    check_changed(**values, cuda_graph_impl="none")


@pytest.mark.parametrize("kind", ["local", "transformer_engine"])
def test_graphs_of_single_layers_are_refused(check_changed, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"^--cuda-graph-impl {kind}: .*; use full_iteration .*, or none$"):
        check_changed(cuda_graph_impl=kind)


def test_all_reasons_are_told_at_once(check_changed) -> None:
    with pytest.raises(
        ValueError, match=r"cannot go with --clip-grad 0 \(.*\); --timing-log-level above 0 \("
    ):
        check_changed(clip_grad=0.0, timing_log_level=1)


@pytest.mark.parametrize("name", ALLOWED)
def test_a_graph_holds_what_the_guide_says(check_changed, name: str) -> None:
    assert check_changed(**ALLOWED[name]).te_rng_tracker


def test_every_refusal_has_a_case() -> None:
    """As the table in `check_graph` has entries."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(graph.check_graph)))
    (table,) = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    reasons = {ast.literal_eval(key) for key in table.keys if key is not None}
    of_the_environment = {reason for reason in reasons if reason.startswith("NCCL_")}  # tested below
    assert reasons - of_the_environment == {reason for _, reason in REFUSED.values()}


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
