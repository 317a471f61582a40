"""Distribution of tiles to the TP ranks of the first stage: as pixels, or as files that each rank cuts itself.

The tiles of a micro-batch, padded to its capacity, are divided over the ranks in equal shares, in order. An image
whose tiles are in two shares is sent to both ranks. Everything here is on the host until a share is cut or copied.

S side of a tile, in pixels. T tiles of a share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_internvlx.data.dali_pipeline import TilePipeline
from megatron_internvlx.data.encoded import EncodedImage, PackImage, Wanted
from megatron_internvlx.platform import device
from megatron_internvlx.platform.transfer import to_device

# Consecutive tiles of an image: of a file, or pixels.
Part = Wanted | Tensor


def split_images(images: Sequence[PackImage], share: int, ranks: int) -> list[list[Part]]:
    """Divide images over ranks: the parts of each rank in the order of the plan, at most `share` tiles per rank."""
    shares: list[list[Part]] = [[] for _ in range(ranks)]
    place = 0
    for image in images:
        tiles = image.num_tiles if isinstance(image, EncodedImage) else len(image)
        first = 0
        while first < tiles:
            rank = place // share
            count = min(tiles - first, (rank + 1) * share - place)
            shares[rank].append(_part(image, first, count))
            first, place = first + count, place + count
    return shares


def _part(image: PackImage, first: int, count: int) -> Part:
    if isinstance(image, EncodedImage):
        return Wanted(image, first, count)
    return image[first : first + count]


def pack_parts(parts: Sequence[Part]) -> np.ndarray:
    """Pack parts into one message, uint8: their number, eight integers for each, and the files or pixels."""
    rows, blobs = [], []
    for part in parts:
        if isinstance(part, Wanted):
            image = part.image
            blobs.append(np.frombuffer(image.data, np.uint8))
            rows.append((image.cols, image.rows, int(image.thumbnail), image.turn, part.first, part.count))
        else:
            blobs.append(part.numpy().reshape(-1))
            rows.append((0, 0, 0, 0, 0, len(part)))
    head = [(*row, len(blob), 0) for row, blob in zip(rows, blobs, strict=True)]
    numbers = np.array([len(parts), *np.array(head, np.int64).reshape(-1)], np.int64)
    return np.concatenate([numbers.view(np.uint8), *blobs])


def unpack_parts(message: np.ndarray, tile_size: int) -> list[Part]:
    """Unpack a message of `pack_parts`."""
    count = int(message[:8].view(np.int64)[0])
    place = 8 + 64 * count
    parts: list[Part] = []
    for cols, rows, thumbnail, turn, first, tiles, size, _ in (
        message[8:place].view(np.int64).reshape(count, 8)
    ):
        blob, place = message[place : place + size], place + int(size)
        if cols:
            image = EncodedImage(blob.tobytes(), int(cols), int(rows), bool(thumbnail), int(turn))
            parts.append(Wanted(image, int(first), int(tiles)))
        else:
            parts.append(torch.from_numpy(blob.reshape(int(tiles), 3, tile_size, tile_size)))
    return parts


class PixelScatter:
    """Division of tiles that the loading rank has as pixels.

    Args:
        ranks: global ranks of the first stage in TP order; the first one loads.
        group: host group of these ranks; None for one rank.
        tile_size: S.
    """

    def __init__(self, ranks: list[int], group: dist.ProcessGroup | None, tile_size: int):
        self.ranks, self.group, self.tile_size = ranks, group, tile_size

    def __call__(self, capacity: int, tiles: Tensor | None) -> Tensor:
        """Scatter `capacity` tiles; returns this rank's, uint8 [T, 3, S, S] on its device, missing ones blank."""
        share = capacity // len(self.ranks)
        shape = (share, 3, self.tile_size, self.tile_size)
        padded = None
        if tiles is not None:
            blank = capacity - tiles.shape[0]
            padded = torch.cat([tiles, tiles.new_zeros((blank, *shape[1:]))]) if blank else tiles
        if len(self.ranks) == 1:
            assert padded is not None
            return to_device(padded)
        mine = torch.empty(shape, dtype=torch.uint8)
        parts = list(padded.contiguous().chunk(len(self.ranks))) if padded is not None else None
        dist.scatter(mine, parts, src=self.ranks[0], group=self.group)
        return to_device(mine)


