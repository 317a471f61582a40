"""Checks whether an undecoded image may be sent to the GPU that cuts it, from its header and structure.

A GPU decodes long after a micro-batch is planned, when no sample can be removed any more. So only files that are
whole are sent: header readable, all parts present, checksums right. Any other file is decoded or rejected by Pillow,
in the data worker and before planning. So rejects, order and plans do not depend on the decoder.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image

from megatron_internvlx.data.decode_pil import orientation, read_header
from megatron_internvlx.data.file_kinds import Kind, format_of, kind_of
from megatron_internvlx.data.jpeg_file import is_whole_jpeg
from megatron_internvlx.data.rvtc import tile_count
from megatron_internvlx.data.sample import ImageTiles

# Formats that DALI decodes bit for bit as Pillow does on CPU; it cannot read GIF and AVIF.
_FORMATS = frozenset({"JPEG", "PNG", "WEBP", "BMP", "TIFF"})
# 16 bits: DALI scales, Pillow clips or cuts. TIFF of other kinds: compressions differ between the two.
_MODES = frozenset({"L", "LA", "RGB", "RGBA", "P", "CMYK", "1"})
# 96 MiB of RGB: a GPU holds several decoded images beside the model.
HUGE_PIXELS = 1 << 25

_TIFF_TURN = 0x0112

# Reasons why Pillow cuts an image, in a fixed order, so that ranks can add their counts. A reason is counted under the
# first entry that it contains.
NO_DECODER = "no decoder"
FALLBACKS = (
    NO_DECODER,
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
    """Whole, undecoded file with its grid in tiles and its EXIF orientation (1 to 8, 1 is upright)."""

    data: bytes
    cols: int
    rows: int
    thumbnail: bool
    turn: int = 1

    @property
    def num_tiles(self) -> int:
        """Number of tiles, including the thumbnail."""
        return tile_count(self.cols, self.rows, thumbnail=self.thumbnail)


@dataclass(frozen=True)
class Wanted:
    """Request for `count` tiles of an image, from tile `first` on."""

    image: EncodedImage
    first: int
    count: int

    @classmethod
    def whole(cls, image: EncodedImage) -> Wanted:
        """Request for all tiles of an image, including the thumbnail."""
        return cls(image, 0, image.num_tiles)


# Image of a micro-batch: a file that the rank which encodes it decodes, or tiles uint8 [T, 3, S, S].
PackImage = EncodedImage | torch.Tensor


def fallback_counts(reasons: Mapping[str, int]) -> list[int]:
    """Images per entry of `FALLBACKS`; last, those of other reasons."""
    counts = [0] * (len(FALLBACKS) + 1)
    for reason, count in reasons.items():
        counts[next((i for i, kind in enumerate(FALLBACKS) if kind in reason), len(FALLBACKS))] += count
    return counts


def no_decoder(kind: Kind) -> str:
    """Reason of images of a kind that DALI cannot decode on this machine."""
    return f"{NO_DECODER} for {kind[0]}"


def encoded(
    data: bytes, image: ImageTiles, *, apply_exif: bool, lacking: frozenset[Kind] = frozenset()
) -> EncodedImage | str:
    """File that may be sent to the GPU, or the reason why Pillow must decode it here.

    Args:
        data: contents of the file.
        image: grid to which it is cut.
        apply_exif: whether it is turned upright.
        lacking: kinds of files for which DALI has no decoder on some rank.

    Raises BadSample if its header is broken.
    """
    with read_header(data) as header:
        reason = unsupported(header) or doubtful(data, header)
        if reason is not None:
            return reason
        if header.width * header.height > HUGE_PIXELS:
            return "huge"
        if kind_of(header) in lacking:
            return no_decoder(kind_of(header))
        turn = orientation(header) if apply_exif else 1
    return EncodedImage(data, image.cols, image.rows, image.thumbnail, turn if 1 <= turn <= 8 else 1)


def unsupported(image: Image.Image) -> str | None:
    """Reason why DALI must not decode this image, None if it may."""
    form = format_of(image)
    if form not in _FORMATS:
        return f"format {form}"
    if image.mode not in _MODES:
        return f"mode {image.mode}"
    # Pillow reads 16-bit colours as 8-bit modes; only its choice of decoder shows them.
    if form == "PNG" and any("16B" in str(tile) for tile in getattr(image, "tile", ())):
        return "16-bit PNG"
    if form == "TIFF" and image.mode != "RGB":
        return f"TIFF of mode {image.mode}"
    # Of several pictures in one MPO file, which phones write, both decoders see the first.
    if form != "JPEG" and getattr(image, "n_frames", 1) > 1:
        return "several frames"
    return None


def doubtful(data: bytes, image: Image.Image) -> str | None:
    """Defect of a file with header `image`, None if it has none. May raise the errors of decoding."""
    form = format_of(image)
    if form in ("JPEG", "PNG"):
        whole = is_whole_jpeg(data) if form == "JPEG" else _is_whole_png(data)
        return None if whole else f"{form} not whole"
    # The others must be decoded to be checked. Only WebP takes time, and no GPU decodes them.
    if form == "WEBP" and data[15:16] == b"X":
        return "extended WEBP"  # unknown to DALI
    tags = getattr(image, "tag_v2", {})
    if image.info.get("compression", 0) not in (0, "raw") or tags.get(_TIFF_TURN, 1) != 1:
        return f"{form} of other kinds"
    image.load()
    return None


def _is_whole_png(data: bytes) -> bool:
    """Whether every chunk up to IEND has the right checksum."""
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
