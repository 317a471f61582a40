"""What each rank gets of a micro-batch.

One rank per data-parallel replica (first stage, TP rank 0) loads samples. The plan, the token ids
and the targets of a micro-batch are a few kilobytes of int32: they go to the first rank of each
stage and from there to its TP ranks in one broadcast, all on the host, so that every rank has the
same plan without a device synchronization. Pixels go only to the first stage, each TP rank receiving
the tiles it encodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_internvlx.data.loss_weights import loss_weights
from megatron_internvlx.data.plan import SequencePlan, pack_plan, unpack_plan
from megatron_internvlx.parallel.device_plan import DevicePlan, Weigh, device_plan
from megatron_internvlx.platform.transfer import to_device


@dataclass
class HostBatch:
    """A micro-batch as the loader delivers it, on the loading rank only.

    Raises ValueError when the tiles are not those of the plan.
    """

    plan: SequencePlan
    tiles: Tensor
    """uint8 [num_tiles, 3, S, S], in the order of the plan's visual rows."""

    def __post_init__(self) -> None:
        if len(self.tiles) != self.plan.num_tiles:
            raise ValueError(
                f"a micro-batch has {len(self.tiles)} tiles, its plan has {self.plan.num_tiles}: "
                "placeholders and image features do not match"
            )


@dataclass
class MicroBatch:
    """A micro-batch on one rank's device."""

    plan: DevicePlan
    tiles: Tensor | None
    """uint8 [share, 3, S, S] tiles that this rank encodes; None after the first stage."""

    def kept(self) -> MicroBatch:
        """A copy in buffers that `overwrite` fills anew: what a CUDA graph reads."""
        return MicroBatch(self.plan.in_buffer(), None if self.tiles is None else self.tiles.clone())

    def overwrite(self, other: MicroBatch) -> None:
        """Put another micro-batch into this one's buffers, which have the same shapes."""
        self.plan.flat.copy_(other.plan.flat, non_blocking=True)
        if self.tiles is not None:
            assert other.tiles is not None
            self.tiles.copy_(other.tiles, non_blocking=True)


class BatchChannel:
    """Hands micro-batches from the loading rank of a replica to its TP x PP ranks.

    Args:
        stages: global ranks of the replica, one list per pipeline stage in TP order; the loading rank
            is the first of the first.
        group: host group of all of them; None when it holds one rank.
        stage_group: host group of this rank's stage; None when it holds one rank.
        tile_size: side of a tile, in pixels.
        weigh: what the loss rows of a micro-batch weigh.
    """

    START_CAPACITY = 1 << 14

    def __init__(
        self, stages: list[list[int]], group, stage_group, tile_size: int, weigh: Weigh = loss_weights
    ) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.source = stages[0][0]
        self.first_stage = stages[0]
        self.leaders = [stage[0] for stage in stages]
        self.stage = next(stage for stage in stages if self.rank in stage)
        self.group, self.stage_group = group, stage_group
        self.tile_size, self.weigh = tile_size, weigh
        self.capacity = self.START_CAPACITY
        self.broadcasts = 0
        self._sending: list[tuple[dist.Work, Tensor]] = []

    @property
    def is_source(self) -> bool:
        """Whether this rank loads data."""
        return self.rank == self.source

    def receive(self, loader: Iterator[HostBatch] | None) -> MicroBatch:
        """Next micro-batch; `loader` is read on the loading rank only."""
        batch = next(loader) if self.is_source else None  # type: ignore[arg-type]
        plan = unpack_plan(self._broadcast(pack_plan(batch.plan) if batch else None))
        tiles = None
        if self.rank in self.first_stage:
            tiles = to_device(self._scatter_tiles(plan, batch.tiles if batch else None))
        return MicroBatch(device_plan(plan, self.weigh), tiles)

    def _broadcast(self, flat: np.ndarray | None) -> np.ndarray:
        if self.group is None:
            assert flat is not None
            return flat
        first = torch.zeros(self.capacity, dtype=torch.int32)
        if flat is not None:
            first[0] = len(flat)
            head = torch.from_numpy(flat[: self.capacity - 1])
            first[1 : 1 + len(head)] = head
        self._exchange(first)
        size = int(first[0])
        if size <= self.capacity - 1:
            return first[1 : 1 + size].numpy()
        # Longer than ever before: the rest follows once, and the next ones fit.
        rest = torch.zeros(size - self.capacity + 1, dtype=torch.int32)
        if flat is not None:
            rest[:] = torch.from_numpy(flat[self.capacity - 1 :])
        self._exchange(rest)
        self.capacity = 2 * (size + 1)
        return torch.cat([first[1:], rest]).numpy()

    def _exchange(self, buffer: Tensor) -> None:
        """From the loading rank to the first rank of every stage, then one broadcast inside each stage.

        The loading rank does not wait for the later stages: they ask for the plan only when their input
        arrives, and that input waits for the loading rank's forward pass.
        """
        if self.is_source:
            self._sending = [(w, kept) for w, kept in self._sending if not w.is_completed()]
            for leader in self.leaders[1:]:
                work = dist.isend(buffer, leader, group=self.group)
                assert work is not None
                self._sending.append((work, buffer))
        elif self.rank in self.leaders:
            dist.recv(buffer, self.source, group=self.group)
        if self.stage_group is not None:
            self.broadcasts += 1
            dist.broadcast(buffer, self.stage[0], group=self.stage_group)

    def _scatter_tiles(self, plan: SequencePlan, tiles: Tensor | None) -> Tensor:
        world = len(self.first_stage)
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
        dist.scatter(mine, parts, src=self.source, group=self.stage_group)
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

    def _receive_up_to(self, number: int) -> None:
        while self._received <= number:
            self._kept[self._received] = (self.channel.receive(self.loader), self.readers)
            self._received += 1

    def loader_state(self) -> Any:
        """What the loader says of its position, which must be that of the micro-batches consumed."""
        if self._kept:
            raise RuntimeError(f"{len(self._kept)} micro-batches are received and not yet consumed")
        save = getattr(self.loader, "save_state", None)
        return save() if save is not None else None

    def peek(self, number: int) -> MicroBatch:
        """The micro-batch with this number, which stays for its readers."""
        self._receive_up_to(number)
        return self._kept[number][0]

    def get(self, number: int) -> MicroBatch:
        """The micro-batch with this number; each reader asks once per number."""
        self._receive_up_to(number)
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

    def save_state(self) -> Any:
        """Position of the loader for Megatron's checkpoint; None if it needs none. On the loading rank."""
        return self.shared.loader_state()

    def upcoming(self, least: int) -> tuple[int, DevicePlan]:
        """Number and plan of the first micro-batch not consumed, or of number `least` if that is later."""
        number = max(least, self._next)
        return number, self.shared.peek(number).plan
