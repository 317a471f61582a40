"""Search for the split of decoder layers over pipeline stages that makes a step shortest.

The search goes rank by rank over all splits at once (numpy rows), drops those whose lower bound
reaches that of the best known split, and simulates the others. Bounds never exceed the simulated time,
so the result is optimal whenever no frontier had to be cut (`PipelinePlan.proven`).

A bound is of a split whose first R of P ranks are decided. M micro-batches; w forward and backward of one
micro-batch over the chunks of a rank, u over its first chunk; `passing` the sum of u and of the messages behind it,
there and back, over the ranks before; T the time of the best split known.

| a step takes at least | because | counted by |
|---|---|---|
| M w + passing, for each decided rank | it works M times, behind and before the ranks in front | `quick_bound` |
| more than T if (T - passing - u) (P - R) / M, | the undecided ranks work off M times what is left, | |
| of rank R - 1, is less than the work left | in what of T the way to them leaves | `quick_bound` |
| a simulation of the decided ranks | the layers of the others only delay what passes | `least_seconds` |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_internvlx.planning.costs import LayerCosts, StageMemory
from megatron_internvlx.planning.simulate import (
    Event,
    Floats,
    PartialCosts,
    Schedule,
    StageCosts,
    in_flight,
    least_seconds,
    makespans,
)

Ints = NDArray[np.int64]
FRONTIER = 300_000
_BATCH = 20_000


@dataclass(frozen=True)
class PipelinePlan:
    """A split and its simulated step."""

    schedule: Schedule
    counts: tuple[int, ...]
    """Decoder layers per stage; stage = chunk * P + rank."""
    seconds: float
    """Forward and backward passes of a step, pipeline waits included."""
    rank_seconds: tuple[float, ...]
    """Compute of each rank in a step."""
    memory: tuple[float, ...] | None
    """Bytes of each rank's device, if a memory model was given."""
    proven: bool
    """Whether no other split is faster in the simulation."""
    events: tuple[Event, ...]

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they wait."""
        return max(1 - sum(self.rank_seconds) / (self.seconds * self.schedule.pipeline), 0.0)

    @property
    def imbalance(self) -> float:
        """Compute of the busiest rank over the mean, minus 1."""
        mean = sum(self.rank_seconds) / len(self.rank_seconds)
        return max(self.rank_seconds) / mean - 1

    @property
    def layout(self) -> str:
        """Value of Megatron's --pipeline-model-parallel-layout."""
        return layout_string(self.counts)


def layout_string(counts: tuple[int, ...]) -> str:
    """Layers per stage -> `E|tt|t*5|L`, as Megatron reads it."""
    return "E" + "|".join("t" * count if count < 4 else f"t*{count}" for count in counts) + "L"


def uniform_counts(layers: int, stages: int) -> tuple[int, ...]:
    """Layers per stage as even as possible, the longer stages last (the vision encoder is with the first)."""
    short, extra = divmod(layers, stages)
    return tuple(short + (stage >= stages - extra) for stage in range(stages))


