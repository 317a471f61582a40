"""Distribution of a micro-batch to the ranks of a replica.

One rank per data-parallel replica (first stage, TP rank 0) loads samples. The plan, the token ids
and the targets of a micro-batch are a few kilobytes of int32: they go to the first rank of each
stage and from there to its TP ranks in one broadcast, all on the host, so that every rank has the
same plan without a device synchronization. Images go only to the first stage, each TP rank receiving
the tiles it encodes, or the files to cut them from; see `tiles.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_internvlx.data.dali_pipeline import TilePipeline
from megatron_internvlx.data.encoded import EncodedImage, PackImage
from megatron_internvlx.data.loss_weights import loss_weights
from megatron_internvlx.data.plan import SequencePlan, pack_plan, unpack_plan
from megatron_internvlx.parallel.device_plan import DevicePlan, Weigh, device_plan
from megatron_internvlx.parallel.tiles import FileScatter, PixelScatter


@dataclass
class HostBatch:
    """A micro-batch as the loader delivers it, on the loading rank only.

    Raises ValueError when the tiles are not those of the plan.
    """

    plan: SequencePlan
    tiles: Tensor | None
    """uint8 [num_tiles, 3, S, S], in the order of the plan's visual rows; None if there are images instead."""
    images: list[PackImage] | None = None
    """Files that the ranks cut into tiles, and tiles of other images, in the same order."""
    key: Any = None
    """Key from which the loader can make this micro-batch again."""

    def __post_init__(self) -> None:
        found = sum(
            image.num_tiles if isinstance(image, EncodedImage) else len(image) for image in self.images or ()
        )
        found += 0 if self.tiles is None else len(self.tiles)
        if found != self.plan.num_tiles:
            raise ValueError(
                f"a micro-batch has {found} tiles, its plan has {self.plan.num_tiles}: "
                "placeholders and image features do not match"
            )


@dataclass
class MicroBatch:
    """A micro-batch on one rank's device."""

    plan: DevicePlan
    tiles: Tensor | None
    """uint8 [share, 3, S, S] tiles that this rank encodes; None after the first stage."""

    def clone(self) -> MicroBatch:
        """Copy into new buffers, which a CUDA graph reads and `overwrite` fills."""
        return MicroBatch(self.plan.clone(), None if self.tiles is None else self.tiles.clone())

    def overwrite(self, other: MicroBatch) -> None:
        """Copy another micro-batch of the same shapes into the buffers of this one."""
        self.plan.flat.copy_(other.plan.flat, non_blocking=True)
        if self.tiles is not None:
            assert other.tiles is not None
            self.tiles.copy_(other.tiles, non_blocking=True)


