"""Validation: every held-out record once per evaluation, on any number of ranks.

Megatron counts an evaluation in iterations of global batches. How many are needed follows from the records here,
so that none is left out or seen twice; places of the last batch without a record hold a filler that weighs
nothing (`data/order.py`).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from megatron_internvlx.data.manifest import Manifest
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


def settle_validation(args: argparse.Namespace) -> None:
    """Set how many batches one evaluation takes, and where its answers go. Raises ValueError if it cannot be done.

    Sets Megatron's `eval_iters` and `eval_global_batch_size` so that one evaluation holds all records of
    --valid-data, or the first --valid-records, and no more places than needed. Without --valid-data there is no
    validation.
    """
    first_rank = is_first_rank()
    # Megatron's flag of this name asks its own loaders for their length; here it is what always happens.
    args.full_validation = False
    if not args.valid_data:
        if first_rank:
            print("no --valid-data: this run is not validated", flush=True)
        args.eval_iters = 0
        return
    records = held_out_records(args)
    passes, args.eval_global_batch_size = evaluation_batches(
        records,
        batch=args.eval_global_batch_size,
        replicas=args.eval_micro_batch_size * args.data_parallel_size,
        # The interleaved schedule takes micro-batches in groups of one per stage.
        group=args.pipeline_model_parallel_size if args.virtual_pipeline_model_parallel_size else 1,
    )
    args.eval_iters = passes
    if first_rank:
        print(
            f"validation: {records} held-out records, each once every {args.eval_interval} steps", flush=True
        )
    if args.save and "://" not in args.save:
        args.predictions_file = args.predictions_file or str(Path(args.save) / "predictions.jsonl")
        args.report_file = args.report_file or str(Path(args.save) / "report.png")


def held_out_records(args: argparse.Namespace, manifest: Manifest | None = None) -> int:
    """Records that an evaluation sees: all of --valid-data, or the first --valid-records of them."""
    manifest = manifest or held_out(args.valid_data)
    return min(len(manifest), args.valid_records or len(manifest))


def held_out(meta: str) -> Manifest:
    """The held-out sets of a meta.json, each record once whatever its `repeat_time`. Raises ValueError."""
    return Manifest(meta, each_once=True)


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
