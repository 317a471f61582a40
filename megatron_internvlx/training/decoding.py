"""Decoding of images on the ranks of the first stage: their pipelines, the decoders that these lack, and counts."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed as dist

from megatron_internvlx import platform
from megatron_internvlx.data.dali_pipeline import MOST_THREADS, TilePipeline
from megatron_internvlx.data.file_kinds import Kind
from megatron_internvlx.data.rejects import UnusableData
from megatron_internvlx.ranks import is_first_rank, ranks_per_node


@dataclass(frozen=True)
class Decoding:
    """Numbers of images of one rank, by the way they were decoded; held-out ones included but in `cut`."""

    cut: int
    """Training images that the rank's pipeline cut into tiles in this log interval."""
    blank: int
    """Images so far that were unreadable after their micro-batch was planned, and are blank tiles."""
    fallbacks: list[int]
    """Images so far that Pillow cut, in the order of `fallback_counts`."""
    ready: int | None
    """Packs that are ready for this rank; None if it does not load them."""


def tile_pipeline(tile_size: int) -> TilePipeline:
    """Create the cutter of this rank's images, with half of its share of the node's cores."""
    cores = len(os.sched_getaffinity(0)) // max(ranks_per_node(), 1)
    return TilePipeline(platform.device().index, tile_size, threads=min(max(cores // 2, 1), MOST_THREADS))


def missing_decoders(pipeline: TilePipeline, group: dist.ProcessGroup | None) -> frozenset[Kind]:
    """Kinds of files that DALI does not decode on some rank of a first stage, so that none of them gets such files.

    Every rank of `group` must call it, before its loader processes start. Raises UnusableData on all of them if DALI
    does not work on one.
    """
    mine: frozenset[Kind] | str  # or what is wrong
    try:
        mine = pipeline.missing_decoders()
    except RuntimeError as error:
        mine = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    every = [mine]
    if group is not None:
        every = [mine] * dist.get_world_size(group)
        dist.all_gather_object(every, mine, group=group)
    for found in every:
        if isinstance(found, str):
            raise UnusableData(
                f"DALI cannot cut images on a rank of the first stage: {found}. See tools/check_cluster.py --node, or "
                "decode in the loader processes with --decode-at loader"
            )
    missing = frozenset(kind for found in every if not isinstance(found, str) for kind in found)
    if missing and is_first_rank():
        names = ", ".join(" ".join(kind) for kind in sorted(missing))
        print(f"DALI lacks decoders here, so Pillow cuts in the loader processes: {names}", flush=True)
    return missing
