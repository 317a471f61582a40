"""`ivlx check`: nodes and their network, for missing or slow parts, before a job starts.

train.sbatch runs it with `--node` on every node before a job, and with PREFLIGHT=2 between the nodes too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_internvlx.commands.help import CommandParser
from megatron_internvlx.commands.values import float_in_range, int_in_range
from megatron_internvlx.exit_codes import DONE, FAILED, MISTAKE
from megatron_internvlx.ranks import is_launched, local_rank


def parser() -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    it = CommandParser(
        "check",
        "Check nodes and their network for missing or slow parts before a job starts.",
        about="Each line is ok, slow or missing, the host, and the check. Under torchrun the ranks also compare "
        "clocks, speeds, the network and shared files.",
        examples=(
            "ivlx check --node                                    # only this node; takes seconds",
            "torchrun --nnodes 2 --nproc-per-node 8 ... tools/check_cluster.py --shared /checkpoints",
        ),
        exits={DONE: "nothing is missing", FAILED: "something is", MISTAKE: "wrong arguments"},
    )
    add = it.add_argument_group("This node").add_argument
    add("--node", action="store_true", help="check only this node, also under torchrun")
    cards = os.environ.get("GPUS_PER_NODE", "0")
    add("--gpus", type=int_in_range(0, 65_536), default=cards, help="expected GPUs; 0 for any number")
    scratch = Path(os.environ.get("NODE_SCRATCH", "/tmp"))
    add(
        "--scratch",
        type=Path,
        metavar="DIR",
        default=scratch,
        help="directory for caches and temporary files",
    )
    add("--strict", action="store_true", help="slow counts as missing")
    add = it.add_argument_group("Between nodes, under torchrun").add_argument
    add("--shared", type=Path, metavar="DIR", help="directory shared by all nodes, such as --save")
    size = int_in_range(1, 1 << 20)
    add("--megabytes", type=size, default=256, help="MiB of the all-reduce and of the file")
    add("--min-bandwidth", type=float_in_range(0),
        help="GB/s below which all-reduce is slow (unset: 20 with GPUs, 0 without)")  # fmt: skip
    return it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; returns the exit code."""
    it = parser()
    options = it.parse_args(argv)
    single_node = options.node or not is_launched()
    if single_node and (options.shared or options.min_bandwidth):
        it.error("--shared and --min-bandwidth compare ranks: start this with torchrun and without --node")
    from megatron_internvlx.commands.node_checks import Check, node_checks  # with PyTorch

    checks: list[Check] = []
    if single_node or local_rank() == 0:
        checks += node_checks(options.gpus, options.scratch)
    if not single_node:
        from megatron_internvlx.commands.world_checks import check_between_ranks

        checks += check_between_ranks(options.shared, options.megabytes, options.min_bandwidth)
    for check in checks:
        print(check, flush=True)
    bad = ("missing", "slow") if options.strict else ("missing",)
    return FAILED if any(check.status in bad for check in checks) else DONE
