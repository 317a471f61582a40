"""Image bytes to tiles with DALI: same contract as the Pillow reference in `decode_pil.py`.

DALI decodes and torch resizes: its uint8 antialiased bicubic is Pillow's algorithm with 16-bit weights, four times
as fast as Pillow's and DALI's own. Pillow reads every header first: for the size, so that a bomb is rejected before any
pixel is decoded, for the orientation, and to find files that DALI decodes differently. `dali_pipeline.py` uses a GPU.
"""

import random
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from megatron_internvlx.data.decode_pil import (
    UPRIGHT,
    Source,
    orientation,
    read_header,
    reencode,
)
from megatron_internvlx.data.decode_pil import load_tiles as pillow_tiles
from megatron_internvlx.data.encoded import FAILED, unsupported
from megatron_internvlx.data.rejects import BadSample


class DaliDecoder:
    """Decodes images to tiles; one per process.

    Args:
        tile_size: side of a tile, in pixels.
        apply_exif: whether images are turned upright; the released code does not.

    `fallbacks` counts per reason the images that Pillow cut.
    """

    def __init__(self, *, tile_size: int = 448, apply_exif: bool = True):
        import nvidia.dali.experimental.dynamic as ndd
        from nvidia.dali import types

        self.tile_size, self.apply_exif = tile_size, apply_exif
        self.fallbacks: Counter[str] = Counter()
        self._dali: Any = ndd
        self._types: Any = types
        ndd.set_num_threads(1)  # a worker has one core

    def load_tiles(
        self,
        source: Source,
        cols: int,
        rows: int,
        *,
        thumbnail: bool,
        jpeg_augment: random.Random | None = None,
    ) -> np.ndarray:
        """Tiles uint8 [T, 3, S, S], row by row, the thumbnail last; see `decode_pil.load_tiles`.

        Raises BadSample (missing_image, truncated_image, unreadable_image, bomb) named by the path.
        """
        if min(cols, rows) < 1:
            raise ValueError(f"cols {cols} and rows {rows} must be at least 1")
        with read_header(source) as image:
            turn = orientation(image) if self.apply_exif else 1
            reason = unsupported(image)
        if reason is None:
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
            try:
                pixels = self._decode(data)
            except RuntimeError:
                # Pillow finds the defect, or can read the file.
                reason = FAILED
            else:
                return self._tiles(pixels, turn, (cols, rows), thumbnail, jpeg_augment)
        tiles = pillow_tiles(
            source,
            cols,
            rows,
            tile_size=self.tile_size,
            thumbnail=thumbnail,
            jpeg_augment=jpeg_augment,
            apply_exif=self.apply_exif,
        )
        self.fallbacks[reason] += 1  # not for a broken image, which is a reject
        return tiles

    def _decode(self, data: bytes) -> np.ndarray:
        """Decoded pixels uint8 [height, width, 3], not turned."""
        encoded = self._dali.as_tensor(np.frombuffer(data, np.uint8))
        options: dict[str, Any] = {"output_type": self._types.RGB, "adjust_orientation": False}
        return np.asarray(self._dali.decoders.image(encoded, device="cpu", **options))

    def _tiles(
        self,
        pixels: np.ndarray,
        turn: int,
        grid: tuple[int, int],
        thumbnail: bool,
        jpeg_augment: random.Random | None,
    ) -> np.ndarray:
        (cols, rows), size = grid, self.tile_size
        upright = apply_orientation(_as_torch(pixels), turn)
        count = cols * rows
        with_thumbnail = thumbnail and count > 1
        tiles = torch.empty((count + with_thumbnail, 3, size, size), dtype=torch.uint8)
        whole = resize(upright, rows * size, cols * size)
        view = tiles[:count].view(rows, cols, 3, size, size)
        view.copy_(whole.view(3, rows, size, cols, size).permute(1, 3, 0, 2, 4))
        if with_thumbnail:
            tiles[-1] = resize(upright, size, size)
        result = tiles.numpy()
        if jpeg_augment is None:
            return result
        again = [reencode(np.ascontiguousarray(tile.transpose(1, 2, 0)), jpeg_augment) for tile in result]
        return np.ascontiguousarray(np.stack(again).transpose(0, 3, 1, 2))


def _as_torch(pixels: np.ndarray) -> torch.Tensor:
    """View uint8 [1, 3, height, width] of DALI's pixels [height, width, 3]."""
    pixels = pixels if pixels.flags.writeable else pixels.copy()
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def apply_orientation(image: torch.Tensor, turn: int) -> torch.Tensor:
    """Turn an image [1, 3, height, width] upright, from EXIF orientation `turn` (1 to 8)."""
    if turn in (5, 6, 7, 8):
        image = image.transpose(2, 3)
    flips = {2: (3,), 3: (2, 3), 4: (2,), 6: (3,), 7: (2, 3), 8: (2,)}.get(turn, ())
    # Resizing is faster with channels last.
    return image.flip(flips).contiguous(memory_format=torch.channels_last) if turn in UPRIGHT else image


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize uint8 [1, 3, h, w] to [3, height, width]: bicubic and antialiased, as Pillow does."""
    if image.shape[2:] == (height, width):  # copy without filtering, as Pillow does
        return image[0].contiguous()
    return interpolate(image, (height, width), mode="bicubic", antialias=True)[0].contiguous()


@lru_cache(maxsize=4)
def _shared(tile_size: int, apply_exif: bool) -> DaliDecoder:
    return DaliDecoder(tile_size=tile_size, apply_exif=apply_exif)


def load_tiles(
    source: Source,
    cols: int,
    rows: int,
    *,
    tile_size: int = 448,
    thumbnail: bool,
    jpeg_augment: random.Random | None = None,
    apply_exif: bool = True,
) -> np.ndarray:
    """`decode_pil.load_tiles` on DALI's CPU backend, with one decoder per process and setting."""
    decoder = _shared(tile_size, apply_exif)
    return decoder.load_tiles(source, cols, rows, thumbnail=thumbnail, jpeg_augment=jpeg_augment)


__all__ = ["BadSample", "DaliDecoder", "apply_orientation", "load_tiles", "resize"]
