"""`ivlx plan`: the decoder layers of each pipeline stage, and the time of a step."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_internvlx.commands.help import CommandParser, flags, nearest
from megatron_internvlx.commands.values import float_in_range, int_in_range
from megatron_internvlx.exit_codes import DONE, MISTAKE
from megatron_internvlx.ranks import is_first_rank

MOST = 65_536


def parser() -> argparse.ArgumentParser:
    """Create the parser of the planner's arguments; all others are those of pretrain_vlm.py."""
    it = CommandParser(
        "plan",
        "Plan the pipeline of a run: the decoder layers of each stage, and the time of a step.",
        about="All other arguments are those of ivlx train, such as --recipe. Nothing is trained.",
        examples=(
            "ivlx plan --recipe examples/recipes/internvlx_8b_sft_64gpu_h100_fp8.yaml --timeline plan.png",
            "ivlx plan --model-preset internvlx_8b --seq-length 4096 --pipeline 4 --virtual 2 --micro-batches 16",
            "torchrun --nproc-per-node 4 tools/plan_pipeline.py --recipe R.yaml --measure profile.json",
        ),
        rest="[--recipe FILE] [--NAME VALUE ...]",
    )
    add = it.add_argument_group("Schedule").add_argument
    size = int_in_range(1, MOST)
    add("--pipeline", type=size, help="pipeline ranks (unset: --pipeline-model-parallel-size)")
    add("--virtual", type=size, help="model chunks per rank (unset: that of the arguments, or 1)")
    add("--micro-batches", type=size, help="per step and replica (unset: from the batch sizes)")
    add = it.add_argument_group("Speed of the machine").add_argument
    rate = float_in_range(0, 1e9, above=True)
    add("--tflops", type=rate, help="sustained TFLOP/s of one GPU (unset: 400, with FP8 600; assumed)")
    add("--bandwidth", type=rate, help="GB/s between stages, per GPU (unset: 50, that is 400 Gbit/s)")
    add("--latency", type=float_in_range(0, 1e9), help="microseconds per message (unset: 20)")
    add("--profile", metavar="FILE", help="measured seconds, JSON, instead of FLOPs")
    add("--measure", metavar="FILE", help="only measure the layers on this machine and write a profile")
    add("--repeats", type=size, default=5, help="repeated measurements, with --measure")
    add = it.add_argument_group("What else to show").add_argument
    add("--timeline", metavar="FILE", help="draw the simulated step, planned and uniform, as PNG")
    add("--expansions", action="store_true", help="compare positions of the expansion (LVTC)")
    add("--gpus", type=int_in_range(1, 1_000_000), help="propose TP, PP and DP for this number of GPUs")
    add("--gpus-per-node", type=size, default=8, help="limit of tensor parallelism")
    return it


def main(argv: Sequence[str] | None = None) -> int:
    """Plan or measure; returns the exit code."""
    it = parser()
    options, rest = it.parse_known_args(argv)
    sys.argv = [sys.argv[0], *rest] + ([] if options.measure else ["--dry-run"])
    from megatron_internvlx import platform

    platform.setup()
    from megatron_internvlx.commands import planner

    try:
        if options.measure:
            planner.measure(options)
        else:
            planner.plan(options)
    except (ValueError, OSError) as error:
        if is_first_rank():
            # Megatron's parser, which got all other words, cannot suggest ours.
            wrong = [word for word in rest if word.startswith("--") and f"arguments {word}" in str(error)]
            hint = nearest(wrong[0], flags(it), least=0.8) if wrong else ""
            print(f"ivlx plan: {error}{hint}", file=sys.stderr)
        return MISTAKE
    return DONE