@dataclass
class _Started:
    """Micro-batch of which this rank's pipeline cuts the files; `share` tiles on this rank."""

    share: int
    parts: list[Part]
    number: int
    """Number of the pipeline's batch."""


def _files(parts: list[Part]) -> list[Wanted]:
    return [part for part in parts if isinstance(part, Wanted)]


class FileScatter:
    """Division of undecoded images; each rank cuts its share. `start` a micro-batch, and `collect` it later.

    Args:
        ranks: global ranks of the first stage in TP order; the first one loads.
        group: host group of these ranks; None for one rank.
        tile_size: S.
        pipeline: pipeline that cuts on this rank; several divisions may use it, whose micro-batches alternate.
    """

    def __init__(
        self, ranks: list[int], group: dist.ProcessGroup | None, tile_size: int, pipeline: TilePipeline
    ):
        self.ranks, self.group, self.tile_size, self.pipeline = ranks, group, tile_size, pipeline
        self.sent = 0
        """Bytes that this rank has sent."""
        self.images = 0
        """Images that this rank's pipeline was given."""
        self._started: deque[_Started] = deque()
        self._sending: list[tuple[dist.Work, Tensor]] = []

    def start(self, capacity: int, images: Sequence[PackImage] | None) -> None:
        """Divide the images of the next micro-batch, `capacity` tiles in all, and start to cut this rank's share."""
        share = capacity // len(self.ranks)
        parts = self._exchange(share, images)
        files = _files(parts)
        self.images += len(files)
        self._started.append(_Started(share, parts, self.pipeline.start(files)))

    def _exchange(self, share: int, images: Sequence[PackImage] | None) -> list[Part]:
        shares = None if images is None else split_images(images, share, len(self.ranks))
        if len(self.ranks) == 1:
            assert shares is not None
            return shares[0]
        size = torch.zeros(1, dtype=torch.int64)
        if shares is None:
            dist.scatter(size, None, src=self.ranks[0], group=self.group)
            message = torch.empty(int(size[0]), dtype=torch.uint8)
            dist.recv(message, self.ranks[0], group=self.group)
            return unpack_parts(message.numpy(), self.tile_size)
        messages = [torch.from_numpy(pack_parts(parts)) for parts in shares[1:]]
        sizes = [torch.tensor([len(message)]) for message in messages]
        dist.scatter(size, [size, *sizes], src=self.ranks[0], group=self.group)
        self._sending = [(work, kept) for work, kept in self._sending if not work.is_completed()]
        for rank, message in zip(self.ranks[1:], messages, strict=True):
            work = dist.isend(message, rank, group=self.group)
            assert work is not None
            self._sending.append((work, message))
            self.sent += len(message)
        return shares[0]

    def collect(self) -> Tensor:
        """This rank's tiles of the oldest started micro-batch, uint8 [T, 3, S, S] on its device, missing ones blank."""
        started = self._started.popleft()
        shape = (3, self.tile_size, self.tile_size)
        out = torch.empty((started.share, *shape), dtype=torch.uint8, device=device())
        counts = [part.count if isinstance(part, Wanted) else len(part) for part in started.parts]
        out[sum(counts) :].zero_()
        files = _files(started.parts)
        if len(files) == len(started.parts):
            self.pipeline.collect(out[: sum(counts)], started.number)
            return out
        cut = torch.empty((sum(part.count for part in files), *shape), dtype=torch.uint8, device=device())
        self.pipeline.collect(cut, started.number)
        for place, tiles in _tiles_with_places(started.parts, counts, cut):
            out[place : place + len(tiles)].copy_(tiles)
        return out


def _tiles_with_places(parts: list[Part], counts: list[int], cut: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the tiles of each part and the number of the first one; `cut` has the tiles of all files."""
    place = taken = 0
    for part, count in zip(parts, counts, strict=True):
        if isinstance(part, Wanted):
            yield place, cut[taken : taken + count]
            taken += count
        else:
            yield place, to_device(part)
        place += count
