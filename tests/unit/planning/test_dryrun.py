"""The dry run: every recipe can run as it stands, and what cannot run says why."""

import re
import sys
from pathlib import Path

import pytest

from tests.single import single  # noqa: F401  isort: skip  (sets Megatron up)
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.training.global_vars import destroy_global_vars

from megatron_internvlx import arguments
from megatron_internvlx.commands import plan, planner
from megatron_internvlx.planning import dryrun
from megatron_internvlx.planning.search import evaluate, find_plan

FOLDER = Path(__file__).parents[3] / "examples" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
EVERY_RECIPE = sorted(FOLDER.rglob("*.yaml"))
GRAPH_2B = next(path for path in RECIPES if path.name.startswith("internvlx_2b_pretrain"))
SFT_2B = next(path for path in RECIPES if path.name.startswith("internvlx_2b_sft"))
SFT_8B = next(path for path in RECIPES if path.name.startswith("internvlx_8b_sft"))


VARIABLE = ("--boundary", "variable", "--cuda-graph-impl", "none")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No run's globals or world size outlive a test."""
    import torch

    monkeypatch.setenv("WORLD_SIZE", "1")
    # restored afterwards: a dry run pretends to have another GPU
    monkeypatch.setattr(torch.cuda, "get_device_capability", torch.cuda.get_device_capability)
    forget()
    yield
    forget()


def forget():
    destroy_global_vars()
    destroy_num_microbatches_calculator()


def dry(monkeypatch, recipe, *changes):
    monkeypatch.setattr(sys, "argv", ["pretrain_vlm.py", "--recipe", str(recipe), "--dry-run", *changes])
    forget()
    return arguments.parse()


def test_there_is_a_recipe_for_every_size_and_phase():
    sizes = {"2b": 8, "8b": 64, "26b": 128, "40b": 128, "78b": 256, "30b_a3b": 64}
    names = [path.name for path in RECIPES]
    for size, gpus in sizes.items():
        for phase in ("pretrain", "sft"):
            assert any(name.startswith(f"internvlx_{size}_{phase}_{gpus}gpu_") for name in names)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_can_run(monkeypatch, capsys, recipe):
    args = dry(monkeypatch, recipe)
    assert args.world_size == int(recipe.stem.split("gpu")[0].rsplit("_", 1)[1])
    assert dryrun.run(args) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert text.count("\nstage ") == 1 and "tokens at most" in text
    plan = dryrun.check(args)
    # Recipes cut their tiles on GPUs, so two workers keep up.
    assert (plan.loading.sent, plan.loading.needed) == ("files", 2) and "\nhost memory " in text
    assert len(plan.stages) == args.pipeline_model_parallel_size
    assert {layer for stage in plan.stages for a, b in stage.chunks for layer in range(a, b)} == set(
        range(args.num_layers)
    )
    assert (
        plan.pipeline.schedule.micro_batches * plan.model.layout.data * args.micro_batch_size
        == args.global_batch_size
    )
    stated = re.search(r"(\d+) of 79 GiB", recipe.read_text())
    assert stated is not None
    assert plan.fullest.total / dryrun.GIB + dryrun.RESERVE_GIB == pytest.approx(int(stated[1]), abs=0.5)
    # "Packs" in the recipe and tokens per step in the report are true only of packed data.
    assert args.packing and args.loader == "energon"
    # Others are refused, or wait for a card: the table of docs/performance.md, "One CUDA graph per step".
    recordable = args.pipeline_model_parallel_size == 1 and not args.num_experts
    graph = args.cuda_graph_impl == "full_iteration"
    assert graph == bool(recordable and args.freeze_vision and not args.fp8)


def test_recipes_are_found_in_all_folders():
    folders = {path for path in FOLDER.iterdir() if path.is_dir()}
    assert {path.parent for path in EVERY_RECIPE} == {FOLDER, *folders} and len(folders) >= 3


@pytest.mark.parametrize("recipe", EVERY_RECIPE, ids=lambda path: path.stem)
def test_the_vocabulary_is_padded(monkeypatch, recipe):
    """On each tensor-parallel rank to a multiple of 64: matrix products over others take several times as long."""
    args = dry(monkeypatch, recipe)
    assert args.padded_vocab_size >= args.vocab_size
    assert args.padded_vocab_size % (64 * args.tensor_model_parallel_size) == 0


def test_memory_that_does_not_suffice_names_what_is_left_to_try(monkeypatch, capsys):
    assert dryrun.run(dry(monkeypatch, SFT_8B, "--gpu-memory-gib", "20", "--vision-recompute")) == 2
    message = capsys.readouterr().err.splitlines()[0]
    assert "more tensor (now 2) or pipeline parallelism (now 1)" in message
    assert "--recompute-granularity full" in message and "--vision-recompute" not in message


@pytest.mark.parametrize("recipe", [path for path in RECIPES if "_layout:" in path.read_text()], ids=str)
def test_recipes_with_stages_use_the_split_that_the_planner_finds(monkeypatch, recipe):
    args = dry(monkeypatch, recipe)
    forget()
    task = planner.Task(plan.parser().parse_args([]))
    memory = task.memory(task.layout.tensor, task.layout.pipeline, task.layout.data)
    best = find_plan(task.costs(), task.schedule, memory)
    assert best.proven
    # Several splits may be equally fast: all that hangs on the busiest stage is where its layers are.
    given = evaluate(task.costs(), task.schedule, dryrun.check(args).model.layout.counts, memory)
    assert given.seconds == pytest.approx(best.seconds, rel=1e-9)