class Problem:
    """Costs, schedule and memory of a model, by which splits are evaluated."""

    def __init__(self, costs: LayerCosts, schedule: Schedule, memory: StageMemory | None = None) -> None:
        self.costs, self.schedule, self.memory = costs, schedule, memory
        self.layers = len(costs.layers)
        self.forward = np.cumsum([0.0] + [cost.forward for cost in costs.layers])
        self.backward = np.cumsum([0.0] + [cost.backward for cost in costs.layers])
        self.move_forward = np.array([cost.forward for cost in costs.boundaries], dtype=float)
        self.move_backward = np.array([cost.backward for cost in costs.boundaries], dtype=float)
        working = memory.working if memory and memory.working else (0.0,) * self.layers
        self.most_working = np.zeros((self.layers + 1, self.layers + 1))
        """[first, end] Most bytes that recomputation brings back among layers first..end-1."""
        for first in range(self.layers):
            self.most_working[first, first + 1 :] = np.maximum.accumulate(working[first:])

    def stage_costs(self, ends: Ints) -> StageCosts:
        """Costs of splits given by the end layer of each stage: ends [N, S]."""
        starts = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
        forward = self.forward[ends] - self.forward[starts]
        backward = self.backward[ends] - self.backward[starts]
        forward[:, 0] += self.costs.first.forward
        backward[:, 0] += self.costs.first.backward
        if ends.shape[1] == self.schedule.stages:
            forward[:, -1] += self.costs.last.forward
            backward[:, -1] += self.costs.last.backward
        inner = ends[:, : self.schedule.stages - 1]
        return StageCosts(forward, backward, self.move_forward[inner], self.move_backward[inner])

    def seconds(self, ends: Ints) -> Floats:
        """Simulated seconds of whole splits, infinite where memory does not suffice: [N]."""
        parts = [ends[i : i + _BATCH] for i in range(0, len(ends), _BATCH)]
        result = np.concatenate([makespans(self.schedule, self.stage_costs(part)) for part in parts])
        if self.memory is not None and np.isfinite(self.memory.limit):
            result = np.where(self.rank_memory(ends).max(axis=1) > self.memory.limit, np.inf, result)
        return result

    def rank_memory(self, ends: Ints) -> Floats:
        """Bytes of every rank's device: [N, P]."""
        assert self.memory is not None
        memory, pipeline = self.memory, self.schedule.pipeline
        starts = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
        state_sums = np.cumsum([0.0, *memory.state])
        kept_sums = np.cumsum([0.0, *memory.activations])
        state, kept = state_sums[ends] - state_sums[starts], kept_sums[ends] - kept_sums[starts]
        state[:, 0] += memory.first_state
        kept[:, 0] += memory.first_activations
        state[:, -1] += memory.last_state
        kept[:, -1] += memory.last_activations
        kept += np.where((starts < ends) & (starts < memory.carriers), memory.carried, 0.0)
        working = self.most_working[starts, ends]
        working[:, 0] = np.maximum(working[:, 0], memory.first_working)
        ranks = []
        for rank in range(pipeline):
            moments = kept[:, rank::pipeline] @ in_flight(self.schedule, rank).T
            once = state[:, rank::pipeline].sum(axis=1) + working[:, rank::pipeline].max(axis=1)
            ranks.append(once + moments.max(axis=1))
        return np.stack(ranks, axis=1)

    def partial_costs(self, ends: Ints, ranks: int) -> PartialCosts:
        """Costs of the first `ranks` ranks; of the others' ends only those of the last rank count."""
        pipeline, chunks = self.schedule.pipeline, self.schedule.chunks
        decided = [chunk * pipeline + rank for chunk in range(chunks) for rank in range(ranks)]
        before = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
        starts, stops = before[:, decided], ends[:, decided]
        forward, backward = (
            self.forward[stops] - self.forward[starts],
            self.backward[stops] - self.backward[starts],
        )
        forward[:, 0] += self.costs.first.forward
        backward[:, 0] += self.costs.first.backward
        link_forward, link_backward = self.move_forward[stops], self.move_backward[stops]
        hops = pipeline - ranks  # boundaries behind the first one, whose content is not known
        for chunk in range(chunks):
            column, limit = chunk * ranks + ranks - 1, ends[:, chunk * pipeline + pipeline - 1]
            skipped = self.forward[limit] - self.forward[stops[:, column]] + hops * self.move_forward.min()
            returned = (
                self.backward[limit] - self.backward[stops[:, column]] + hops * self.move_backward.min()
            )
            link_forward[:, column] += skipped
            link_backward[:, column] += returned
        if hops:
            link_forward[:, -1] += link_backward[:, -1] + self.costs.last.forward + self.costs.last.backward
            least = self.move_forward.min() + self.move_backward.min()
            link_forward[:, -1] -= least  # the chunk's last boundary does not exist
        else:
            link_forward[:, -1] = 0
            forward[:, -1] += self.costs.last.forward
            backward[:, -1] += self.costs.last.backward
        return PartialCosts(forward, backward, link_forward, link_backward)

    def quick_bound(self, costs: PartialCosts, ranks: int, limit: float) -> Floats:
        """Least seconds of a step, without simulation: [N]; infinite if `limit` cannot be met.

        Each rank works M times its load, after the first micro-batch reached it through the ranks
        before and before the last one's gradients return through them. And the work that the decided
        ranks leave must fit into the time that `limit` leaves to the others.
        """
        batches, left_ranks = self.schedule.micro_batches, self.schedule.pipeline - ranks
        work = (costs.forward + costs.backward).reshape(len(costs.forward), -1, ranks)
        loads = work.sum(axis=1)
        hops = (costs.link_forward + costs.link_backward)[:, : ranks - 1]
        passing = np.zeros_like(loads)
        np.cumsum(work[:, 0, :-1] + hops, axis=1, out=passing[:, 1:])
        bound = (batches * loads + passing).max(axis=1)
        if not np.isfinite(limit):
            return bound
        room = (limit - passing[:, -1] - work[:, 0, -1]) / batches * left_ranks
        left = self.costs.total - loads.sum(axis=1)
        return np.where(left > room * (1 + 1e-9) + 1e-12 * self.costs.total, np.inf, bound)

    def plan(self, ends: Ints, proven: bool) -> PipelinePlan:
        """Plan of one split, given by the end layer of each stage: ends [S]."""
        events: list[Event] = []
        costs = self.stage_costs(ends[None])
        seconds = float(makespans(self.schedule, costs, events)[0])
        work = self.schedule.micro_batches * (costs.forward + costs.backward)[0]
        ranks = self.schedule.pipeline
        return PipelinePlan(
            self.schedule,
            tuple(int(n) for n in np.diff(ends, prepend=0)),
            seconds,
            tuple(float(work[rank::ranks].sum()) for rank in range(ranks)),
            tuple(float(x) for x in self.rank_memory(ends[None])[0]) if self.memory else None,
            proven,
            tuple(events),
        )


