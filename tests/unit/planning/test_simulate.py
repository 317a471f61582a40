"""The simulated programs against Megatron's own schedules, which run here with recorded passes."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_internvlx import platform

platform.setup()

import megatron.core.pipeline_parallel.schedules as schedules  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

from megatron_internvlx.planning.simulate import (  # noqa: E402
    Event,
    Message,
    Pass,
    Post,
    Schedule,
    StageCosts,
    in_flight,
    makespans,
    program,
)


class Group:
    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


class Config(SimpleNamespace):
    """What the schedules read of a TransformerConfig; everything not named is off."""

    def __getattr__(self, _name: str) -> None:
        return None


class Communicator:
    """Stands in for Megatron's; every message is at hand."""

    def __init__(self, size: int, rank: int, chunks: int | None) -> None:
        self.pp_group = Group(size, rank)
        self.virtual_pipeline_model_parallel_size = chunks
        self.total_stages, self.current_stage = size, rank
        self.is_pp_first_stage, self.is_pp_last_stage = rank == 0, rank == size - 1
        self.config = None

    def __getattr__(self, name: str):
        handle = SimpleNamespace(wait=lambda: None)

        def call(*_args, recv_prev=False, recv_next=False, overlap_p2p_comm=False, **_kwargs):
            got = torch.zeros(1, requires_grad=True)
            if name == "send_forward_backward_recv_forward_backward":
                return got, got
            if not overlap_p2p_comm:
                return got
            return got, {
                key: handle for key, on in (("recv_prev", recv_prev), ("recv_next", recv_next)) if on
            }

        return call


def megatrons_passes(schedule: Schedule, rank: int) -> list[Pass]:
    """What Megatron runs on a rank, in order."""
    seen: list[Pass] = []
    chunks = schedule.chunks if schedule.chunks > 1 else None
    counts = {"F": [0] * schedule.chunks, "B": [0] * schedule.chunks}

    def record(direction: str, chunk: int) -> None:
        seen.append(Pass(direction, chunk * schedule.pipeline + rank, counts[direction][chunk]))
        counts[direction][chunk] += 1

    class Chunk(torch.nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number, self.config, self.model_type = number, config, None

    def forward_step(_step, _data, model, *_args, vp_stage=None, **_kwargs):
        record("F", model.number)
        output = torch.zeros(1, requires_grad=True)
        output.chunk = model.number
        return output, torch.tensor(0)

    def backward_step(_input, output, *_args, **_kwargs):
        record("B", output.chunk)
        return torch.zeros(1)

    config = Config(
        overlap_p2p_comm=schedule.overlap and bool(chunks),
        batch_p2p_comm=not (schedule.overlap and chunks),
        hidden_size=1,
        microbatch_group_size_per_vp_stage=schedule.pipeline,
        virtual_pipeline_model_parallel_size=chunks,
        pipeline_model_parallel_size=schedule.pipeline,
        calculate_per_token_loss=True,
        variable_seq_lengths=True,
        pipeline_dtype=torch.float32,
        cuda_graph_impl="none",
    )
    models = [Chunk(number) for number in range(schedule.chunks)]
    groups = ProcessGroupCollection()
    groups.tp = groups.cp = Group(1, 0)
    groups.pp = Group(schedule.pipeline, rank)
    groups.embd = groups.pos_embd = groups.dp_cp = groups.dp = groups.tp_dp_cp = None
    run = (
        schedules.forward_backward_pipelining_with_interleaving
        if chunks
        else schedules.forward_backward_pipelining_without_interleaving
    )
    with (
        mock.patch.object(schedules, "forward_step", forward_step),
        mock.patch.object(schedules, "backward_step", backward_step),
    ):
        run(
            forward_step_func=None,
            data_iterator=[None] * schedule.chunks if chunks else None,
            model=models if chunks else models[0],
            num_microbatches=schedule.micro_batches,
            seq_length=1,
            micro_batch_size=1,
            p2p_communicator=Communicator(schedule.pipeline, rank, chunks),
            pg_collection=groups,
        )
    return seen


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "pipeline,chunks,batches", [(2, 1, 4), (4, 1, 3), (4, 1, 9), (2, 2, 2), (2, 2, 6), (4, 2, 8), (3, 3, 6)]
)
def test_order_of_passes_is_megatrons(pipeline: int, chunks: int, batches: int, overlap: bool) -> None:
    schedule = Schedule(pipeline, chunks, batches, overlap)
    for rank in range(pipeline):
        ours = [x for x in program(schedule, rank) if isinstance(x, Pass)]
        assert ours == megatrons_passes(schedule, rank)