def test_the_buffers_of_a_graph_are_counted(monkeypatch):
    """2B on 8 GPUs: 32 micro-batches a replica of 24 tiles, 6 on each of 4 tensor-parallel ranks."""
    graph = ("--cuda-graph-impl", "full_iteration")
    plan = dryrun.check(dry(monkeypatch, GRAPH_2B, *graph))
    (stage,) = plan.stages
    assert stage.inputs == 32 * 24 * 3 * 448**2
    assert "inputs" in dryrun.describe(plan)
    shared = dryrun.check(dry(monkeypatch, GRAPH_2B, *graph, "--tensor-model-parallel-size", "4"))
    assert shared.fullest.inputs == 4 * 32 * 6 * 3 * 448**2  # a fourth of the replicas
    eager = dryrun.check(dry(monkeypatch, GRAPH_2B, "--cuda-graph-impl", "none"))
    assert eager.fullest.total + stage.inputs + stage.evaluation == plan.fullest.total
    assert "inputs" not in dryrun.describe(eager)
    # One of 16 deep layers, with its projector of 24 tiles, and the features.
    deep = eager.stages[0].activations["deep"] / 16
    assert deep < stage.evaluation < 4 * deep
    assert "evaluation" in dryrun.describe(plan)


@pytest.mark.parametrize(("recipe", "tensor"), [(SFT_2B, 1), (SFT_8B, 2)], ids=["2b", "8b"])
def test_a_budget_of_supervised_tokens_saves_its_rows(monkeypatch, recipe, tensor):
    """Logits and inputs of the output layer, and its three products; nothing else changes."""
    all_rows = dryrun.check(dry(monkeypatch, recipe))
    few = dryrun.check(dry(monkeypatch, recipe, "--max-supervised-tokens-per-pack", "1024"))
    sizes, saved = few.model.sizes, 4096 - 1024
    assert (all_rows.stats.output_rows, few.stats.output_rows) == (4096, 1024)
    memory = 2 * saved * (sizes.hidden + sizes.padded_vocab // tensor)
    assert all_rows.fullest.total - few.fullest.total == memory
    assert all_rows.flops - few.flops == 128 * 3 * 2 * saved * sizes.hidden * sizes.padded_vocab
    assert "4,096 to the output layer" in dryrun.describe(all_rows)
    assert "1,024 to the output layer" in dryrun.describe(few)


def test_a_graph_trains_the_vision_encoder_with_torchs_attention(monkeypatch):
    graph = ("--cuda-graph-impl", "full_iteration")
    with pytest.raises(ValueError, match=r"Transformer Engine's attention .*add --vision-attention torch"):
        dry(monkeypatch, SFT_2B, *graph)
    plan = dryrun.check(dry(monkeypatch, SFT_2B, *graph, "--vision-attention", "torch"))
    without = dryrun.check(dry(monkeypatch, SFT_2B))
    # Its output may be copied, in each of 24 layers.
    more = plan.fullest.activations["vision"] - without.fullest.activations["vision"]
    assert more == 24 * plan.stats.vision_tiles * 1025 * 1024 * 2


def test_other_world_size_from_the_command_line(monkeypatch):
    plan = dryrun.check(dry(monkeypatch, SFT_8B, "--dry-run-world-size", "128"))
    assert plan.model.layout.data == 64
    assert plan.pipeline.schedule.micro_batches == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["--dry-run-world-size", "50"], "50"),
        (["--tensor-model-parallel-size", "16"], "8"),
        (["--global-batch-size", "100"], "100"),
        (["--gpu-memory-gib", "20"], "GiB per GPU"),
        (["--dry-run-world-size", "0"], "--dry-run-world-size 0: must be a number of GPUs"),
        (["--dry-run-json", "/proc/none.json"], "--dry-run-json /proc/none.json: No such file"),
        (["--micro-batch-size", "2"], "with --packing a micro-batch is one pack"),
        (["--max-tiles-per-pack", "5"], "tiles"),
        (["--seq-length", "1000000"], "max-position-embeddings"),
        (["--expand-layer", "40"], "must be between 1 and"),
        (["--tp-comm-overlap"], "--tp-comm-overlap: its buffers"),
        # 2 tensor-parallel ranks of 32 rows: MXFP8's blocks, where the other FP8 recipes need 16.
        (
            [*("--fp8-recipe", "mxfp8", "--fp8-format", "e4m3", "--seq-length", "8224"), *VARIABLE],
            "--seq-length 8224 must be a multiple of 64",
        ),
        (["--seq-length", "8200", *VARIABLE], "--seq-length 8200 must be a multiple of 32"),
    ],
)
def test_what_cannot_run_says_why(monkeypatch, capsys, changes, reason):
    try:
        code = dryrun.run(dry(monkeypatch, SFT_8B, *changes))
        message = capsys.readouterr().err
    except ValueError as error:  # the entry script prints it and returns 2
        code, message = 2, str(error)
    assert code == 2
    assert reason in message
