"""Properties of the tile grid and its errors."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.rvtc import sizes
from megatron_internvlx.data.rvtc import POLICIES, stored_policy, tile_count, tile_grid, tile_limit

SIDES = st.integers(1, 6000)
MOST = st.integers(1, 40)


def grids(width: int, height: int, **limits: int) -> dict[str, tuple[int, int]]:
    return {policy: tile_grid(width, height, policy=policy, **limits) for policy in POLICIES}


@given(SIDES, SIDES, MOST, st.integers(1, 40), st.booleans())
@example(896, 449, 12, 1, True)
@example(450, 450, 12, 1, True)
def test_a_stricter_rule_never_takes_more_tiles(
    width: int, height: int, most: int, least: int, thumbnail: bool
) -> None:
    """Proof: a lower limit leaves the first grids of the search, and what it then finds is not larger."""
    found = grids(width, height, min_tiles=least, max_tiles=most)
    off, edge, area = (tile_count(*found[policy], thumbnail=thumbnail) for policy in ("off", "edge", "area"))
    assert area <= edge <= off


@given(SIDES, SIDES, MOST, st.integers(1, 40))
def test_a_grid_is_within_its_limits(width: int, height: int, most: int, least: int) -> None:
    for policy, (cols, rows) in grids(width, height, min_tiles=least, max_tiles=most).items():
        limit = most
        if policy != "off":
            limit = min(most, tile_limit(width, height, tile_size=448, policy=policy))
        assert least <= cols * rows <= limit if least <= limit else (cols, rows) == (1, 1)


@given(SIDES, SIDES, MOST)
def test_no_side_is_enlarged_past_its_next_whole_tile(width: int, height: int, most: int) -> None:
    """Proof: of two grids within the limit, the one inside both sides has the nearer aspect ratio."""
    found = grids(width, height, max_tiles=most)
    for cols, rows in (found["edge"], found["area"]):
        assert cols <= -(-width // 448)
        assert rows <= -(-height // 448)


@given(SIDES, SIDES)
def test_limits(width: int, height: int) -> None:
    edge, area = (tile_limit(width, height, tile_size=448, policy=p) for p in ("edge", "area"))
    assert 1 <= area <= edge
    assert (area - 1) * 448**2 < width * height <= area * 448**2
    cols, rows = edge // (whole := -(-height // 448)), whole
    assert cols * rows == edge
    assert (cols - 1) * 448 < width <= cols * 448


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        # It reaches into four tiles, and has the pixels of 2.4.
        ((800, 600), {"off": (4, 3), "edge": (2, 2), "area": (1, 1)}),
        ((1000, 1000), {"off": (3, 3), "edge": (3, 3), "area": (2, 2)}),
        ((1280, 720), {"off": (4, 2), "edge": (2, 1), "area": (2, 1)}),
        ((897, 449), {"off": (2, 1), "edge": (2, 1), "area": (2, 1)}),
        ((448, 448), {"off": (1, 1), "edge": (1, 1), "area": (1, 1)}),
        ((4000, 3000), {"off": (4, 3), "edge": (4, 3), "area": (4, 3)}),
    ],
)
def test_three_rules(size: tuple[int, int], expected: dict[str, tuple[int, int]]) -> None:
    assert grids(*size) == expected


def test_three_rules_cut_mixed_sizes_differently() -> None:
    """The table of docs/data.md, over the sizes of benchmarks/rvtc.py."""
    mean = {
        policy: sum(tile_count(*tile_grid(*size, policy=policy), thumbnail=True) for size in sizes()) / 2000
        for policy in POLICIES
    }
    assert {policy: f"{value:.2f}" for policy, value in mean.items()} == {
        "off": "10.29", "edge": "6.68", "area": "4.77",
    }  # fmt: skip


@pytest.mark.parametrize("version", [None, 1])
def test_stored_names_of_before(version: int | None) -> None:
    assert [stored_policy(name, version) for name in ("off", "area", "edge")] == ["off", "edge", "edge"]
    assert [stored_policy(name, 2) for name in POLICIES] == list(POLICIES)


def test_no_candidate_falls_back_to_one_tile():
    assert tile_grid(800, 600, min_tiles=7, max_tiles=6, policy="off") == (1, 1)
    assert tile_grid(800, 600, max_tiles=0) == (1, 1)
    assert tile_grid(100, 100, min_tiles=2, policy="edge") == (1, 1)
    assert tile_grid(100, 100, min_tiles=2, policy="off") != (1, 1)


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
    with pytest.raises(ValueError, match="off, edge, area"):
        tile_grid(10, 10, policy="auto")
    with pytest.raises(ValueError, match="tile_size is 0"):
        tile_grid(10, 10, tile_size=0)
    with pytest.raises(ValueError, match="max_tiles is -1"):
        tile_grid(10, 10, max_tiles=-1)


def test_thumbnail_counts_only_beside_a_real_grid():
    assert tile_count(1, 1, thumbnail=True) == 1
    assert tile_count(3, 2, thumbnail=True) == 7
    assert tile_count(3, 2, thumbnail=False) == 6
