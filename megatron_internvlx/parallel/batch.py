"""What each rank gets of a micro-batch.

One rank per data-parallel replica (first stage, TP rank 0) loads samples. The plan, the token ids
and the targets of a micro-batch are a few kilobytes of int32: one broadcast over the replica's
TP x PP ranks, on the host, gives every stage the same plan without a device synchronization.
Pixels go only to the first stage, each TP rank receiving the tiles it encodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_internvlx.data.plan import PhasePlan, SequencePlan, pack_plan, unpack_plan
from megatron_internvlx.platform.transfer import to_device


@dataclass(frozen=True)
class DevicePhase:
    """One phase of the plan: lengths on the host, index maps on the device."""

    length: int
    segment_lengths: tuple[int, ...]
    max_seqlen: int
    cu_seqlens: Tensor
    position_ids: Tensor
    visual_rows: Tensor


@dataclass(frozen=True)
class DevicePlan:
    """A SequencePlan whose index maps are device tensors; see data/plan.py for the fields."""

    num_tiles: int
    tile_capacity: int
    encoded_tiles: int
    lvtc: bool
    shallow: DevicePhase
    deep: DevicePhase
    merge_index: Tensor
    expand_index: Tensor | None
    tokens: Tensor
    loss_rows: Tensor
    targets: Tensor
    host: SequencePlan

    @property
    def entry(self) -> DevicePhase:
        """The phase of layer 0."""
        return self.shallow if self.lvtc else self.deep


def device_plan(plan: SequencePlan) -> DevicePlan:
    """Move a plan's index maps to the device in one copy."""
    phases = (plan.shallow, plan.deep) if plan.expand_index is not None else (plan.deep,)
    arrays = [plan.merge_index, plan.tokens, plan.loss_rows, plan.targets]
    for phase in phases:
        arrays += [phase.cu_seqlens, phase.position_ids, phase.visual_rows]
    if plan.expand_index is not None:
        arrays.append(plan.expand_index)
    flat = to_device(torch.from_numpy(np.concatenate(arrays)))
    parts = list(flat.split([len(x) for x in arrays]))
    merge, tokens, loss_rows, targets = parts[:4]

    def phase_at(phase: PhasePlan, first: int) -> DevicePhase:
        return DevicePhase(
            phase.length, phase.segment_lengths, phase.max_seqlen, *parts[first : first + 3]
        )

    lvtc = plan.expand_index is not None
    shallow = phase_at(plan.shallow, 4)
    deep = phase_at(plan.deep, 7) if lvtc else shallow
    return DevicePlan(
        plan.num_tiles,
        plan.tile_capacity,
        plan.encoded_tiles,
        lvtc,
        shallow,
        deep,
        merge,
        parts[-1] if lvtc else None,
        tokens,
        loss_rows,
        targets,
        plan,
    )


@dataclass
class HostBatch:
    """A micro-batch as the loader delivers it, on the loading rank only."""

    plan: SequencePlan
    tiles: Tensor
    """uint8 [num_tiles, 3, S, S], in the order of the plan's visual rows."""


@dataclass
class MicroBatch:
    """A micro-batch on one rank's device."""

    plan: DevicePlan
    tiles: Tensor | None
    """uint8 [share, 3, S, S] tiles that this rank encodes; None after the first stage."""


class BatchChannel:
    """Hands micro-batches from the loading rank of a replica to its TP x PP ranks.

    Args:
        ranks: global ranks of one replica, loading rank first.
        first_stage_ranks: those that encode tiles, in TP order, loading rank first.
        group, first_stage_group: gloo groups of the two; None when they hold one rank.
        tile_size: side of a tile, in pixels.
    """

    START_CAPACITY = 1 << 14

    def __init__(self, ranks, first_stage_ranks, group, first_stage_group, tile_size: int) -> None:
        self.ranks, self.first_stage_ranks = list(ranks), list(first_stage_ranks)
        self.group, self.first_stage_group = group, first_stage_group
        self.tile_size = tile_size
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.capacity = self.START_CAPACITY
        self.broadcasts = 0

    @property
    def is_source(self) -> bool:
        """Whether this rank loads data."""
        return self.rank == self.ranks[0]

    def receive(self, loader: Iterator[HostBatch] | None) -> MicroBatch:
        """Next micro-batch; `loader` is read on the loading rank only."""
        batch = next(loader) if self.is_source else None  # type: ignore[arg-type]
        plan = unpack_plan(self._broadcast(pack_plan(batch.plan) if batch else None))
        tiles = None
        if self.rank in self.first_stage_ranks:
            tiles = to_device(self._scatter_tiles(plan, batch.tiles if batch else None))
        return MicroBatch(device_plan(plan), tiles)

    def _broadcast(self, flat: np.ndarray | None) -> np.ndarray:
        if len(self.ranks) == 1:
            assert flat is not None
            return flat
        buffer = torch.zeros(self.capacity, dtype=torch.int32)
        if flat is not None:
            buffer[0] = len(flat)
            head = torch.from_numpy(flat[: self.capacity - 1])
            buffer[1 : 1 + len(head)] = head
        dist.broadcast(buffer, self.ranks[0], group=self.group)
        self.broadcasts += 1
        size = int(buffer[0])
        if size <= self.capacity - 1:
            return buffer[1 : 1 + size].numpy()
        # Longer than ever before: the rest follows once, and the next ones fit.
        rest = torch.zeros(size - self.capacity + 1, dtype=torch.int32)
        if flat is not None:
            rest[:] = torch.from_numpy(flat[self.capacity - 1 :])
        dist.broadcast(rest, self.ranks[0], group=self.group)
        self.broadcasts += 1
        whole = torch.cat([buffer[1:], rest]).numpy()
        self.capacity = 2 * (size + 1)
        return whole

    def _scatter_tiles(self, plan: SequencePlan, tiles: Tensor | None) -> Tensor:
        world = len(self.first_stage_ranks)
        share = plan.tile_capacity // world
        shape = (share, 3, self.tile_size, self.tile_size)
        padded = None
        if tiles is not None:
            blank = plan.tile_capacity - tiles.shape[0]
            padded = torch.cat([tiles, tiles.new_zeros((blank, *shape[1:]))]) if blank else tiles
        if world == 1:
            assert padded is not None
            return padded
        mine = torch.empty(shape, dtype=torch.uint8)
        parts = list(padded.contiguous().chunk(world)) if padded is not None else None
        dist.scatter(mine, parts, src=self.ranks[0], group=self.first_stage_group)
        return mine


class SharedBatches:
    """Lets every virtual pipeline chunk of a rank read the same micro-batches in its own order.

    A chunk asks for its n-th micro-batch; the first to ask receives it from the channel, the last
    to ask drops it.
    """

    def __init__(self, channel: BatchChannel, loader: Iterator[HostBatch] | None, readers: int) -> None:
        self.channel, self.loader, self.readers = channel, loader, readers
        self._received = 0
        self._kept: dict[int, tuple[MicroBatch, int]] = {}

    def get(self, number: int) -> MicroBatch:
        """The micro-batch with this number; each reader asks once per number."""
        while self._received <= number:
            self._kept[self._received] = (self.channel.receive(self.loader), self.readers)
            self._received += 1
        batch, left = self._kept.pop(number)
        if left > 1:
            self._kept[number] = (batch, left - 1)
        return batch


class BatchIterator:
    """Iterator of one model chunk over the shared micro-batches."""

    def __init__(self, shared: SharedBatches) -> None:
        self.shared, self._next = shared, 0

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> MicroBatch:
        batch = self.shared.get(self._next)
        self._next += 1
        return batch
