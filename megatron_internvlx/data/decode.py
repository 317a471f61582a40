"""The image decoder of a loader: DALI, or the Pillow reference, by name."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np

from megatron_internvlx.data import decode_pil
from megatron_internvlx.data.sample import ImageTiles

DECODERS = ("dali", "pillow")


class TileDecoder:
    """Bytes or path of an image -> tiles uint8 [T, 3, S, S]; pickles, and starts DALI at the first image.

    Args:
        name: dali or pillow.
        tile_size: side of a tile, in pixels.
        apply_exif: turn images upright.

    ``fallbacks`` counts the images that DALI left to Pillow, per reason.
    """

    def __init__(self, name: str, *, tile_size: int, apply_exif: bool = True):
        if name not in DECODERS:
            raise ValueError(f"unknown image decoder {name!r}; choose one of {', '.join(DECODERS)}")
        self.name, self.tile_size, self.apply_exif = name, tile_size, apply_exif
        self.fallbacks: Counter[str] = Counter()
        self._dali: Any = None

    def __call__(
        self, source: decode_pil.Source, image: ImageTiles, jpeg_augment: random.Random | None
    ) -> np.ndarray:
        """Tiles of ``image``; BadSample if it is broken."""
        if self.name == "pillow":
            return decode_pil.load_tiles(
                source,
                image.cols,
                image.rows,
                tile_size=self.tile_size,
                thumbnail=image.thumbnail,
                jpeg_augment=jpeg_augment,
                apply_exif=self.apply_exif,
            )
        return self._decoder().load_tiles(
            source, image.cols, image.rows, thumbnail=image.thumbnail, jpeg_augment=jpeg_augment
        )

    def take_fallbacks(self) -> dict[str, int]:
        """The counts since the last call, which start anew."""
        taken = dict(self.fallbacks)
        self.fallbacks.clear()
        return taken

    def _decoder(self) -> Any:
        if self._dali is None:
            # DALI takes a second to import, and each process needs a decoder of its own.
            from megatron_internvlx.data.decode_dali import DaliDecoder

            self._dali = DaliDecoder(tile_size=self.tile_size, apply_exif=self.apply_exif)
            self._dali.fallbacks = self.fallbacks
        return self._dali

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dali": None}
