"""The grid of an image under each RVTC policy, its tiles and its visual tokens."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_internvlx.data.rvtc import MEANINGS, POLICIES, tile_count, tile_grid


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
    lines = ["policy   grid (cols x rows)   thumbnail   tiles   tokens shallow   tokens deep   rule"]
    for cut in cuts:
        thumbnail = "yes" if cut.thumbnail else "no"
        lines.append(
            f"{cut.policy:<8} {f'{cut.cols} x {cut.rows}':<20} {thumbnail:<11} {cut.tiles:>5}"
            f" {cut.shallow:>16} {cut.deep:>13}   {MEANINGS[cut.policy]}"
        )
    return "\n".join(lines)
