"""`ivlx dry-run`: checks and memory of a run on any number of GPUs, in one process without any."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_internvlx.commands.help import CommandParser
from megatron_internvlx.commands.layout_words import fewest_ranks, layout_sizes
from megatron_internvlx.commands.programs import training_program
from megatron_internvlx.commands.train import add_run_arguments, run_here, split_ranks
from megatron_internvlx.commands.values import int_in_range
from megatron_internvlx.exit_codes import MISTAKE

MOST_RANKS = 1_000_000


def parser() -> argparse.ArgumentParser:
    """Create the parser for help and completion; pretrain_vlm.py parses the arguments, with Megatron's."""
    it = CommandParser(
        "dry-run",
        "Check a run and print layers, parameters and memory per pipeline stage, without GPUs and data.",
        about="The arguments are those of ivlx train. The number of GPUs is --ranks, else the recipe's "
        "dry_run_world_size, else the fewest that the layout needs.",
        examples=(
            "ivlx dry-run --recipe examples/recipes/internvlx_78b_sft_256gpu_h100_fp8.yaml",
            "ivlx dry-run --recipe examples/recipes/internvlx_8b_sft_64gpu_h100_fp8.yaml --ranks 128",
        ),
        exits={0: "the run can start", MISTAKE: "it cannot, with one message"},
        rest="[--NAME VALUE ...]",
    )
    start = it.add_argument_group("Start")
    start.add_argument("--recipe", metavar="FILE", help="flat YAML file of arguments")
    start.add_argument("--without", metavar="NAME", nargs="+", help="ignore these settings of the recipe")
    start.add_argument("--ranks", type=int_in_range(1, MOST_RANKS), help="number of GPUs of the run")
    add_run_arguments(it)
    return it


def world_size(words: Sequence[str]) -> int | None:
    """GPUs that a dry run assumes; None if the arguments give a number of their own, or are mistaken."""
    sizes = layout_sizes(words)
    return None if sizes is None or sizes["dry_run_world_size"] else fewest_ranks(sizes)


def main(argv: Sequence[str] | None = None) -> int:
    """Check a run; returns the exit code."""
    given, rest = split_ranks("dry-run", sys.argv[1:] if argv is None else argv, MOST_RANKS)
    ranks = given or world_size(rest)
    size = ["--dry-run-world-size", str(ranks)] if ranks else []
    try:
        program = training_program()
    except ValueError as error:
        print(f"ivlx dry-run: {error}", file=sys.stderr)
        return MISTAKE
    return run_here(program, [*rest, "--dry-run", *size])
