"""RVTC: the grid of tiles into which an image is cut, determined by its width and height.

The search is InternVL's `find_closest_aspect_ratio`. RVTC first limits the number of tiles: the paper states two rules,
by length and by area; the released code has the first (`dynamic_preprocess` of its dataset code). All sizes are in
pixels.
"""

from functools import lru_cache

POLICIES = ("off", "edge", "area")
MEANINGS = {
    "off": "InternVL's rule: max_tiles is the only limit, however small the image",
    "edge": "the released InternVL-X rule: at most the tiles that cover the image",
    "area": "at most the tiles that hold the image's pixels",
}
NAMES_VERSION = 2
"""Version of these names, stored with them. In version 1 the released rule was called `area`."""


def stored_policy(name: str, version: int | None) -> str:
    """Policy meant by a stored name; `version` is that of the names, None where none was stored."""
    return "edge" if name == "area" and (version or 1) == 1 else name


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(
                f"{name} is {value}; it must be at least 1 (sizes are in pixels, grids in tiles)"
            )


@lru_cache(maxsize=1024)
def _candidates(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int, float], ...]:
    """Every (cols, rows, cols/rows) with min_tiles <= cols * rows <= max_tiles, in order of area."""
    grids = [
        (cols, rows)
        for cols in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // cols + 1)
        if cols * rows >= min_tiles
    ]
    # The released code orders equal areas like a Python set, which does not affect the result if min_tiles
    # is 1. A fixed order makes the other cases reproducible.
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid))
    return tuple((cols, rows, cols / rows) for cols, rows in grids)


def tile_grid(
    width: int,
    height: int,
    *,
    tile_size: int = 448,
    min_tiles: int = 1,
    max_tiles: int = 12,
    policy: str = "edge",
) -> tuple[int, int]:
    """Grid `(cols, rows)` of tiles for an image of `width` x `height` pixels.

    InternVL's search takes the grid with the nearest aspect ratio among those of `min_tiles` to `max_tiles` tiles.
    `off` does nothing else; `edge` and `area` first lower `max_tiles` to `tile_limit`. Without any candidate, as
    where `min_tiles` is above the limit, the grid is 1x1.

    Raises ValueError for sizes below 1, negative `max_tiles` or an unknown policy.
    """
    _check_positive(width=width, height=height, tile_size=tile_size, min_tiles=min_tiles)
    if max_tiles < 0:
        raise ValueError(f"max_tiles is {max_tiles}; it must not be negative (0 gives one tile)")
    if policy not in POLICIES:
        raise ValueError(f"unknown RVTC policy {policy!r}; choose one of {', '.join(POLICIES)}")
    if policy != "off":
        max_tiles = min(max_tiles, tile_limit(width, height, tile_size=tile_size, policy=policy))

    aspect = width / height
    doubled_area = 2 * width * height
    tile_area = tile_size * tile_size
    best, best_distance = (1, 1), float("inf")
    for cols, rows, ratio in _candidates(min_tiles, max_tiles):
        distance = abs(aspect - ratio)
        # At equal distance choose the larger grid only if the image fills more than half of it.
        if distance < best_distance or (distance == best_distance and doubled_area > tile_area * cols * rows):
            best, best_distance = (cols, rows), distance
    return best


def tile_limit(width: int, height: int, *, tile_size: int, policy: str) -> int:
    """Number of tiles that `edge` or `area` allows an image at most, whatever `max_tiles` is.

    `edge`: those that cover the image at its own size, `ceil(width/S) * ceil(height/S)` with S the tile size. `area`:
    those that hold its pixels, `ceil(width * height / S^2)`, which is never more.
    """
    if policy == "edge":
        return -(-width // tile_size) * -(-height // tile_size)
    return -(-width * height // tile_size**2)


def tile_count(cols: int, rows: int, *, thumbnail: bool) -> int:
    """Number of tiles of a `cols` x `rows` grid, including the thumbnail, which every grid except 1x1 has."""
    _check_positive(cols=cols, rows=rows)
    return cols * rows + int(thumbnail and cols * rows > 1)
