"""Properties of the tile grid and its errors."""

import random

import pytest

from megatron_internvlx.data.rvtc import POLICIES, tile_count, tile_grid


def test_edge_never_upsamples_past_the_next_whole_tile():
    rng = random.Random(0)
    for _ in range(3000):
        width, height, most = rng.randint(1, 4000), rng.randint(1, 4000), rng.randint(1, 24)
        least = rng.randint(1, most)
        cols, rows = tile_grid(width, height, min_tiles=least, max_tiles=most, policy="edge")
        assert cols <= -(-width // 448)
        assert rows <= -(-height // 448)
        assert least <= cols * rows <= most or (cols, rows) == (1, 1)


def test_edge_equals_area_unless_min_tiles_forbids_the_nearer_grid():
    rng = random.Random(2)
    for _ in range(3000):
        width, height, most = rng.randint(1, 6000), rng.randint(1, 6000), rng.randint(1, 40)
        area, edge = (tile_grid(width, height, max_tiles=most, policy=p) for p in ("area", "edge"))
        assert area == edge
    assert tile_grid(2191, 1632, min_tiles=10, max_tiles=10, policy="area") == (2, 5)
    assert tile_grid(2191, 1632, min_tiles=10, max_tiles=10, policy="edge") == (5, 2)


def test_policies_only_ever_lower_the_number_of_tiles():
    rng = random.Random(1)
    for _ in range(500):
        width, height = rng.randint(1, 3000), rng.randint(1, 3000)
        area = tile_grid(width, height, policy="area")
        assert area[0] * area[1] <= -(-width // 448) * -(-height // 448)


def test_no_candidate_falls_back_to_one_tile():
    assert tile_grid(800, 600, min_tiles=7, max_tiles=6, policy="off") == (1, 1)
    assert tile_grid(800, 600, max_tiles=0) == (1, 1)
    assert tile_grid(100, 100, min_tiles=2, policy="edge") == (1, 1)


def test_released_example_of_the_tie_rule():
    assert tile_grid(633, 633) == (1, 1)
    assert tile_grid(634, 634) == (2, 2)


@pytest.mark.parametrize(
    ("size", "tile_size", "limits", "smaller", "larger"),
    [
        # As near to 1/4 as to 1/5, to 2/1 as to 5/2, to 3/1 as to 1/1.
        ((81, 360), 108, (1, 5), (1, 4), (1, 5)),
        ((306, 136), 102, (1, 10), (2, 1), (4, 2)),
        ((896, 448), 448, (3, 4), (3, 1), (2, 2)),
    ],
)
def test_exactly_half_of_a_grid_is_not_more_than_half(size, tile_size, limits, smaller, larger):
    """The released comparison is strict; none of its golden rows fills exactly half of a tied grid."""
    settings = {"min_tiles": limits[0], "max_tiles": limits[1], "policy": "off"}
    assert 2 * size[0] * size[1] == tile_size**2 * larger[0] * larger[1]
    assert tile_grid(*size, tile_size=tile_size, **settings) == smaller
    assert tile_grid(*size, tile_size=tile_size - 1, **settings) == larger


@pytest.mark.parametrize("sizes", [(0, 10), (10, -1)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        tile_grid(*sizes)


def test_bad_settings_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="off, area, edge"):
        tile_grid(10, 10, policy="auto")
    with pytest.raises(ValueError, match="tile_size is 0"):
        tile_grid(10, 10, tile_size=0)
    with pytest.raises(ValueError, match="max_tiles is -1"):
        tile_grid(10, 10, max_tiles=-1)
    assert POLICIES == ("off", "area", "edge")


def test_thumbnail_counts_only_beside_a_real_grid():
    assert tile_count(1, 1, thumbnail=True) == 1
    assert tile_count(3, 2, thumbnail=True) == 7
    assert tile_count(3, 2, thumbnail=False) == 6
