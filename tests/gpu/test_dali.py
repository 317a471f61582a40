"""DALI's decoder on the GPU against Pillow."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
pytest.importorskip("nvidia.dali")

from megatron_internvlx.data.decode_dali import DaliDecoder  # noqa: E402
from megatron_internvlx.data.decode_pil import load_tiles  # noqa: E402


def picture(width: int, height: int, kind: str) -> bytes:
    """A smooth image with an edge and some noise."""
    y, x = np.mgrid[:height, :width]
    channels = [(np.sin(x / 37 + c) + np.cos(y / 23 - c)) * 60 + 128 for c in range(3)]
    pixels = np.stack(channels, axis=-1) + np.random.default_rng(0).normal(0, 4, (height, width, 3))
    pixels[height // 3 :, width // 2 :] *= 0.5
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, kind, quality=92)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size,grid", [((640, 480), (2, 2)), ((300, 900), (1, 3)), ((448, 448), (1, 1))])
def test_tiles_equal_pillows_nearly(kind: str, size: tuple[int, int], grid: tuple[int, int]) -> None:
    """The GPU's JPEG decoder may round an inverse transform otherwise; resizing is the same kernel as on CPU."""
    data = picture(*size, kind)
    found = DaliDecoder("mixed").load_tiles(data, *grid, thumbnail=True).astype(int)
    wanted = load_tiles(data, *grid, thumbnail=True).astype(int)
    difference = np.abs(found - wanted)
    assert difference.max() <= 12 and difference.mean() < 0.6, (difference.max(), difference.mean())