def evaluate(
    costs: LayerCosts, schedule: Schedule, counts: tuple[int, ...], memory: StageMemory | None = None
) -> PipelinePlan:
    """Plan of a given split. Raises ValueError if it does not fit the model or the schedule."""
    problem = Problem(costs, schedule, memory)
    if len(counts) != schedule.stages or sum(counts) != problem.layers or min(counts) < 0:
        raise ValueError(
            f"a split of {sum(counts)} layers over {len(counts)} stages, but the model has {problem.layers} "
            f"layers and the schedule {schedule.stages} stages: give each stage 0 or more of the model's layers"
        )
    return problem.plan(np.cumsum(counts), proven=False)


def find_plan(
    costs: LayerCosts, schedule: Schedule, memory: StageMemory | None = None, *, frontier: int = FRONTIER
) -> PipelinePlan:
    """Find the fastest split; stages may be empty.

    Args:
        costs: per layer, of one micro-batch.
        schedule: P, V and micro-batches.
        memory: if given with a limit, splits that need more are left out.
        frontier: partial splits kept at once; where more would be needed the result is not proven.

    Raises:
        ValueError: no split fits the memory.
    """
    problem = Problem(costs, schedule, memory)
    best, seconds = _improve(problem, _starts(problem))
    candidates, proven = _enumerate(problem, seconds, frontier)
    if len(candidates):
        times = problem.seconds(candidates)
        winner = int(times.argmin())
        if times[winner] < seconds:
            best, seconds = candidates[winner], float(times[winner])
            if not proven:
                best, seconds = _improve(problem, best[None])
    if not np.isfinite(seconds):
        assert memory is not None
        least = problem.rank_memory(best[None]).max() / 2**30
        raise ValueError(
            f"no split found that fits {memory.limit / 2**30:.1f} GiB per device (one needs {least:.1f} "
            "GiB): use more tensor or pipeline parallelism, recomputation or smaller packs"
        )
    return problem.plan(best, proven)


