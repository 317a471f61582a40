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


# Greatest difference of 255; the mean is at most MEAN. Measured on an H100, mean and greatest
# (benchmarks/results/gpu_parts-2026-11-26.md): without JPEG 0.18 and 1, which is the resize, as on CPU; JPEG 0.15 to
# 0.19 and 1 to 3, because nvJPEG rounds the inverse transform otherwise. Chroma upsampled as nvJPEG does by default
# must exceed them: 0.47 and 6.
MOST = {"JPEG": 5, "MPO": 5, "PNG": 2, "BMP": 2}
MEAN = 0.3


@pytest.mark.parametrize("kind", MOST)
@pytest.mark.parametrize("size,grid", [((640, 480), (2, 2)), ((300, 900), (1, 3)), ((448, 448), (1, 1))])
def test_tiles_equal_pillows_nearly(pipeline, kind, size, grid) -> None:
    more = {"save_all": True, "append_images": [Image.new("RGB", (60, 40))]} if kind == "MPO" else {}
    image = EncodedImage(picture(*size, kind, **more), *grid, True)
    found = pipeline.cut([Wanted.whole(image)]).cpu().numpy().astype(int)
    difference = np.abs(found - load_tiles(image.data, *grid, thumbnail=True))
    assert difference.max() <= MOST[kind] and difference.mean() < MEAN, (difference.max(), difference.mean())


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns(pipeline, turn) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    image = EncodedImage(picture(640, 480, "PNG", exif=exif), 2, 1, True, turn)
    found = pipeline.cut([Wanted.whole(image)]).cpu().numpy().astype(int)
    assert np.abs(found - load_tiles(image.data, 2, 1, thumbnail=True)).max() <= MOST["PNG"]


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


def test_decoders_that_are_missing_here_are_named_before_the_first_batch() -> None:
    """JPEG files, which the GPU decodes, are never among them; the pipeline works afterwards."""
    pipeline = TilePipeline(0, 448)
    missing = pipeline.missing_decoders()
    assert not any(form == "JPEG" for form, _ in missing), missing
    pipeline.cut([Wanted.whole(EncodedImage(picture(640, 480, "JPEG"), 2, 2, True))])
    assert not pipeline.fallbacks and not pipeline.blank
    pipeline.close()
