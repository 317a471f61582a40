"""Validation: every held-out record once per evaluation, on any number of ranks.

Megatron counts an evaluation in iterations of global batches. How many are needed follows from the records here,
so that none is left out or seen twice; places of the last batch without a record hold a filler that weighs
nothing (`data/order.py`).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_internvlx import platform
from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.data.rejects import UnusableData
from megatron_internvlx.ranks import is_first_rank


@dataclass
class ValidationCounts:
    """What one evaluation saw of the held-out records, on one loading rank."""

    records: int = 0
    """Evaluated."""
    rejects: dict[str, int] = field(default_factory=dict)
    """Unusable ones, per cause."""
    cut_tiles: int = 0
    cut_tokens: int = 0
    """Given up by records over the sequence length or a budget."""


def settle_validation(args: argparse.Namespace) -> Manifest | None:
    """Set how many batches one evaluation takes, and where its answers go. Raises ValueError if it cannot be done.

    Sets Megatron's `eval_iters` and `eval_global_batch_size` so that one evaluation holds all records of
    --valid-data, or --valid-records of them, and no more places than needed. Returns the held-out data; None without
    --valid-data, where there is no validation.
    """
    first_rank = is_first_rank()
    # Megatron's flag of this name asks its own loaders for their length; here it is what always happens.
    args.full_validation = False
    if not args.valid_data:
        if first_rank:
            print("no --valid-data: this run is not validated", flush=True)
        args.eval_iters = 0
        return None
    manifest = Manifest(args.valid_data, each_once=True)
    records = min(len(manifest), args.valid_records or len(manifest))
    passes, args.eval_global_batch_size = evaluation_batches(
        records,
        batch=args.eval_global_batch_size,
        replicas=args.eval_micro_batch_size * args.data_parallel_size,
        # The interleaved schedule takes micro-batches in groups.
        group=(args.microbatch_group_size_per_vp_stage or args.pipeline_model_parallel_size)
        if args.virtual_pipeline_model_parallel_size
        else 1,
    )
    args.eval_iters = passes
    if first_rank:
        print(
            f"validation: {records} held-out records, each once every {args.eval_interval} steps", flush=True
        )
    if args.save and "://" not in args.save:
        args.predictions_file = args.predictions_file or str(Path(args.save) / "predictions.jsonl")
        args.report_file = args.report_file or str(Path(args.save) / "report.png")
    return manifest


def check_equal_on_all_ranks(args: argparse.Namespace, records: int) -> None:
    """Raises UnusableData if ranks found different held-out data: evaluations would wait for each other forever.

    Each rank has counted the records itself; a file that is written while a run starts, or one that differs
    between nodes, gives them different numbers. Called on every rank.
    """
    mine = torch.tensor(
        [records, args.eval_iters, args.eval_global_batch_size], dtype=torch.int64, device=platform.device()
    )
    most = torch.stack([mine, -mine])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    high, low = most[0].tolist(), (-most[1]).tolist()
    if high != low:
        raise UnusableData(
            f"--valid-data {args.valid_data} has {low[0]} records on one rank and {high[0]} on another: was it written "
            "to while the run started, or does it differ between nodes? Start again once it is the same everywhere"
        )


def evaluation_batches(records: int, *, batch: int, replicas: int, group: int) -> tuple[int, int]:
    """(batches, size of each) that hold `records` with few places left over.

    Args:
        records: held-out records.
        batch: most records of a batch that the user wants, a multiple of `replicas`.
        replicas: records that all data-parallel ranks take at a time.
        group: a batch has a multiple of this many micro-batches per rank.
    """
    needed = -(-records // replicas)
    micro_batches = max(min(batch // replicas, needed), 1)
    micro_batches = -(-micro_batches // group) * group
    return -(-needed // micro_batches), micro_batches * replicas
