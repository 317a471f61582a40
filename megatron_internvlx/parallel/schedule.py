"""Model chunk of each message of a pipeline rank.

Megatron's interleaved schedule posts sends and receives without naming the model chunk. Their order is
fixed by the schedule table, so it can be counted: every rank forwards the table's entries one after
another, and the wrap-around messages (last rank to first, one chunk further) come in the order in which
the last rank produces them. Without virtual stages there is one chunk.

Source: `recv_tensor_from_previous_stage` and the sends of
`forward_backward_pipelining_with_interleaving` in megatron/core/pipeline_parallel/schedules.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron.core.pipeline_parallel.schedules import get_schedule_table


@dataclass(frozen=True)
class MessageOrder:
    """Chunk of this rank for each message, in one run of the schedule.

    The list is empty for a direction without messages: the first virtual stage receives none forward, the last none
    backward.
    """

    receive_forward: list[int]
    """Chunk whose input arrives."""
    send_forward: list[int]
    """Chunk whose output leaves."""
    receive_backward: list[int]
    """Chunk whose output's gradient arrives."""


def message_order(
    pp_rank: int, pp_size: int, chunks: int, micro_batches: int, group_size: int
) -> MessageOrder:
    """Order of messages of one rank.

    Args:
        pp_rank: place in the pipeline.
        pp_size: stages of the pipeline.
        chunks: model chunks per rank; 1 is the schedule without interleaving.
        micro_batches: micro-batches of the run.
        group_size: Megatron's `microbatch_group_size_per_vp_stage`.
    """
    table = [chunk for _, chunk in get_schedule_table(micro_batches, chunks, group_size)]
    back = [chunks - 1 - chunk for chunk in table]
    first, last, end = pp_rank == 0, pp_rank == pp_size - 1, chunks - 1
    # A message to the first rank is an output of the last rank: it enters the next chunk there, and
    # outputs of the last chunk are losses. Backwards the same, mirrored.
    return MessageOrder(
        receive_forward=[c + 1 for c in table if c < end] if first else table,
        send_forward=[c for c in table if c < end] if last else table,
        receive_backward=[c - 1 for c in back if c > 0] if last else back,
    )


def repeat_runs(order: Callable[[], list[int]]) -> Iterator[int]:
    """Yield the chunks of one run after another; `order` is called at the beginning of each run."""
    while True:
        run = order()
        assert run, "a message in a direction in which this rank has none"
        yield from run