class BatchChannel:
    """Transfer of micro-batches from the loading rank of a replica to its TP x PP ranks.

    Args:
        stages: global ranks of the replica, one list per pipeline stage in TP order; the loading rank is the first
            rank of the first stage.
        group: host group of all these ranks; None for one rank.
        stage_group: host group of this rank's stage; None for one rank.
        tile_size: side of a tile, in pixels.
        weigh: function that gives the weights of a micro-batch's loss rows.
        pipeline: on the first stage, the pipeline that cuts images that arrive as files instead of tiles. A
            micro-batch is then started while the one before it is computed.
        micro_batches: number after which the loader begins anew, as an evaluation does; none beyond it is started
            early. None: it is endless.
        tag: number of this channel's messages in `group`. Channels that share a group need different ones: a plan
            that is sent ahead waits for its receiver while another channel exchanges its own.
    """

    START_CAPACITY = 1 << 14

    def __init__(
        self,
        stages: list[list[int]],
        group,
        stage_group,
        tile_size: int,
        weigh: Weigh = loss_weights,
        pipeline: TilePipeline | None = None,
        tag: int = 0,
        micro_batches: int | None = None,
    ) -> None:
        self.tag = tag
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.source = stages[0][0]
        self.first_stage = stages[0]
        self.leaders = [stage[0] for stage in stages]
        self.stage = next(stage for stage in stages if self.rank in stage)
        self.group, self.stage_group = group, stage_group
        self.weigh = weigh
        self.pixels = PixelScatter(self.first_stage, stage_group, tile_size)
        self.files: FileScatter | None = None
        if pipeline is not None:
            self.files = FileScatter(self.first_stage, stage_group, tile_size, pipeline)
        self.micro_batches = micro_batches
        self._received = 0
        self._started: deque[tuple[SequencePlan, HostBatch | None]] = deque()
        self._failure: Exception | None = None  # of the loader, in place of the next micro-batch
        self.capacity = self.START_CAPACITY
        self.broadcasts = 0
        self._sending: list[tuple[dist.Work, Tensor]] = []

    @property
    def is_source(self) -> bool:
        """Whether this rank loads data."""
        return self.rank == self.source

    def receive(self, loader: Iterator[HostBatch] | None) -> MicroBatch:
        """Receive the next micro-batch; `loader` is read on the loading rank only."""
        if self.files is None:
            plan, batch = self._next_plan(loader)
            tiles = None
            if self.rank in self.first_stage:
                tiles = self.pixels(plan.tile_capacity, batch.tiles if batch else None)
            return MicroBatch(device_plan(plan, self.weigh), tiles)
        if not self._started:
            self._start(self.files, *self._next_plan(loader))
        plan, _ = self._started.popleft()
        tiles = self.files.collect()
        self._received += 1
        if self.micro_batches is None or self._received % self.micro_batches:
            self._start_early(self.files, loader)
        return MicroBatch(device_plan(plan, self.weigh), tiles)

    def _next_plan(self, loader: Iterator[HostBatch] | None) -> tuple[SequencePlan, HostBatch | None]:
        """Plan of the next micro-batch, and on the loading rank its content. Raises the loader's errors there."""
        if not self.is_source:
            flat = self._broadcast(None)
            while not len(flat):  # no plan because the loader failed: its rank ends the run
                flat = self._broadcast(None)
            return unpack_plan(flat), None
        if self._failure is not None:
            raise self._failure
        batch = next(loader)  # type: ignore[arg-type]
        return self._send_plan(batch), batch

    def _send_plan(self, batch: HostBatch) -> SequencePlan:
        return unpack_plan(self._broadcast(pack_plan(batch.plan)))

    def _start(self, files: FileScatter, plan: SequencePlan, batch: HostBatch | None) -> None:
        files.start(plan.tile_capacity, batch.images if batch else None)
        self._started.append((plan, batch))

    def _start_early(self, files: FileScatter, loader: Iterator[HostBatch] | None) -> None:
        """Start to cut the images of the micro-batch after the one that is about to be computed.

        An error of the loader must not cost that one: it is kept until its own micro-batch is asked for, and an empty
        plan tells the other ranks to continue.
        """
        if not self.is_source:
            flat = self._broadcast(None)
            if len(flat):
                self._start(files, unpack_plan(flat), None)
            return
        try:
            batch = next(loader)  # type: ignore[arg-type]
        except Exception as error:
            self._failure = error
            self._broadcast(np.zeros(0, np.int32))
            return
        self._start(files, self._send_plan(batch), batch)

    @property
    def pending_keys(self) -> list[Any]:
        """Keys of the micro-batches that are loaded but not yet received; on the loading rank."""
        return [batch.key for _, batch in self._started if batch is not None]

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
        """Send from the loading rank to the first rank of every stage, then broadcast inside each stage.

        The loading rank does not wait for the later stages: they need the plan only when their input arrives, and
        that input is sent after the loading rank's forward pass.
        """
        if self.is_source:
            self._sending = [(w, kept) for w, kept in self._sending if not w.is_completed()]
            for leader in self.leaders[1:]:
                work = dist.isend(buffer, leader, group=self.group, tag=self.tag)
                assert work is not None
                self._sending.append((work, buffer))
        elif self.rank in self.leaders:
            dist.recv(buffer, self.source, group=self.group, tag=self.tag)
        if self.stage_group is not None:
            self.broadcasts += 1
            dist.broadcast(buffer, self.stage[0], group=self.stage_group)


class SharedBatches:
    """Micro-batches of a rank, which every virtual pipeline chunk reads in its own order.

    The first chunk that asks for a number receives the micro-batch from the channel; after the last one it is
    dropped.

    Args:
        channel: source of the micro-batches.
        loader: loader of this replica, on the loading rank; None on others.
        readers: number of chunks.
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
        """Loader's position; RuntimeError if a received micro-batch is not yet consumed."""
        if self._kept:
            raise RuntimeError(f"{len(self._kept)} micro-batches are received but not yet consumed")
        save = getattr(self.loader, "save_state", None)
        return save(self.channel.pending_keys) if save is not None else None

    def peek(self, number: int) -> MicroBatch:
        """Micro-batch with this number; all chunks can still get it."""
        self._receive_up_to(number)
        return self._kept[number][0]

    def get(self, number: int) -> MicroBatch:
        """Micro-batch with this number; each chunk must ask once per number."""
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
        """Position of the loader for Megatron's checkpoint, on the loading rank; None if the loader has none."""
        return self.shared.loader_state()

    def upcoming(self, least: int) -> tuple[int, DevicePlan]:
        """Number and plan of the first micro-batch not consumed, or of number `least` if that is later."""
        number = max(least, self._next)
        return number, self.shared.peek(number).plan
