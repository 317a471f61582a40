"""The picture of `ivlx tiles`: a row per policy with the grid, its lines and the thumbnail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from megatron_internvlx.commands.tile_cuts import Cut

MARGIN, GAP, TEXT_WIDTH = 32, 24, 300
PICTURE_WIDTH = 560  # maximum width of one policy's resized image, in pixels
PICTURE_HEIGHT = 340
# Pillow's default font has no multiplication sign, so the page uses x.
INK, FAINT, PAPER = (33, 37, 41), (108, 117, 125), (255, 255, 255)


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