def even(stages: int, chunks: int, forward: float = 1.0, backward: float = 2.0) -> StageCosts:
    zeros = np.zeros((1, stages - 1))
    return StageCosts(
        np.full((1, stages), forward / chunks), np.full((1, stages), backward / chunks), zeros, zeros
    )


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "pipeline,chunks,batches", [(1, 1, 4), (4, 1, 8), (8, 1, 8), (4, 2, 8), (8, 2, 16), (2, 4, 4)]
)
def test_even_stages_take_the_textbook_time(pipeline: int, chunks: int, batches: int, overlap: bool) -> None:
    """Source: Narayanan et al. 2021, bubble (P - 1) (f + b) / V."""
    schedule = Schedule(pipeline, chunks, batches, overlap)
    seconds = makespans(schedule, even(pipeline * chunks, chunks))[0]
    assert seconds == pytest.approx(3 * (batches + (pipeline - 1) / chunks))


def test_by_hand() -> None:
    """Two ranks, one slow boundary: drawn on paper."""
    costs = StageCosts(*(np.array([x]) for x in ([2.0, 1.0], [3.0, 2.0], [0.5], [0.25])))
    events: list[Event] = []
    assert makespans(Schedule(2, 1, 2), costs, events)[0] == 12.25
    starts = {(e.direction, e.stage, e.micro_batch): e.start for e in events}
    # An output is handed over before the next pass starts; rows and gradients cross in one exchange.
    assert [starts["F", 0, b] for b in (0, 1)] == [0, 2.5]
    assert [starts["F", 1, b] for b in (0, 1)] == [2.5, 6]
    assert [starts["B", 1, b] for b in (0, 1)] == [3.5, 7]
    assert [starts["B", 0, b] for b in (0, 1)] == [6, 9.25]


@pytest.mark.parametrize("schedule", [Schedule(3, 1, 5), Schedule(4, 2, 8), Schedule(4, 2, 8, overlap=False)])
def test_every_message_is_sent_and_received_once(schedule: Schedule) -> None:
    posts = [
        message
        for rank in range(schedule.pipeline)
        for x in program(schedule, rank)
        if isinstance(x, Post)
        for message in x.messages
    ]
    batches = range(schedule.micro_batches)
    wanted = {Message("F", s, b) for s in range(schedule.stages - 1) for b in batches}
    wanted |= {Message("B", s, b) for s in range(1, schedule.stages) for b in batches}
    assert set(posts) == wanted and len(posts) == 2 * len(wanted)


def test_micro_batches_in_flight() -> None:
    assert [in_flight(Schedule(4, 1, 8), rank).tolist() for rank in (0, 3)] == [[[4]], [[1]]]
    assert in_flight(Schedule(4, 1, 2), 0).tolist() == [[2]]
    assert in_flight(Schedule(4, 2, 8), 0).sum(axis=1).max() == 4 + 2 * 3 + 1


def test_impossible_schedules() -> None:
    with pytest.raises(ValueError, match="6 is not a multiple of the 4 pipeline ranks"):
        Schedule(4, 2, 6)
    with pytest.raises(ValueError, match="more than one pipeline rank"):
        Schedule(1, 2, 4)
    with pytest.raises(ValueError, match="at least 1"):
        Schedule(0, 1, 4)