def _starts(problem: Problem) -> Ints:
    """Splits to start from: even layers, and even work."""
    stages, layers = problem.schedule.stages, problem.layers
    even = np.cumsum(uniform_counts(layers, stages))
    work = problem.forward + problem.backward
    ahead = problem.costs.first.forward + problem.costs.first.backward
    targets = np.linspace(0, problem.costs.total, stages + 1)[1:-1] - ahead
    balanced = np.append(np.abs(work[:, None] - targets).argmin(axis=0), layers).astype(np.int64)
    return np.stack([even, balanced])


def _improve(problem: Problem, ends: Ints) -> tuple[Ints, float]:
    """Move single boundaries, and ranges of them, by one or two layers as long as that helps."""
    times = problem.seconds(ends)
    best, seconds = ends[times.argmin()], float(times.min())
    stages = problem.schedule.stages
    moves = np.zeros((0, stages), np.int64)
    for first in range(stages - 1):
        for end in range(first + 1, stages):
            move = np.zeros((1, stages), np.int64)
            move[0, first:end] = 1
            moves = np.concatenate([moves, move, -move, 2 * move, -2 * move])
    while len(moves):
        tried = best + moves
        valid = (
            (tried[:, 0] >= 0) & (tried[:, -2] <= problem.layers) & (np.diff(tried, axis=1) >= 0).all(axis=1)
        )
        if not valid.any():
            break
        times = problem.seconds(tried[valid])
        if not times.min() < seconds * (1 - 1e-12):
            break
        best, seconds = tried[valid][times.argmin()], float(times.min())
    return best, seconds


def _enumerate(problem: Problem, limit: float, frontier: int) -> tuple[Ints, bool]:
    """Enumerate the splits that may take less than `limit` [N, S], and report whether none was left out.

    The ends of the chunks are fixed first, then rank after rank gets its layers of all chunks.
    """
    schedule, layers = problem.schedule, problem.layers
    pipeline, proven = schedule.pipeline, True
    states = np.zeros((1, schedule.stages), np.int64)
    states[:, -1] = layers
    for chunk in range(schedule.chunks - 1):
        lowest = states[:, chunk * pipeline - 1] if chunk else np.zeros(len(states), np.int64)
        states = _choices(states, chunk * pipeline + pipeline - 1, lowest, np.full(len(states), layers))
    for rank in range(pipeline):
        if rank < pipeline - 1:
            for chunk in range(schedule.chunks):
                stage = chunk * pipeline + rank
                lowest = states[:, stage - 1] if stage else np.zeros(len(states), np.int64)
                states = _choices(states, stage, lowest, states[:, chunk * pipeline + pipeline - 1])
                if len(states) > 20 * frontier:
                    proven, states = False, states[:: -(-len(states) // (20 * frontier))]
        kept = [
            _promising(problem, states[i : i + _BATCH], rank + 1, limit)
            for i in range(0, len(states), _BATCH)
        ]
        states = np.concatenate([part for part, _ in kept])
        if len(states) > frontier:
            bounds = np.concatenate([bound for _, bound in kept])
            proven, states = False, states[np.argpartition(bounds, frontier)[:frontier]]
        if not len(states):
            break
    return states, proven


def _choices(states: Ints, stage: int, lowest: Ints, highest: Ints) -> Ints:
    """States repeated for each end of `stage` from lowest to highest."""
    repeats = highest + 1 - lowest
    offsets = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    chosen = np.repeat(states, repeats, axis=0)
    chosen[:, stage] = np.repeat(lowest, repeats) + offsets
    return chosen


def _promising(problem: Problem, states: Ints, ranks: int, limit: float) -> tuple[Ints, Floats]:
    """States whose lower bounds stay under the limit, and these bounds."""
    limit *= 1 - 1e-12
    costs = problem.partial_costs(states, ranks)
    keep = problem.quick_bound(costs, ranks, limit) < limit
    states = states[keep]
    bounds = least_seconds(problem.schedule, ranks, problem.partial_costs(states, ranks))
    keep = bounds < limit
    return states[keep], bounds[keep]
