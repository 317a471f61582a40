"""Arguments of the GPU report's rows: whole checks, on any machine."""

import argparse
import copy
import sys

import pytest
import torch
import yaml

from megatron_internvlx import platform

platform.setup()

from megatron.training.arguments import parse_args  # noqa: E402

from benchmarks.gpu_report import rows  # noqa: E402
from megatron_internvlx import arguments  # noqa: E402
from megatron_internvlx.planning import dryrun, graph  # noqa: E402
from megatron_internvlx.platform import cards  # noqa: E402

STEPPED = [row for row in rows.all_rows() if row.argv]
RECIPES = rows.ROOT / "examples" / "recipes"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)

    def parse(*words: str) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["benchmark", *words])
        args = parse_args(arguments.add_our_arguments)
        arguments.check_arguments(args)
        return args

    yield parse
    torch.use_deterministic_algorithms(False)  # as --deterministic-mode has it


@pytest.mark.parametrize("row", STEPPED, ids=lambda row: row.name)
def test_rows_have_valid_arguments_that_fit_the_gpu(parsed, monkeypatch, row: rows.Row) -> None:
    """With the memory that the dry run predicts for them, its reserve included."""
    for name, value in row.environment.items():
        monkeypatch.setenv(name, value)
    args = parsed(*row.argv, "--gpu-memory-gib", "79")
    assert (args.cuda_graph_impl == "full_iteration") == ("graph" in row.name)
    arguments.validate(args)
    dryrun.check(copy.copy(args))
    tokens = [sum(tiles * 256 + text for tiles, text in pack) for pack in row.packs]
    assert max(tokens) <= args.seq_length < 1.25 * min(tokens)
    assert max(sum(tiles for tiles, _ in pack) for pack in row.packs) <= args.max_tiles_per_pack


@pytest.mark.parametrize("row", STEPPED, ids=lambda row: row.name)
def test_fp8_rows_have_the_parts_of_the_recipes(parsed, row: rows.Row) -> None:
    """A row that says FP8 measures what a recipe trains."""
    recipe = yaml.safe_load((RECIPES / "internvlx_8b_sft_64gpu_h100_fp8.yaml").read_text())
    args = parsed(*row.argv)
    assert bool(args.fp8) == ("fp8" in row.name) == ("--fp8-parts" in row.argv)
    if args.fp8 and "everywhere" in row.name:
        assert set(args.fp8_parts) == {*recipe["fp8_parts"], "vision"}
    elif args.fp8:
        assert args.fp8_parts == recipe["fp8_parts"]


def test_curves_compare_and_begin_without_an_update(parsed) -> None:
    """The first update would follow gradients scaled without a history; all curves have equal learning rates."""
    curves = [row for row in STEPPED if row.kind == "curve"]
    rates = set()
    for row in curves:
        args = parsed(*row.argv)
        assert args.lr_warmup_iters == 1 and args.lr_warmup_init == 0, row.name
        rates.add((args.lr, args.min_lr, args.lr_decay_style, args.train_iters, args.global_batch_size))
    assert len(rates) == 1
    assert len(curves) == len(rows.CURVES)


@pytest.mark.parametrize("row", STEPPED, ids=lambda row: row.name)
def test_tiny_rows_have_arguments_that_a_cpu_takes(parsed, row: rows.Row) -> None:
    small = rows.tiny(row)
    args = parsed(*small.argv)
    assert args.transformer_impl == "local" and args.cuda_graph_impl == "none" and not args.fp8
    assert ("--vision-recompute" in small.argv) == (
        "--vision-recompute" in row.argv
    )  # no flag went with another
    assert max(sum(tiles for tiles, _ in pack) for pack in small.packs) <= args.max_tiles_per_pack


@pytest.mark.parametrize("row", [row for row in STEPPED if "exact" in row.name], ids=lambda row: row.name)
def test_deterministic_packs_fit_into_hoppers_attention(parsed, monkeypatch, row: rows.Row) -> None:
    """Fused, and with a workspace for which there is room beside the other curves."""
    monkeypatch.setattr(cards, "capability", lambda: graph.HOPPER)
    args = parsed(*row.argv)
    scores = graph.attention_scores(args.max_samples_per_pack, args.num_attention_heads, args.seq_length)
    assert scores < graph.SCORES_LIMIT
    assert scores * graph.WORKSPACE_PER_SCORE < 4e9
    assert max(len(pack) for pack in row.packs) <= args.max_samples_per_pack
