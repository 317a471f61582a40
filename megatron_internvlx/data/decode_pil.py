"""Reference decoder: cuts an image file into tiles with Pillow, as the released `dynamic_preprocess` does.

The whole image is stretched (bicubic, antialiased) to the grid's size and cut row by row; the thumbnail is
a second resize of the original. Alpha is dropped, not blended.
"""

import io
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_internvlx.data.rejects import BadSample

Source = str | Path | bytes

# Limit at which Pillow warns: a quarter of a gigabyte of RGB. Pillow raises only at twice as many.
MAX_PIXELS = 89_478_485

_ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _cause(error: Exception) -> str:
    text = str(error).lower()
    if any(sign in text for sign in ("truncated", "broken data stream", "premature end")):
        return "truncated_image"
    return "unreadable_image"


@contextmanager
def read_header(source: Source) -> Iterator[Image.Image]:
    """Open an image, reading only its header. Any error, also in the `with` block, becomes a BadSample."""
    name = f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)
    if isinstance(source, bytes):
        file: str | io.BytesIO = io.BytesIO(source)
    else:
        file = str(source)
        if not os.path.isfile(file):  # noqa: PTH113 (a third of the time of Path.is_file)
            what = "it is not a file" if os.path.exists(file) else "no such file"  # noqa: PTH110
            raise BadSample(name, "missing_image", f"{what}: {name}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels, limit {MAX_PIXELS}")
            yield image
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample(name, "bomb", f"too large to decode: {error}") from error
    except Exception as error:  # plugins raise errors of nearly any class on broken data
        raise BadSample(name, _cause(error), f"{type(error).__name__}: {error}") from error


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8, without decoding the pixels."""
    # EXIF after the pixels of a PNG file is ignored, because reading it would decode them.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # the pixels may be good although EXIF is unreadable
        return 1


def image_size(source: Source, *, apply_exif: bool = True) -> tuple[int, int]:
    """Width and height in pixels, read from the header; upright if `apply_exif`.

    Raises BadSample (missing_image, unreadable_image, bomb) named by the path.
    """
    with read_header(source) as image:
        turned = apply_exif and orientation(image) >= 5
        return (image.height, image.width) if turned else (image.width, image.height)


def reencode(tile: np.ndarray, rng: random.Random) -> np.ndarray:
    """Re-encode a tile uint8 [S, S, 3] as JPEG, with a quality drawn from 75..100."""
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, format="JPEG", quality=rng.randint(75, 100))
    return np.asarray(Image.open(buffer).convert("RGB"))


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
    """Tiles uint8 [T, 3, tile_size, tile_size], row by row, the thumbnail last (not for a 1x1 grid).

    Args:
        source: path or bytes of the file.
        cols: columns of the grid.
        rows: rows of the grid.
        tile_size: side of a tile, in pixels.
        thumbnail: whether the whole image is added as a last tile.
        jpeg_augment: generator of the quality, uniform in 75..100, with which each tile is re-encoded as JPEG (the
            released augmentation of training sets); None: no augmentation.
        apply_exif: whether the image is turned upright, which the released code does not do; the grid must be that of
            the size after turning.

    Raises BadSample (missing_image, truncated_image, unreadable_image, bomb) named by the path.
    """
    if min(cols, rows, tile_size) < 1:
        raise ValueError(f"cols {cols}, rows {rows} and tile_size {tile_size} must be at least 1")
    with read_header(source) as image:
        turn = UPRIGHT.get(orientation(image)) if apply_exif else None
        pixels = image.convert("RGB")
        if turn is not None:
            pixels = pixels.transpose(turn)
        whole = np.asarray(pixels.resize((cols * tile_size, rows * tile_size)))
        tiles = whole.reshape(rows, tile_size, cols, tile_size, 3).swapaxes(1, 2)
        tiles = tiles.reshape(rows * cols, tile_size, tile_size, 3)
        if thumbnail and cols * rows > 1:
            tiles = np.concatenate([tiles, np.asarray(pixels.resize((tile_size, tile_size)))[None]])
        if jpeg_augment is not None:
            tiles = np.stack([reencode(np.ascontiguousarray(tile), jpeg_augment) for tile in tiles])
    return np.ascontiguousarray(tiles.transpose(0, 3, 1, 2))
