"""Draw how RVTC cuts an image into tiles under each policy, with the number of visual tokens.

    python tools/show_tiles.py photo.jpg --tile-size 448 --max-tiles 12 --out tiles.png

The picture has one row per policy: the image resized for the grid, the grid lines, and the thumbnail. The numbers
are also printed as a table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from megatron_internvlx.commands.values import float_in_range, int_in_range
from megatron_internvlx.data.rvtc import POLICIES, tile_count, tile_grid

MARGIN, GAP, TEXT_WIDTH = 32, 24, 300
PICTURE_WIDTH = 560  # maximum width of one policy's resized image, in pixels
PICTURE_HEIGHT = 340
# Pillow's default font has no multiplication sign, so the page uses x.
INK, FAINT, PAPER = (33, 37, 41), (108, 117, 125), (255, 255, 255)


@dataclass(frozen=True)
class Cut:
    """Result of one policy for an image: grid, number of tiles with the thumbnail, tokens in both phases."""

    policy: str
    cols: int
    rows: int
    thumbnail: bool
    tiles: int
    shallow: int
    deep: int


def tokens_per_tile(tile_size: int, patch: int, ratio: float) -> int:
    """Number of visual tokens of a tile after projection: (patches per side x ratio) squared.

    Raises ValueError if the tile is not a whole number of patches, or the grid not a whole number of tokens.
    """
    if patch < 1:
        raise ValueError(f"--patch {patch}: must be a number of pixels, at least 1")
    side = tile_size / patch * ratio
    if tile_size % patch or side != int(side) or side < 1:
        raise ValueError(
            f"tile size {tile_size}, patch {patch} and ratio {ratio} give a grid of {side:g} tokens per side, "
            "which must be a whole number of at least 1: use a multiple of patch / ratio"
        )
    return int(side) ** 2


def cut_image(size: tuple[int, int], options: argparse.Namespace) -> list[Cut]:
    """Cut an image of `size` (width, height) under every policy."""
    if not 1 <= options.min_tiles <= options.max_tiles:
        raise ValueError(
            f"--min-tiles {options.min_tiles} must be at least 1 and at most --max-tiles {options.max_tiles}"
        )
    low = tokens_per_tile(options.tile_size, options.patch, options.low_ratio)
    high = tokens_per_tile(options.tile_size, options.patch, options.high_ratio)
    cuts = []
    for policy in POLICIES:
        cols, rows = tile_grid(
            *size,
            tile_size=options.tile_size,
            min_tiles=options.min_tiles,
            max_tiles=options.max_tiles,
            policy=policy,
        )
        tiles = tile_count(cols, rows, thumbnail=options.thumbnail)
        cuts.append(Cut(policy, cols, rows, tiles > cols * rows, tiles, tiles * low, tiles * high))
    return cuts


def table(cuts: Sequence[Cut]) -> str:
    """Format the cuts as a text table, one line per policy."""
    lines = ["policy   grid (cols x rows)   thumbnail   tiles   tokens shallow   tokens deep"]
    for cut in cuts:
        thumbnail = "yes" if cut.thumbnail else "no"
        lines.append(
            f"{cut.policy:<8} {f'{cut.cols} x {cut.rows}':<20} {thumbnail:<11} {cut.tiles:>5}"
            f" {cut.shallow:>16} {cut.deep:>13}"
        )
    return "\n".join(lines)


def _cut_line(page: ImageDraw.ImageDraw, ends: tuple[int, int, int, int]) -> None:
    # A black line with a white border is visible on every image.
    page.line(ends, fill=PAPER, width=6)
    page.line(ends, fill=INK, width=2)


def _draw_cut(page: ImageDraw.ImageDraw, canvas: Image.Image, image: Image.Image, cut: Cut, top: int) -> int:
    """Draw one policy's row at height `top`; returns its height in pixels."""
    # One scale for the whole row, so that tiles and thumbnail are comparable; small grids are not enlarged.
    side = min(PICTURE_WIDTH // cut.cols, PICTURE_HEIGHT // cut.rows, 220)
    width, height = cut.cols * side, cut.rows * side
    left = MARGIN + TEXT_WIDTH
    canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
    for column in range(cut.cols + 1):
        _cut_line(page, (left + column * side, top, left + column * side, top + height))
    for row in range(cut.rows + 1):
        _cut_line(page, (left, top + row * side, left + width, top + row * side))
    if cut.thumbnail:
        x = left + width + GAP
        canvas.paste(image.resize((side, side), Image.Resampling.BICUBIC), (x, top))
        page.rectangle((x, top, x + side, top + side), outline=FAINT, width=2)
        page.text((x, top + side + 6), "thumbnail", fill=FAINT, font=ImageFont.load_default(size=14))
        height = max(height, side + 26)
    lines = [
        f"{cut.cols} x {cut.rows} grid" + (" + thumbnail" if cut.thumbnail else ""),
        f"{cut.tiles} tile{'s' if cut.tiles > 1 else ''}",
        f"{cut.shallow:,} tokens in shallow layers",
        f"{cut.deep:,} tokens in deep layers",
    ]
    page.text((MARGIN, top), cut.policy, fill=INK, font=ImageFont.load_default(size=24))
    for number, line in enumerate(lines):
        page.text((MARGIN, top + 36 + 24 * number), line, fill=FAINT, font=ImageFont.load_default(size=16))
    return max(height, 36 + 24 * len(lines))


def draw_page(image: Image.Image, cuts: Sequence[Cut], title: str) -> Image.Image:
    """Draw a picture with a row for every cut."""
    width = MARGIN * 2 + TEXT_WIDTH + PICTURE_WIDTH + GAP + 220
    canvas = Image.new("RGB", (width, 120 + len(cuts) * (PICTURE_HEIGHT + 40)), PAPER)
    page = ImageDraw.Draw(canvas)
    page.text((MARGIN, 24), title, fill=INK, font=ImageFont.load_default(size=20))
    top = 76
    for cut in cuts:
        page.line((MARGIN, top - 12, width - MARGIN, top - 12), fill=(222, 226, 230))
        top += _draw_cut(page, canvas, image, cut, top + 4) + 36
    return canvas.crop((0, 0, width, top))


def open_image(path: Path) -> Image.Image:
    """Read an image, upright and in RGB. Raises ValueError if it is missing, damaged or not an image."""
    if not path.is_file():
        raise ValueError(f"{path}: {'a directory, not an image' if path.is_dir() else 'no such file'}")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"{path}: too large: must have at most {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
        ) from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: the image is damaged: {error}") from None


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--out", type=Path, default=Path("tiles.png"), help="PNG to write")
    parser.add_argument("--tile-size", type=int_in_range(1, 65_536), default=448, help="pixels")
    parser.add_argument("--min-tiles", type=int_in_range(0, 4096), default=1)
    parser.add_argument(
        "--max-tiles",
        type=int_in_range(0, 4096),
        default=12,
        help="maximum number of tiles, not counting the thumbnail",
    )
    parser.add_argument(
        "--patch", type=int_in_range(0, 4096), default=14, help="patch size of the vision model, in pixels"
    )
    parser.add_argument(
        "--low-ratio", type=float_in_range(0, 1), default=0.25, help="tokens per patch side, shallow layers"
    )
    parser.add_argument(
        "--high-ratio", type=float_in_range(0, 1), default=0.5, help="tokens per patch side, deep layers"
    )
    parser.add_argument("--thumbnail", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parse_args(argv)
    try:
        image = open_image(options.image)
        cuts = cut_image(image.size, options)
        title = (
            f"{options.image.name}   {image.width} x {image.height} pixels,"
            f" tiles of {options.tile_size}, at most {options.max_tiles}"
        )
        draw_page(image, cuts, title).save(options.out, format="PNG")
    except (ValueError, OSError) as error:
        print(f"show_tiles: {error}", file=sys.stderr)
        return 2
    print(table(cuts))
    print(f"drawn in {options.out}")
    return 0
