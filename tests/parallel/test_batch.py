"""Plans of every length reach every rank, whatever the longest before them was."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_internvlx.data.plan import IGNORE, PlanSettings, SequencePlan, build_plan, pack_plan
from megatron_internvlx.parallel.batch import BatchChannel, HostBatch
from tests.distributed import Pool

TILE, WORLD_TILES = 2, 2
SETTINGS = PlanSettings(low_grid=1, high_grid=2, tile_multiple=WORLD_TILES)


def plan_of(rows: int, supervised: int) -> SequencePlan:
    """One sample: so many rows of text and of them supervised, one tile at its end."""
    visual = np.arange(rows + 4) >= rows
    ids = np.where(visual, 0, 1 + np.arange(rows + 4) % 1000)
    labels = np.where((np.arange(rows + 4) >= rows - supervised) & ~visual, ids, IGNORE)
    return build_plan([ids], [labels], [visual], SETTINGS)


def plan_with(size: int) -> SequencePlan:
    """A plan of exactly so many packed integers: a row takes five of them, a supervised one four more."""
    spare = size - len(pack_plan(plan_of(8, 0)))
    supervised = next(n for n in range(5) if (spare - 4 * n) % 5 == 0)
    plan = plan_of(8 + (spare - 4 * supervised) // 5, supervised)
    assert len(pack_plan(plan)) == size
    return plan


def lengths() -> list[int]:
    """Around the first capacity, around the one it grows to, far above, and short again."""
    first = BatchChannel.START_CAPACITY
    grown = 2 * (first + 1)
    return [first - 2, first - 1, first, grown - 1, 100, grown, 5 * grown, grown, 100]


# The first integer of a message is the length.
BROADCASTS = [1, 1, 2, 1, 1, 2, 2, 1, 1]


def receive_all(stages: list[list[int]], sizes: list[int]) -> list[tuple[bytes, list[float], int]]:
    """What this rank has of each plan: its packed bytes, the values of its tiles, messages of its stage."""
    everyone = dist.new_group(backend="gloo")
    own = None
    for stage in stages:
        group = dist.new_group(stage, backend="gloo")
        if dist.get_rank() in stage and len(stage) > 1:
            own = group
    channel = BatchChannel(stages, everyone, own, TILE)

    def loader() -> Iterator[HostBatch]:
        for number, size in enumerate(sizes):
            plan = plan_with(size)
            yield HostBatch(plan, torch.full((plan.num_tiles, 3, TILE, TILE), 1 + number, dtype=torch.uint8))

    loaded, got = loader() if channel.is_source else None, []
    for _ in sizes:
        before = channel.broadcasts
        batch = channel.receive(loaded)
        tiles = [] if batch.tiles is None else batch.tiles.float().mean((1, 2, 3)).tolist()
        got.append((pack_plan(batch.plan.host).tobytes(), tiles, channel.broadcasts - before))
    for work, _ in channel._sending:
        work.wait()
    return got


class CutNothing:
    """A pipeline that cuts nothing: it makes the channel send plans ahead."""

    def start(self, wanted) -> int:
        return 0

    def collect(self, out: torch.Tensor, number: int) -> None:
        pass


def train_and_validate(stages: list[list[int]], tags: tuple[int, int] = (0, 1)) -> list[int]:
    """Supervised rows of the plans that this rank received: two of training, one held out, one of training."""
    everyone = dist.new_group(backend="gloo")
    first = dist.get_rank() in stages[0]
    pipeline = CutNothing() if first else None
    train = BatchChannel(stages, everyone, None, TILE, pipeline=pipeline, tag=tags[0])  # type: ignore[arg-type]
    valid = BatchChannel(stages, everyone, None, TILE, tag=tags[1])

    def loader(numbers: list[int], files: bool) -> Iterator[HostBatch]:
        for supervised in numbers:
            plan = plan_of(20, supervised)
            tiles = torch.zeros(plan.num_tiles, 3, TILE, TILE, dtype=torch.uint8)
            yield HostBatch(plan, None, [tiles]) if files else HostBatch(plan, tiles)

    training, held_out = loader([1, 2, 3, 4], True), loader([9], False)
    got = []
    for channel, source in ((train, training), (train, training), (valid, held_out), (train, training)):
        batch = channel.receive(source if channel.is_source else None)
        got.append(len(batch.plan.host.loss_rows))
    if not first:
        train._next_plan(None)  # the fourth has been sent ahead, and is waited for below
    for work, _ in [*train._sending, *valid._sending]:
        work.wait()
    return got


def test_an_evaluation_between_plans_that_are_sent_ahead(pool: Pool) -> None:
    """The loading rank has sent the third training plan to the second stage before it sends the held-out one."""
    assert pool.run(2, train_and_validate, [[0], [1]]) == [[1, 2, 9, 3]] * 2


def receive_until_the_loader_fails(stages: list[list[int]]) -> list[str]:
    """What each rank gets from a loader that fails in place of its third micro-batch."""
    everyone = dist.new_group(backend="gloo")
    own = None
    for stage in stages:
        group = dist.new_group(stage, backend="gloo")
        if dist.get_rank() in stage and len(stage) > 1:
            own = group
    pipeline = CutNothing() if dist.get_rank() in stages[0] else None
    channel = BatchChannel(stages, everyone, own, TILE, pipeline=pipeline)  # type: ignore[arg-type]

    def loader() -> Iterator[HostBatch]:
        for supervised in (1, 2):
            plan = plan_of(20, supervised)
            yield HostBatch(
                plan, None, [torch.zeros(plan.num_tiles, 3, TILE, TILE, dtype=torch.uint8)], supervised
            )
        raise ValueError("too many bad records")

    source, got = loader() if channel.is_source else None, []
    for _ in range(2):
        got.append(f"{len(channel.receive(source).plan.host.loss_rows)} rows")
    assert channel.pending_keys == []
    if channel.is_source:
        for _ in range(2):  # however often it is asked for
            with pytest.raises(ValueError) as caught:
                channel.receive(source)
            got.append(str(caught.value))
    elif dist.get_rank() not in stages[0]:
        assert len(channel._broadcast(None)) == 0  # sent early, and waited for only now
    for work, _ in channel._sending:
        work.wait()
    return got


@pytest.mark.parametrize("stages", [[[0]], [[0, 1]], [[0], [1]]], ids=str)
def test_an_error_of_the_loader_costs_no_micro_batch_before_it(pool: Pool, stages: list[list[int]]) -> None:
    """The third micro-batch is read while the second is computed, on every rank."""
    loading, *others = pool.run(sum(map(len, stages)), receive_until_the_loader_fails, stages)
    assert loading == ["1 rows", "2 rows", "too many bad records", "too many bad records"]
    assert others == [["1 rows", "2 rows"]] * len(others)


@pytest.mark.parametrize(("micro_batches", "read"), [(None, [2, 3, 4, 5]), (2, [2, 2, 4, 4])])
def test_no_micro_batch_of_the_next_evaluation_is_read_early(
    micro_batches: int | None, read: list[int]
) -> None:
    """A loader of held-out data counts anew at its first record."""
    taken: list[int] = []

    def loader() -> Iterator[HostBatch]:
        for number in range(9):
            taken.append(number)
            plan = plan_of(20, 1)
            yield HostBatch(plan, None, [torch.zeros(plan.num_tiles, 3, TILE, TILE, dtype=torch.uint8)])

    pipeline: Any = CutNothing()
    channel = BatchChannel([[0]], None, None, TILE, pipeline=pipeline, micro_batches=micro_batches)
    source, seen = loader(), []
    for _ in read:
        channel.receive(source)
        seen.append(len(taken))
    assert seen == read


@pytest.mark.parametrize("stages", [[[0, 1]], [[0], [1]], [[0, 1], [2, 3]]], ids=str)
def test_plans_over_the_capacity(pool: Pool, stages: list[list[int]]) -> None:
    """A plan longer than any before comes in two messages, once; of the recipes, already the first does."""
    sizes = lengths()
    expected = [pack_plan(plan_with(size)).tobytes() for size in sizes]
    world = sum(map(len, stages))
    results = pool.run(world, partial(receive_all, stages), sizes)
    for rank, got in enumerate(results):
        assert [plan == want for (plan, _, _), want in zip(got, expected, strict=True)] == [True] * len(sizes)
        counts = BROADCASTS if len(stages[0]) > 1 else [0] * len(sizes)
        assert [count for _, _, count in got] == counts
        own_tiles = [tiles for _, tiles, _ in got]
        if rank not in stages[0]:
            assert own_tiles == [[]] * len(sizes)
        elif len(stages[0]) == 1 or rank == 0:
            assert [tiles[0] for tiles in own_tiles] == [1.0 + n for n in range(len(sizes))]
        else:
            assert own_tiles == [[0.0]] * len(sizes)  # the blank tile beside the only real one
