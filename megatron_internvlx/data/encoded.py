"""Which undecoded images may travel to the GPU that cuts them, seen from their headers and their ends.

A GPU decodes long after a micro-batch was planned, when nothing can leave it any more. So a file goes there only
if it is whole: its header read, its parts in place, its checksums right. Of any other file Pillow, in the data worker
and before planning, says whether it is a sample or a reject. Then verdicts, and with them order and plans, are
Pillow's whatever decodes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image

from megatron_internvlx.data.decode_pil import opened, orientation
from megatron_internvlx.data.jpeg_file import is_whole_jpeg
from megatron_internvlx.data.rvtc import tile_count
from megatron_internvlx.data.sample import ImageTiles

# What DALI decodes bit for bit as Pillow does on CPU; GIF and AVIF it cannot read.
_FORMATS = frozenset({"JPEG", "PNG", "WEBP", "BMP", "TIFF"})
# 16 bits: DALI scales, Pillow clips or cuts. TIFF of other kinds: compressions differ between the two.
_MODES = frozenset({"L", "LA", "RGB", "RGBA", "P", "CMYK", "1"})
# 96 MiB of RGB: a GPU holds several decoded images beside the model.
HUGE_PIXELS = 1 << 25

_TIFF_TURN = 0x0112

# Reasons why Pillow cuts an image, in a fixed order, which lets ranks add up their counts.
FALLBACKS = (
    "format",
    "mode",
    "16-bit",
    "TIFF",
    "frames",
    "not whole",
    "kinds",
    "extended",
    "huge",
    "augmentation",
)
FAILED = "DALI failed"


@dataclass(frozen=True)
class EncodedImage:
    """A whole, undecoded file, its grid and the EXIF orientation (1 to 8) from which it is turned upright."""

    data: bytes
    cols: int
    rows: int
    thumbnail: bool
    turn: int = 1

    @property
    def num_tiles(self) -> int:
        """Tiles with the thumbnail."""
        return tile_count(self.cols, self.rows, thumbnail=self.thumbnail)


# An image of a micro-batch: to be decoded where its tiles are encoded, or tiles uint8 [T, 3, S, S] already.
PackImage = EncodedImage | torch.Tensor


def fallback_counts(reasons: Mapping[str, int]) -> list[int]:
    """Images per entry of `FALLBACKS`, and behind them those of other reasons."""
    counts = [0] * (len(FALLBACKS) + 1)
    for reason, count in reasons.items():
        counts[next((i for i, kind in enumerate(FALLBACKS) if kind in reason), len(FALLBACKS))] += count
    return counts


def encoded(data: bytes, image: ImageTiles, *, apply_exif: bool) -> EncodedImage | str:
    """The file, ready to travel, or why Pillow must decode it here. BadSample if its header is broken."""
    with opened(data) as header:
        reason = unsupported(header) or doubtful(data, header)
        if reason is not None:
            return reason
        if header.width * header.height > HUGE_PIXELS:
            return "huge"
        turn = orientation(header) if apply_exif else 1
    return EncodedImage(data, image.cols, image.rows, image.thumbnail, turn if 1 <= turn <= 8 else 1)


def unsupported(image: Image.Image) -> str | None:
    """Why DALI must not decode this image, None if it may."""
    if image.format not in _FORMATS:
        return f"format {image.format}"
    if image.mode not in _MODES:
        return f"mode {image.mode}"
    # Pillow reads 16-bit colours as 8-bit modes; only the decoder it chose tells.
    if image.format == "PNG" and any("16B" in str(tile) for tile in getattr(image, "tile", ())):
        return "16-bit PNG"
    if image.format == "TIFF" and image.mode != "RGB":
        return f"TIFF of mode {image.mode}"
    if getattr(image, "n_frames", 1) > 1:
        return "several frames"
    return None


def doubtful(data: bytes, image: Image.Image) -> str | None:
    """What is wrong with a file whose header is ``image``, None if nothing. May raise what its decoding raises."""
    if image.format in ("JPEG", "PNG"):
        whole = is_whole_jpeg(data) if image.format == "JPEG" else _is_whole_png(data)
        return None if whole else f"{image.format} not whole"
    # Only decoding tells of the others, of which WebP alone takes time, and which no GPU decodes anyway.
    if image.format == "WEBP" and data[15:16] == b"X":
        return "extended WEBP"  # unknown to DALI
    tags = getattr(image, "tag_v2", {})
    if image.info.get("compression", 0) not in (0, "raw") or tags.get(_TIFF_TURN, 1) != 1:
        return f"{image.format} of other kinds"
    image.load()
    return None


def _is_whole_png(data: bytes) -> bool:
    """Every chunk has its checksum, up to IEND."""
    place, pixels = 8, False
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        end = place + 8 + length
        if end + 4 > len(data):
            return False
        if zlib.crc32(memoryview(data)[place + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        kind = data[place + 4 : place + 8]
        pixels = pixels or kind == b"IDAT"
        if kind == b"IEND":
            return pixels
        place = end + 4
    return False
