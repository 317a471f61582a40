"""Validation: every held-out record once per evaluation, on any number of ranks.

Megatron counts an evaluation in iterations of global batches. Their number is computed here from the number of
records, so that none is left out or seen twice; places of the last batch without a record have a filler of weight 0
(`data/order.py`).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_internvlx import platform
from megatron_internvlx.config import DataSettings, settings_from
from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.data.rejects import UnusableData
from megatron_internvlx.megatron_settings import Batches, CheckpointFiles, Parallelism
from megatron_internvlx.ranks import is_first_rank


@dataclass
class ValidationCounts:
    """Numbers of held-out records in one evaluation, on one loading rank."""

    records: int = 0
    """Evaluated records."""
    rejects: dict[str, int] = field(default_factory=dict)
    """Unusable records, per cause."""
    cut_tiles: int = 0
    """Tiles removed from records that exceeded the sequence length or a budget."""
    cut_tokens: int = 0
    """Tokens removed from records that exceeded the sequence length or a budget."""


def settle_validation(args: argparse.Namespace) -> Manifest | None:
    """Set Megatron's evaluation sizes from the number of held-out records, and name the files of the answers.

    One evaluation then covers all records of --valid-data, or --valid-records of them, in as few batches as possible.

    Args:
        args: validated arguments; `eval_iters`, `eval_global_batch_size`, `full_validation`, `predictions_file` and
            `report_file` are changed.

    Returns:
        The held-out data; None without --valid-data, which means no validation.

    Raises:
        ValueError: the held-out data cannot be read.
    """
    data, batches = settings_from(args, DataSettings), settings_from(args, Batches)
    # Megatron's flag asks its own loaders for their length; ours always evaluate all records.
    args.full_validation = False
    if not data.valid_data:
        _print_on_first_rank("no --valid-data: this run is not validated")
        args.eval_iters = 0
        return None
    manifest = Manifest(data.valid_data, each_once=True)
    records = min(len(manifest), data.valid_records or len(manifest))
    parallel = settings_from(args, Parallelism)
    args.eval_iters, args.eval_global_batch_size = evaluation_batches(
        records,
        batch=batches.eval_global_batch_size,
        replicas=batches.eval_micro_batch_size * parallel.data_parallel_size,
        group=_micro_batch_group(parallel),
    )
    _print_on_first_rank(
        f"validation: {records} held-out records, each once every {batches.eval_interval} steps"
    )
    save = settings_from(args, CheckpointFiles).save_folder
    if save is not None:
        args.predictions_file = data.predictions_file or str(save / "predictions.jsonl")
        args.report_file = data.report_file or str(save / "report.png")
    return manifest


def _micro_batch_group(parallel: Parallelism) -> int:
    """Number of which the micro-batches of a batch must be a multiple: the interleaved schedule needs groups."""
    if not parallel.virtual_pipeline_model_parallel_size:
        return 1
    return parallel.microbatch_group_size_per_vp_stage or parallel.pipeline_model_parallel_size


def _print_on_first_rank(text: str) -> None:
    if is_first_rank():
        print(text, flush=True)


def check_equal_on_all_ranks(valid_data: str | None, records: int, batches: Batches) -> None:
    """Check that all ranks found the same held-out data; otherwise evaluations would wait for each other forever.

    Each rank has counted the records itself. The numbers differ if a file is written while a run starts, or differs
    between nodes. Every rank must call it.

    Args:
        valid_data: value of --valid-data, for the message.
        records: number of records found by this rank.
        batches: sizes that `settle_validation` has set on this rank.

    Raises:
        UnusableData: the numbers differ.
    """
    mine = torch.tensor(
        [records, batches.eval_iters, batches.eval_global_batch_size],
        dtype=torch.int64,
        device=platform.device(),
    )
    most = torch.stack([mine, -mine])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    high, low = most[0].tolist(), (-most[1]).tolist()
    if high != low:
        raise UnusableData(
            f"--valid-data {valid_data} has {low[0]} records on one rank and {high[0]} on another: was it written "
            "to while the run started, or does it differ between nodes? Start again once it is the same everywhere"
        )


def evaluation_batches(records: int, *, batch: int, replicas: int, group: int) -> tuple[int, int]:
    """Number of batches and the size of each, so that they cover `records` with few places left over.

    Args:
        records: number of held-out records.
        batch: maximum number of records of a batch that the user asked for, a multiple of `replicas`.
        replicas: number of records that all data-parallel ranks take at a time.
        group: number of which the micro-batches of a batch per rank must be a multiple.
    """
    needed = -(-records // replicas)
    micro_batches = max(min(batch // replicas, needed), 1)
    micro_batches = -(-micro_batches // group) * group
    return -(-needed // micro_batches), micro_batches * replicas
