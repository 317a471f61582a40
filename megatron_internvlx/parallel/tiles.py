"""How the TP ranks of the first stage get the tiles that they encode: as pixels, or as files that each cuts itself.

The tiles of a micro-batch, padded to its capacity, are dealt to the ranks in equal shares, in order. An image whose
tiles lie in two shares goes to both ranks. Everything here is on the host until a share is cut or copied.

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

from megatron_internvlx.data.dali_pipeline import TilePipeline, Wanted
from megatron_internvlx.data.encoded import EncodedImage, PackImage
from megatron_internvlx.platform import device
from megatron_internvlx.platform.transfer import to_device

# Tiles of a part: of a file, or those given.
Part = Wanted | Tensor


def shares_of(images: Sequence[PackImage], share: int, ranks: int) -> list[list[Part]]:
    """Parts of each rank in the order of the plan, at most ``share`` tiles each."""
    dealt: list[list[Part]] = [[] for _ in range(ranks)]
    place = 0
    for image in images:
        tiles = image.num_tiles if isinstance(image, EncodedImage) else len(image)
        first = 0
        while first < tiles:
            rank = place // share
            count = min(tiles - first, (rank + 1) * share - place)
            dealt[rank].append(_part(image, first, count))
            first, place = first + count, place + count
    return dealt


def _part(image: PackImage, first: int, count: int) -> Part:
    if isinstance(image, EncodedImage):
        return Wanted(image, first, count)
    return image[first : first + count]


def pack_parts(parts: Sequence[Part]) -> np.ndarray:
    """Parts as one message, uint8: their number, eight integers for each, and its file or pixels."""
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
    """Reverses `pack_parts`."""
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
    """Deals tiles that the loading rank has.

    Args:
        ranks: global ranks of the first stage in TP order; the first one loads.
        group: host group of them; None for one rank.
        tile_size: S.
    """

    def __init__(self, ranks: list[int], group: dist.ProcessGroup | None, tile_size: int):
        self.ranks, self.group, self.tile_size = ranks, group, tile_size

    def __call__(self, capacity: int, tiles: Tensor | None) -> Tensor:
        """This rank's tiles uint8 [T, 3, S, S] of ``capacity`` tiles, on its device; the surplus is blank."""
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
class _Begun:
    share: int
    parts: list[Part]

    @property
    def files(self) -> list[Wanted]:
        return [part for part in self.parts if isinstance(part, Wanted)]


class FileScatter:
    """Deals undecoded images; each rank cuts its share: `start` a micro-batch, `collect` it later.

    Args:
        ranks: global ranks of the first stage in TP order; the first one loads.
        group: host group of them; None for one rank.
        tile_size: S.
        pipeline: of this rank.

    ``sent`` counts the bytes that this rank sent.
    """

    def __init__(
        self, ranks: list[int], group: dist.ProcessGroup | None, tile_size: int, pipeline: TilePipeline
    ):
        self.ranks, self.group, self.tile_size, self.pipeline = ranks, group, tile_size, pipeline
        self.sent = 0
        self._begun: deque[_Begun] = deque()
        self._sending: list[tuple[dist.Work, Tensor]] = []

    def start(self, capacity: int, images: Sequence[PackImage] | None) -> None:
        """Deal the images of the next micro-batch, ``capacity`` tiles in all, and begin to cut this rank's."""
        share = capacity // len(self.ranks)
        begun = _Begun(share, self._exchange(share, images))
        self._begun.append(begun)
        self.pipeline.start(begun.files)

    def _exchange(self, share: int, images: Sequence[PackImage] | None) -> list[Part]:
        dealt = None if images is None else shares_of(images, share, len(self.ranks))
        if len(self.ranks) == 1:
            assert dealt is not None
            return dealt[0]
        size = torch.zeros(1, dtype=torch.int64)
        if dealt is None:
            dist.scatter(size, None, src=self.ranks[0], group=self.group)
            message = torch.empty(int(size[0]), dtype=torch.uint8)
            dist.recv(message, self.ranks[0], group=self.group)
            return unpack_parts(message.numpy(), self.tile_size)
        messages = [torch.from_numpy(pack_parts(parts)) for parts in dealt[1:]]
        sizes = [torch.tensor([len(message)]) for message in messages]
        dist.scatter(size, [size, *sizes], src=self.ranks[0], group=self.group)
        self._sending = [(work, kept) for work, kept in self._sending if not work.is_completed()]
        for rank, message in zip(self.ranks[1:], messages, strict=True):
            work = dist.isend(message, rank, group=self.group)
            assert work is not None
            self._sending.append((work, message))
            self.sent += len(message)
        return dealt[0]

    def collect(self) -> Tensor:
        """This rank's tiles uint8 [T, 3, S, S] of the oldest micro-batch, on its device; the surplus is blank."""
        begun = self._begun.popleft()
        shape = (3, self.tile_size, self.tile_size)
        out = torch.empty((begun.share, *shape), dtype=torch.uint8, device=device())
        counts = [part.count if isinstance(part, Wanted) else len(part) for part in begun.parts]
        out[sum(counts) :].zero_()
        files = begun.files
        if len(files) == len(begun.parts):
            self.pipeline.collect(out[: sum(counts)])
            return out
        cut = torch.empty((sum(part.count for part in files), *shape), dtype=torch.uint8, device=device())
        self.pipeline.collect(cut)
        for place, tiles in _placed(begun.parts, counts, cut):
            out[place : place + len(tiles)].copy_(tiles)
        return out


def _placed(parts: list[Part], counts: list[int], cut: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Tiles and where they go, ``cut`` being those of all files."""
    place = taken = 0
    for part, count in zip(parts, counts, strict=True):
        if isinstance(part, Wanted):
            yield place, cut[taken : taken + count]
            taken += count
        else:
            yield place, to_device(part)
        place += count
