"""Simulation of Megatron's pipeline schedules: start and end of every pass, and seconds of a step.

Source: megatron/core/pipeline_parallel/schedules.py of 0.19.2
(`forward_backward_pipelining_with_interleaving`, `..._without_interleaving`,
`get_pp_rank_microbatches`, `get_schedule_table`). Each rank follows a fixed program of forward and
backward passes, sends and receives; a message moves once both sides have reached it. Since the
programs do not depend on costs, their order is found once and then run for any number of layer
splits at a time, as numpy vectors.

Stages are numbered in the order data flows: stage = chunk * P + rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Direction = Literal["F", "B"]


@dataclass(frozen=True)
class Schedule:
    """A pipeline schedule. Raises ValueError for what Megatron would refuse."""

    pipeline: int
    """P, pipeline-parallel ranks."""
    chunks: int
    """V, model chunks per rank; 1 is the plain 1F1B schedule."""
    micro_batches: int
    """Micro-batches per step and data-parallel replica."""
    overlap: bool = True
    """Interleaved only: receives are posted ahead (Megatron's default there)."""
    group_size: int | None = None
    """Interleaved only: micro-batches that a chunk runs before the next chunk's turn. None: P."""

    def __post_init__(self) -> None:
        if min(self.pipeline, self.chunks, self.micro_batches) < 1:
            raise ValueError(
                f"{self.pipeline} ranks, {self.chunks} chunks, {self.micro_batches} micro-batches: "
                "each must be at least 1"
            )
        if self.chunks > 1 and self.pipeline == 1:
            raise ValueError("virtual pipeline stages need more than one pipeline rank")
        if self.chunks > 1 and self.micro_batches % self.pipeline:
            raise ValueError(
                f"the interleaved schedule needs whole groups of micro-batches: {self.micro_batches} is not "
                f"a multiple of the {self.pipeline} pipeline ranks"
            )

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline, P * V."""
        return self.pipeline * self.chunks

    def warmup(self, rank: int) -> int:
        """Forward passes of a rank before its first backward pass, not counting the one beside it."""
        total = self.micro_batches * self.chunks
        behind = self.pipeline - rank - 1
        if self.chunks == 1:
            return min(behind, total)
        return min(2 * behind + (self.chunks - 1) * self.group, total)

    @property
    def group(self) -> int:
        """Micro-batches that a chunk runs at a time."""
        return self.group_size or self.pipeline


class Message(NamedTuple):
    """Message of a stage: rows to the next stage (F), or their gradients to the previous one (B)."""

    direction: Direction
    sender: int
    micro_batch: int

    @property
    def receiver(self) -> int:
        """Stage that the message is sent to."""
        return self.sender + (1 if self.direction == "F" else -1)


class Pass(NamedTuple):
    """A forward or backward pass of one stage."""

    direction: Direction
    stage: int
    micro_batch: int


class Post(NamedTuple):
    """Instruction to be ready to send or receive these messages."""

    messages: tuple[Message, ...]


class Wait(NamedTuple):
    """Instruction to wait until these messages have moved."""

    messages: tuple[Message, ...]


Instruction = Pass | Post | Wait


def program(schedule: Schedule, rank: int) -> list[Instruction]:
    """Instructions of one rank in a step, in order."""
    builder = _Program(schedule, rank)
    if schedule.chunks == 1:
        builder.plain()
    else:
        builder.interleaved()
    return builder.instructions


class _Program:
    """Builder of the program of one rank."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.schedule, self.rank = schedule, rank
        self.total = schedule.micro_batches * schedule.chunks
        self.warmup = schedule.warmup(rank)
        self.instructions: list[Instruction] = []
        groups = range(0, schedule.micro_batches, schedule.group)
        self.table = [
            (chunk, micro_batch)
            for first in groups
            for chunk in range(schedule.chunks)
            for micro_batch in range(first, min(first + schedule.group, schedule.micro_batches))
        ]

    def plain(self) -> None:
        """Write the 1F1B schedule."""
        steady = self.total - self.warmup
        for k in range(self.warmup):
            self.exchange(self.input("F", k))
            self.run("F", k)
            self.exchange(self.output("F", k))
        if steady:
            self.exchange(self.input("F", self.warmup))
        for k in range(steady):
            self.run("F", k + self.warmup)
            self.exchange(self.output("F", k + self.warmup), self.input("B", k))
            self.run("B", k)
            self.exchange(
                self.output("B", k), self.input("F", k + self.warmup + 1) if k < steady - 1 else None
            )
        for k in range(steady, self.total):
            self.exchange(self.input("B", k))
            self.run("B", k)
            self.exchange(self.output("B", k))

    def interleaved(self) -> None:
        """Write the interleaved 1F1B schedule; with `overlap`, receives for the next pass are posted ahead."""
        overlap = self.schedule.overlap
        steady = self.total - self.warmup
        self.exchange(self.input("F", 0))
        for k in range(self.warmup):
            self.run("F", k)
            joint = k == self.warmup - 1 and not overlap and steady > 0
            self.exchange(self.output("F", k), self.input("F", k + 1), self.input("B", 0) if joint else None)
        if overlap and steady:
            self.post(self.input("B", 0))
        for k in range(steady):
            forward = k + self.warmup
            after = self.input("F", forward + 1) if k < steady - 1 else None
            if not overlap:
                self.run("F", forward)
                self.run("B", k)
                self.exchange(self.output("F", forward), self.output("B", k), after, self.input("B", k + 1))
                continue
            if k:
                self.wait(self.input("F", forward))
            self.run("F", forward)
            self.post(self.output("F", forward), after)
            self.wait(self.output("F", forward))  # Megatron frees the output, so it waits
            self.wait(self.input("B", k))
            self.run("B", k)
            self.post(self.output("B", k), self.input("B", k + 1))
            self.wait(self.output("B", k))
        self.cooldown(steady)

    def cooldown(self, steady: int) -> None:
        """Write the remaining backward passes; their sends and receives are not overlapped."""
        if not steady:
            self.exchange(self.input("B", 0))
        elif self.schedule.overlap:
            self.wait(self.input("B", steady))
        for k in range(steady, self.total):
            self.run("B", k)
            self.exchange(self.output("B", k), self.input("B", k + 1))

    def stage(self, direction: Direction, k: int) -> int:
        chunk = self.table[k][0]
        return (
            chunk if direction == "F" else self.schedule.chunks - 1 - chunk
        ) * self.schedule.pipeline + self.rank

    def run(self, direction: Direction, k: int) -> None:
        self.instructions.append(Pass(direction, self.stage(direction, k), self.table[k][1]))

    def output(self, direction: Direction, k: int) -> Message | None:
        message = Message(direction, self.stage(direction, k), self.table[k][1])
        return message if 0 <= message.receiver < self.schedule.stages else None

    def input(self, direction: Direction, k: int) -> Message | None:
        if k >= self.total:
            return None
        sender = self.stage(direction, k) - (1 if direction == "F" else -1)
        if not 0 <= sender < self.schedule.stages:
            return None
        return Message(direction, sender, self.table[k][1])

    def exchange(self, *messages: Message | None) -> None:
        """Write an exchange: send and receive, and wait until all messages have moved."""
        real = tuple(m for m in messages if m is not None)
        if real:
            self.instructions += [Post(real), Wait(real)]

    def post(self, *messages: Message | None) -> None:
        """Write that the rank is ready to send and receive, without waiting."""
        real = tuple(m for m in messages if m is not None)
        if real:
            self.instructions.append(Post(real))

    def wait(self, message: Message | None) -> None:
        if message is not None:
            self.instructions.append(Wait((message,)))


@lru_cache(maxsize=64)
def execution_order(schedule: Schedule) -> tuple[tuple[int, Instruction], ...]:
    """(rank, instruction) of all ranks, each after all that it depends on.

    Raises RuntimeError if the ranks wait for each other in a circle.
    """
    programs = [program(schedule, rank) for rank in range(schedule.pipeline)]
    at = [0] * schedule.pipeline
    posts: dict[Message, int] = {}
    order: list[tuple[int, Instruction]] = []
    moved = True
    while moved:
        moved = False
        for rank, instructions in enumerate(programs):
            while at[rank] < len(instructions):
                instruction = instructions[at[rank]]
                if isinstance(instruction, Wait) and any(posts.get(m, 0) < 2 for m in instruction.messages):
                    break
                if isinstance(instruction, Post):
                    for message in instruction.messages:
                        posts[message] = posts.get(message, 0) + 1
                order.append((rank, instruction))
                at[rank] += 1
                moved = True
    if any(at[rank] < len(p) for rank, p in enumerate(programs)):
        raise RuntimeError(f"{schedule} does not end: its ranks wait for each other in a circle")
    return tuple(order)


@dataclass(frozen=True)
class StageCosts:
    """Costs of N splits of the layers over S stages, in seconds per micro-batch."""

    forward: Floats
    """[N, S]"""
    backward: Floats
    """[N, S]"""
    send_forward: Floats
    """[N, S-1] to the next stage."""
    send_backward: Floats
    """[N, S-1] from stage i+1 to stage i."""


@dataclass(frozen=True)
class Event:
    """One pass in a simulated step; times in seconds from the step's start."""

    rank: int
    stage: int
    direction: Direction
    micro_batch: int
    start: float
    end: float


def makespans(schedule: Schedule, costs: StageCosts, events: list[Event] | None = None) -> Floats:
    """Simulate seconds from the first forward pass to the last backward pass: [N].

    Args:
        schedule: P, V and micro-batches.
        costs: of N splits.
        events: list to which every pass of the first split is appended, if given.
    """
    # One row per stage, so that each operation runs over contiguous splits.
    passes = {"F": costs.forward.T.copy(), "B": costs.backward.T.copy()}
    moves = {"F": costs.send_forward.T.copy(), "B": costs.send_backward.T.copy()}
    clock = [np.zeros(len(costs.forward)) for _ in range(schedule.pipeline)]
    posted: dict[Message, Floats] = {}
    for rank, instruction in execution_order(schedule):
        if isinstance(instruction, Pass):
            start, clock[rank] = clock[rank], clock[rank] + passes[instruction.direction][instruction.stage]
            if events is not None:
                times = float(start[0]), float(clock[rank][0])
                events.append(
                    Event(rank, instruction.stage, instruction.direction, instruction.micro_batch, *times)
                )
        elif isinstance(instruction, Post):
            for message in instruction.messages:
                other = posted.get(message)
                posted[message] = clock[rank] if other is None else np.maximum(other, clock[rank])
        else:
            for message in instruction.messages:
                boundary = min(message.sender, message.receiver)
                arrival = posted[message] + moves[message.direction][boundary]
                clock[rank] = np.maximum(clock[rank], arrival)
    result = clock[0]
    for other in clock[1:]:
        result = np.maximum(result, other)
    return result


@dataclass(frozen=True)
class PartialCosts:
    """Costs of N splits of which only the first R ranks are decided; stage columns are chunk * R + rank."""

    forward: Floats
    """[N, V*R]"""
    backward: Floats
    link_forward: Floats
    """[N, V*R] from a stage to the next decided one, undecided stages between included (only the
    last rank's have any); after the last chunk: from forward to backward pass, through all stages behind."""
    link_backward: Floats
    """[N, V*R] from the next decided stage back to this one; unused after the last chunk."""


def least_seconds(schedule: Schedule, ranks: int, costs: PartialCosts) -> Floats:
    """Least seconds of a step, in which undecided ranks never make a pass wait: [N].

    Messages do not hold up their senders here. Equal to `makespans` or less, whatever the other
    ranks get.
    """
    forward, backward = costs.forward.T.copy(), costs.backward.T.copy()
    link_forward, link_backward = costs.link_forward.T.copy(), costs.link_backward.T.copy()
    clock = [np.zeros(len(costs.forward)) for _ in range(ranks)]
    ends: dict[Pass, Floats] = {}
    columns = ranks * schedule.chunks
    for rank, instruction in execution_order(schedule):
        if rank >= ranks or not isinstance(instruction, Pass):
            continue
        direction, stage, micro_batch = instruction
        column = stage // schedule.pipeline * ranks + rank
        ready = clock[rank]
        if direction == "F":
            if column:
                ready = np.maximum(
                    ready, ends.pop(Pass("F", column - 1, micro_batch)) + link_forward[column - 1]
                )
            clock[rank] = ready + forward[column]
        else:
            turn = column == columns - 1
            arrived = ends.pop(Pass("F" if turn else "B", column if turn else column + 1, micro_batch))
            ready = np.maximum(ready, arrived + (link_forward if turn else link_backward)[column])
            clock[rank] = ready + backward[column]
        ends[Pass(direction, column, micro_batch)] = clock[rank]
    return np.max(clock, axis=0)


@lru_cache(maxsize=64)
def in_flight(schedule: Schedule, rank: int) -> NDArray[np.int64]:
    """Micro-batches whose activations a rank keeps, per chunk, at the K moments when it may keep most: [K, V]."""
    kept = np.zeros(schedule.chunks, np.int64)
    moments = set()
    for instruction in program(schedule, rank):
        if isinstance(instruction, Pass):
            kept[instruction.stage // schedule.pipeline] += 1 if instruction.direction == "F" else -1
            moments.add(tuple(kept))
    worst = [
        m
        for m in moments
        if not any(n != m and all(a >= b for a, b in zip(n, m, strict=True)) for n in moments)
    ]
    return np.array(sorted(worst))
