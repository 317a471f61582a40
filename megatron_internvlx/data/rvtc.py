"""RVTC: the grid of tiles into which an image is cut, determined by its width and height.

The search is InternVL's `find_closest_aspect_ratio`; the released InternVL-X first limits the number of
tiles by the area of the image (`dynamic_preprocess` of its dataset code). All sizes are in pixels.
"""

from functools import lru_cache

POLICIES = ("off", "area", "edge")


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
    policy: str = "area",
) -> tuple[int, int]:
    """Grid `(cols, rows)` of tiles for an image of `width` x `height` pixels.

    `policy`: `off` is InternVL's search for the nearest aspect ratio with at most `max_tiles` tiles;
    `area` (released InternVL-X) first limits `max_tiles` to `ceil(width/S) * ceil(height/S)`; `edge`
    also requires `cols <= ceil(width/S)` and `rows <= ceil(height/S)`, so that no edge is upsampled
    beyond its next whole tile. With `min_tiles` 1 both policies give the same grid, because of two grids
    within the area limit the one inside both edges always has the nearer aspect ratio. They differ only for
    a larger `min_tiles`. Without any candidate the grid is 1x1.

    Raises ValueError for sizes below 1, negative `max_tiles` or an unknown policy.
    """
    _check_positive(width=width, height=height, tile_size=tile_size, min_tiles=min_tiles)
    if max_tiles < 0:
        raise ValueError(f"max_tiles is {max_tiles}; it must not be negative (0 gives one tile)")
    if policy not in POLICIES:
        raise ValueError(f"unknown RVTC policy {policy!r}; choose one of {', '.join(POLICIES)}")
    col_cap = row_cap = max_tiles
    if policy != "off":
        cols_needed, rows_needed = -(-width // tile_size), -(-height // tile_size)
        max_tiles = min(max_tiles, cols_needed * rows_needed)
        if policy == "edge":
            col_cap, row_cap = cols_needed, rows_needed

    aspect = width / height
    doubled_area = 2 * width * height
    tile_area = tile_size * tile_size
    best, best_distance = (1, 1), float("inf")
    for cols, rows, ratio in _candidates(min_tiles, max_tiles):
        if cols > col_cap or rows > row_cap:
            continue
        distance = abs(aspect - ratio)
        # At equal distance choose the larger grid only if the image fills more than half of it.
        if distance < best_distance or (distance == best_distance and doubled_area > tile_area * cols * rows):
            best, best_distance = (cols, rows), distance
    return best


def tile_count(cols: int, rows: int, *, thumbnail: bool) -> int:
    """Number of tiles of a `cols` x `rows` grid, including the thumbnail, which every grid except 1x1 has."""
    _check_positive(cols=cols, rows=rows)
    return cols * rows + int(thumbnail and cols * rows > 1)
