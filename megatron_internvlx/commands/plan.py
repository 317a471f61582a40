"""Plan the pipeline of a run: the decoder layers of each stage, and the time of a step.

    tools/plan_pipeline.py --recipe examples/recipes/internvlx_8b_sft_64gpu_h100_fp8.yaml --timeline plan.png
    tools/plan_pipeline.py --model-preset internvlx_8b --seq-length 4096 --pipeline 4 --virtual 2 \\
        --micro-batches 16
    torchrun --nproc-per-node 4 tools/plan_pipeline.py --recipe R.yaml --measure profile.json

All other arguments are those of pretrain_vlm.py. Nothing is trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_internvlx import platform
from megatron_internvlx.commands.values import float_in_range, int_in_range
from megatron_internvlx.ranks import is_first_rank

MOST = 65_536


def parser() -> argparse.ArgumentParser:
    """Create the parser of the planner's arguments."""
    it = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = it.add_argument
    add(
        "--pipeline",
        type=int_in_range(1, MOST),
        help="pipeline ranks; default: --pipeline-model-parallel-size",
    )
    add(
        "--virtual",
        type=int_in_range(1, MOST),
        default=None,
        help="model chunks per rank; default: that of the arguments, or 1",
    )
    add(
        "--micro-batches",
        type=int_in_range(1, MOST),
        help="per step and replica; default: from the batch sizes",
    )
    add(
        "--tflops",
        type=float_in_range(0, 1e9, above=True),
        help="sustained TFLOP/s of one GPU; default 400, with FP8 600 (assumed)",
    )
    add(
        "--bandwidth",
        type=float_in_range(0, 1e9, above=True),
        help="GB/s between stages, per GPU; default 50 (400 Gbit/s)",
    )
    add("--latency", type=float_in_range(0, 1e9), help="microseconds per message; default 20")
    add("--profile", metavar="JSON", help="measured seconds instead of FLOPs")
    add("--measure", metavar="JSON", help="only measure the layers on this machine and write a profile")
    add("--repeats", type=int_in_range(1, MOST), default=5, help="with --measure; default 5")
    add("--timeline", metavar="PNG", help="draw the simulated step, planned and uniform")
    add("--expansions", action="store_true", help="also compare positions of the expansion (LVTC)")
    add("--gpus", type=int_in_range(1, 1_000_000), help="also propose TP, PP and DP for this number of GPUs")
    add(
        "--gpus-per-node",
        type=int_in_range(1, MOST),
        default=8,
        help="limit of tensor parallelism; default 8",
    )
    return it


def main(argv: Sequence[str] | None = None) -> int:
    """Plan or measure; returns the exit code, 2 for wrong arguments."""
    it = parser()
    it.exit_on_error = False
    try:
        options, rest = it.parse_known_args(argv)
    except argparse.ArgumentError as error:
        print(f"plan_pipeline.py: {error}", file=sys.stderr)
        return 2
    sys.argv = [sys.argv[0], *rest] + ([] if options.measure else ["--dry-run"])
    platform.setup()
    from megatron_internvlx.commands import planner

    try:
        if options.measure:
            planner.measure(options)
        else:
            planner.plan(options)
    except (ValueError, OSError) as error:
        if is_first_rank():
            print(f"plan_pipeline.py: {error}", file=sys.stderr)
        return 2
    return 0
