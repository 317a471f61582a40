"""`ivlx dry-run`: checks and memory of a run on any number of GPUs, in one process without any."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_internvlx.commands.help import CommandParser
from megatron_internvlx.commands.programs import training_program
from megatron_internvlx.commands.train import add_run_arguments, run_here, split_ranks
from megatron_internvlx.commands.values import int_in_range
from megatron_internvlx.exit_codes import MISTAKE
from megatron_internvlx.yaml_files import load_yaml

MOST_RANKS = 1_000_000
_SIZES = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "dry_run_world_size": 0,
}


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


def fewest_ranks(sizes: Mapping[str, Any]) -> int:
    """Fewest ranks of a layout: tensor x pipeline x context parallel, in which experts must fit too."""
    pipeline = int(sizes["pipeline_model_parallel_size"])
    dense = int(sizes["tensor_model_parallel_size"]) * int(sizes["context_parallel_size"])
    experts = int(sizes["expert_model_parallel_size"])
    replicas = next(n for n in range(1, experts + 1) if dense * n % experts == 0)
    return pipeline * dense * replicas


def world_size(words: Sequence[str]) -> int | None:
    """GPUs that a dry run assumes; None if the arguments give a number of their own, or are mistaken."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--recipe")
    peek.add_argument("--without", nargs="+", default=[])
    for name in _SIZES:
        peek.add_argument(f"--{name.replace('_', '-')}", type=int)
    try:
        given = vars(peek.parse_known_args(list(words))[0])
        recipe = load_yaml(given["recipe"]) if given["recipe"] else {}
        left_out = [name.lstrip("-").replace("-", "_") for name in given["without"]]
        stated = {str(key).replace("-", "_"): value for key, value in recipe.items()}
        stated = {key: value for key, value in stated.items() if key not in left_out and value is not None}
        sizes = _SIZES | stated | {key: value for key, value in given.items() if value is not None}
        return None if sizes["dry_run_world_size"] else fewest_ranks(sizes)
    except (argparse.ArgumentError, OSError, ValueError, AttributeError, TypeError, StopIteration):
        return None  # the complete parser explains what is wrong


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
