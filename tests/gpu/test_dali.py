"""The pipeline that cuts tiles, on the GPU, against Pillow and against itself."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
pytest.importorskip("nvidia.dali")

from megatron_internvlx.data.dali_pipeline import TilePipeline  # noqa: E402
from megatron_internvlx.data.decode_pil import load_tiles  # noqa: E402
from megatron_internvlx.data.encoded import EncodedImage, Wanted  # noqa: E402


@pytest.fixture(scope="module")
def pipeline():
    made = TilePipeline(0, 448)
    yield made
    made.close()


def picture(width: int, height: int, kind: str, **options) -> bytes:
    """A smooth image with an edge and some noise."""
    y, x = np.mgrid[:height, :width]
    channels = [(np.sin(x / 37 + c) + np.cos(y / 23 - c)) * 60 + 128 for c in range(3)]
    pixels = np.stack(channels, axis=-1) + np.random.default_rng(0).normal(0, 4, (height, width, 3))
    pixels[height // 3 :, width // 2 :] *= 0.5
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, kind, quality=92, **options)
    return file.getvalue()


# Greatest difference of 255. PNG: the resize alone. JPEG: also the inverse transform, which nvJPEG rounds otherwise.
@pytest.mark.parametrize("kind,most", [("JPEG", 12), ("PNG", 12)])
@pytest.mark.parametrize("size,grid", [((640, 480), (2, 2)), ((300, 900), (1, 3)), ((448, 448), (1, 1))])
def test_tiles_equal_pillows_nearly(pipeline, kind, most, size, grid) -> None:
    image = EncodedImage(picture(*size, kind), *grid, True)
    found = pipeline.cut([Wanted.whole(image)]).cpu().numpy().astype(int)
    difference = np.abs(found - load_tiles(image.data, *grid, thumbnail=True))
    assert difference.max() <= most and difference.mean() < 0.6, (difference.max(), difference.mean())


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns(pipeline, turn) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    image = EncodedImage(picture(640, 480, "PNG", exif=exif), 2, 1, True, turn)
    found = pipeline.cut([Wanted.whole(image)]).cpu().numpy().astype(int)
    assert np.abs(found - load_tiles(image.data, 2, 1, thumbnail=True)).max() <= 12


def test_the_same_gpu_gives_the_same_tiles_twice(pipeline) -> None:
    wanted = [Wanted.whole(EncodedImage(picture(500 + 40 * n, 400, "JPEG"), 2, 2, True)) for n in range(12)]
    first = pipeline.cut(wanted)
    assert all(torch.equal(first, pipeline.cut(wanted)) for _ in range(3))
    assert torch.equal(first[:5], pipeline.cut(wanted[:1]))  # whatever else is in the batch


def test_a_broken_image_costs_only_itself(pipeline) -> None:
    good = EncodedImage(picture(640, 480, "JPEG"), 2, 2, True)
    broken = EncodedImage(good.data[:300], 1, 1, True)
    before = pipeline.cut([Wanted.whole(good)])
    found = pipeline.cut([Wanted.whole(image) for image in (good, broken, good)])
    assert torch.equal(found, torch.cat([before, torch.zeros_like(before[:1]), before]))
    assert sum(pipeline.blank.values()) == 1
