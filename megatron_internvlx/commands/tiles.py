"""`ivlx tiles`: how RVTC cuts an image into tiles under each policy, with the number of visual tokens."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_internvlx.commands.help import CommandParser
from megatron_internvlx.commands.tile_cuts import cut_image, table
from megatron_internvlx.commands.values import float_in_range, int_in_range
from megatron_internvlx.exit_codes import DONE, MISTAKE


def parser() -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    it = CommandParser(
        "tiles",
        "Draw how RVTC cuts an image into tiles under each policy, with the number of visual tokens.",
        about="The picture has a row per policy: the image resized for the grid, the grid's lines, and the thumbnail. "
        "The numbers are printed as a table.",
        examples=(
            "ivlx tiles photo.jpg",
            "ivlx tiles scan.png --max-tiles 6 --no-thumbnail --out scan_tiles.png",
        ),
    )
    add = it.add_argument
    add("image", type=Path, help="image file of any format that Pillow reads")
    add("--out", type=Path, metavar="FILE", default=Path("tiles.png"), help="PNG to write")
    add = it.add_argument_group("Tiles").add_argument
    add("--tile-size", type=int_in_range(1, 65_536), default=448, help="side of a tile in pixels")
    add("--min-tiles", type=int_in_range(0, 4096), default=1, help="least number of tiles")
    add("--max-tiles", type=int_in_range(0, 4096), default=12, help="most tiles, not counting the thumbnail")
    add(
        "--thumbnail",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the whole image as one more tile",
    )
    add = it.add_argument_group("Tokens").add_argument
    add("--patch", type=int_in_range(0, 4096), default=14, help="patch side of the vision encoder, in pixels")
    add("--low-ratio", type=float_in_range(0, 1), default=0.25, help="tokens per patch side, shallow layers")
    add("--high-ratio", type=float_in_range(0, 1), default=0.5, help="tokens per patch side, deep layers")
    return it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parser().parse_args(argv)
    from megatron_internvlx.commands.tile_page import draw_page, open_image

    try:
        image = open_image(options.image)
        cuts = cut_image(image.size, options)
        title = (
            f"{options.image.name}   {image.width} x {image.height} pixels,"
            f" tiles of {options.tile_size}, at most {options.max_tiles}"
        )
        draw_page(image, cuts, title).save(options.out, format="PNG")
    except (ValueError, OSError) as error:
        print(f"ivlx tiles: {error}", file=sys.stderr)
        return MISTAKE
    print(table(cuts))
    print(f"drawn in {options.out}")
    return DONE
