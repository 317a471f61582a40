"""Tiles against the uint8 tiles of the released image path, and against its recipe written out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_internvlx.data.decode_pil import image_size, load_tiles
from megatron_internvlx.data.normalize import normalize_tiles
from megatron_internvlx.data.rvtc import POLICIES, tile_grid

RVTC = Path(__file__).parents[1] / "golden" / "rvtc"


def test_golden_tiles_are_equal_byte_for_byte():
    image = RVTC / "a_500x400.png"
    cols, rows = tile_grid(*image_size(image))
    golden = np.load(RVTC / "tiles_a_500x400_rvtc.npz")["tiles"].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(load_tiles(image, cols, rows, thumbnail=True), golden)


@pytest.mark.parametrize("name", ["a_500x400.png", "c_300x200.png", "f_640x960.png"])
@pytest.mark.parametrize("policy", POLICIES)
def test_tiles_follow_the_released_recipe(name, policy):
    size = 112
    cols, rows = tile_grid(*image_size(RVTC / name), policy=policy, max_tiles=6, tile_size=448)
    image = Image.open(RVTC / name).convert("RGB")
    stretched = image.resize((cols * size, rows * size))
    recipe = []
    for index in range(cols * rows):
        left, top = index % cols * size, index // cols * size
        recipe.append(np.asarray(stretched.crop((left, top, left + size, top + size))))
    if cols * rows != 1:
        recipe.append(np.asarray(image.resize((size, size))))
    tiles = load_tiles(RVTC / name, cols, rows, tile_size=size, thumbnail=True)
    np.testing.assert_array_equal(tiles, np.stack(recipe).transpose(0, 3, 1, 2))


def test_normalization_equals_to_tensor_and_normalize():
    from torchvision import transforms

    tiles = load_tiles(RVTC / "a_500x400.png", 1, 1, thumbnail=True)
    reference = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )(Image.fromarray(tiles[0].transpose(1, 2, 0)))
    ours = normalize_tiles(torch.from_numpy(tiles), torch.float32)
    torch.testing.assert_close(ours[0], reference, rtol=0, atol=0)
    assert normalize_tiles(torch.from_numpy(tiles), torch.bfloat16).dtype == torch.bfloat16
