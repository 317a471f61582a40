"""Normalization of tiles: shapes and refused input (values: tests/parity/test_tiles.py)."""

import pytest
import torch

from megatron_internvlx.data.normalize import normalize_tiles


def test_no_tiles_stay_no_tiles():
    assert normalize_tiles(torch.empty(0, 3, 8, 8, dtype=torch.uint8)).shape == (0, 3, 8, 8)


def test_input_is_left_as_it_is():
    tiles = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    normalize_tiles(tiles, torch.float32)
    assert (tiles == 255).all()


def test_floats_and_wrong_layouts_are_refused():
    with pytest.raises(ValueError, match="float32"):
        normalize_tiles(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"\[1, 2, 2, 3\]"):
        normalize_tiles(torch.zeros(1, 2, 2, 3, dtype=torch.uint8))
