"""Decoder of a loader process: cuts an image into tiles, or keeps the file whole for a GPU."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_internvlx import platform
from megatron_internvlx.config import DataSettings
from megatron_internvlx.data import decode_pil
from megatron_internvlx.data.encoded import EncodedImage, encoded
from megatron_internvlx.data.file_kinds import Kind
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.data.sample import ImageTiles

DECODERS = ("dali", "pillow")


def ranks_cut(data: DataSettings, *, on_gpu: bool | None = None) -> bool:
    """Whether images travel undecoded to the ranks that encode their tiles.

    Args:
        data: loader, decoder and place of decoding.
        on_gpu: whether the ranks have GPUs; None: as on this machine.
    """
    if data.loader != "energon" or data.image_decoder != "dali":
        return False
    gpu = platform.backend() == "nccl" if on_gpu is None else on_gpu
    return data.decode_at == "rank" or (data.decode_at == "auto" and gpu)


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadSample(str(path), "missing_image", f"{error.strerror}: {path}") from error


class TileDecoder:
    """Decoder from bytes or path of an image to tiles uint8 [T, 3, S, S], or with `travel` to the file. Picklable.

    Args:
        name: dali or pillow.
        tile_size: side of a tile, in pixels.
        apply_exif: whether images are turned upright.
        travel: keep files whole if a GPU can cut them; Pillow cuts the others here.
        lacking: with `travel`, kinds of files for which DALI has no decoder on some rank; Pillow cuts them here.

    `fallbacks` counts per reason the images that Pillow cut instead of DALI.
    """

    def __init__(
        self,
        name: str,
        *,
        tile_size: int,
        apply_exif: bool = True,
        travel: bool = False,
        lacking: frozenset[Kind] = frozenset(),
    ):
        if name not in DECODERS:
            raise ValueError(f"unknown image decoder {name!r}; choose one of {', '.join(DECODERS)}")
        if travel and name != "dali":
            raise ValueError(f"only DALI cuts images on a GPU, and the decoder is {name}")
        self.name, self.tile_size, self.apply_exif, self.travel = name, tile_size, apply_exif, travel
        self.lacking = lacking
        self.fallbacks: Counter[str] = Counter()
        self._dali: Any = None

    def __call__(
        self, source: decode_pil.Source, image: ImageTiles, jpeg_augment: random.Random | None
    ) -> np.ndarray | EncodedImage:
        """Tiles of `image`, or the file for the GPU. Raises BadSample if it is broken."""
        if self.travel:
            return self._keep_whole(source, image, jpeg_augment)
        if self.name == "pillow":
            return self._cut_with_pillow(source, image, jpeg_augment)
        return self._decoder().load_tiles(
            source, image.cols, image.rows, thumbnail=image.thumbnail, jpeg_augment=jpeg_augment
        )

    def _keep_whole(
        self, source: decode_pil.Source, image: ImageTiles, jpeg_augment: random.Random | None
    ) -> np.ndarray | EncodedImage:
        reason = "JPEG augmentation"
        if jpeg_augment is None:
            data = source if isinstance(source, bytes) else _read(source)
            found = encoded(data, image, apply_exif=self.apply_exif, lacking=self.lacking)
            if isinstance(found, EncodedImage):
                return found
            reason = found
        tiles = self._cut_with_pillow(source, image, jpeg_augment)
        self.fallbacks[reason] += 1  # not for a broken image, which is a reject
        return tiles

    def _cut_with_pillow(
        self, source: decode_pil.Source, image: ImageTiles, jpeg_augment: random.Random | None
    ) -> np.ndarray:
        return decode_pil.load_tiles(
            source,
            image.cols,
            image.rows,
            tile_size=self.tile_size,
            thumbnail=image.thumbnail,
            jpeg_augment=jpeg_augment,
            apply_exif=self.apply_exif,
        )

    def take_fallbacks(self) -> dict[str, int]:
        """Return the counts since the last call, and reset them."""
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
