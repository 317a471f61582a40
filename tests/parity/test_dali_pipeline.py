"""Tiles of the batched DALI pipeline against Pillow's; here on DALI's CPU backend, whose graph is that of a GPU.

Decoding is equal bit for bit, as in test_dali.py. DALI's resize is not Pillow's: it keeps fractions between its two
passes, where Pillow rounds. Measured here, of 255: 0.07 to 0.17 on average and 11 at most on photographs, 20 on
drawings with hard edges, 0.72 on average on a picture of one bit. A wrong kernel, turn or grid gives 2 and more.
"""

import numpy as np
import pytest
import torch

from megatron_internvlx.data.dali_graph import MOST_IMAGES
from megatron_internvlx.data.dali_pipeline import TilePipeline
from megatron_internvlx.data.decode_pil import image_size, load_tiles
from megatron_internvlx.data.encoded import EncodedImage, Wanted, encoded
from megatron_internvlx.data.rvtc import POLICIES, tile_grid
from megatron_internvlx.data.sample import ImageTiles
from tests.parity.test_dali import FILES, KINDS, photograph
from tests.parity.test_dali import encoded as written

SIZE = 56
# Greatest difference; on average, and for a picture of one bit.
MOST, MEAN, ROUGH_MEAN = 20, 0.3, 0.8


@pytest.fixture(scope="module")
def pipeline():
    made = TilePipeline(None, SIZE, threads=1)
    yield made
    made.close()


def ready(
    data: bytes, grid: tuple[int, int], *, apply_exif: bool = True, thumbnail: bool = True
) -> EncodedImage:
    image = encoded(data, ImageTiles("", 0, 0, *grid, thumbnail), apply_exif=apply_exif)
    assert isinstance(image, EncodedImage), image
    return image


def reference(image: EncodedImage, *, apply_exif: bool = True) -> np.ndarray:
    grid = (image.cols, image.rows)
    return load_tiles(image.data, *grid, tile_size=SIZE, thumbnail=image.thumbnail, apply_exif=apply_exif)


def difference(pipeline: TilePipeline, images: list[EncodedImage], **options: bool) -> list[np.ndarray]:
    """Absolute differences of each image's tiles, all cut in one batch."""
    tiles = pipeline.cut([Wanted.whole(image) for image in images])
    parts = tiles.split([image.num_tiles for image in images])
    return [
        np.abs(part.numpy().astype(int) - reference(image, **options))
        for part, image in zip(parts, images, strict=True)
    ]


def test_every_format_in_one_batch(pipeline):
    kinds = [kind for kind in KINDS if kind != "16bit.png"]
    images = [ready(data, tile_grid(*image_size(data), tile_size=SIZE)) for data in map(written, kinds)]
    assert [image.turn for image, kind in zip(images, kinds, strict=True) if kind.startswith("exif")] == [
        *range(1, 9)
    ]
    for kind, found in zip(kinds, difference(pipeline, images), strict=True):
        mean = ROUGH_MEAN if kind == "one_bit.png" else MEAN
        assert found.mean() < mean and found.max() <= MOST, (kind, found.mean(), found.max())


def test_photographs_and_drawings_by_every_policy(pipeline):
    for policy in POLICIES:
        images = []
        for path in FILES[1::4]:
            with open(path, "rb") as file:
                data = file.read()
            grid = tile_grid(*image_size(data), tile_size=SIZE, policy=policy)
            image = encoded(data, ImageTiles("", 0, 0, *grid, True), apply_exif=True)
            images += [image] if isinstance(image, EncodedImage) else []
        assert len(images) >= 6
        for found in difference(pipeline, images):
            assert found.mean() < MEAN and found.max() <= MOST, (policy, found.mean(), found.max())


def test_exif_can_be_ignored(pipeline):
    images = [ready(written(f"exif{turn}.jpg"), (2, 1), apply_exif=False) for turn in range(1, 9)]
    assert {image.turn for image in images} == {1}
    assert max(found.max() for found in difference(pipeline, images, apply_exif=False)) <= MOST


def test_every_grid_with_and_without_thumbnail(pipeline):
    data = written("444.jpg")
    grids = [(cols, rows) for cols in range(1, 13) for rows in range(1, 12 // cols + 1)]
    images = [ready(data, grid, thumbnail=flag) for grid in grids for flag in (True, False)]
    assert {image.num_tiles for image in images} == set(range(1, 14))
    assert max(found.max() for found in difference(pipeline, images)) <= MOST


def test_parts_of_images_are_those_of_the_whole(pipeline):
    image = ready(written("444.jpg"), (3, 2))
    whole = pipeline.cut([Wanted.whole(image)])
    assert len(whole) == 7
    parts = [Wanted(image, first, count) for first, count in ((0, 2), (2, 1), (3, 4), (6, 1))]
    assert torch.equal(pipeline.cut(parts), torch.cat([whole, whole[6:]]))


def test_batches_come_back_in_turn_and_may_be_larger_than_a_run(pipeline):
    images = [ready(written(kind), (1, 1)) for kind in ("444.jpg", "gray.jpg", "rgba.png")]
    large = [Wanted.whole(images[0])] * (MOST_IMAGES + 3) + [Wanted.whole(images[1])]
    expected = [pipeline.cut([Wanted.whole(image)]) for image in images]
    batches = [large, [Wanted.whole(images[2])], [], [Wanted.whole(images[1])]]
    for batch in batches:
        pipeline.start(batch)
    outs = [torch.empty((len(batch), 3, SIZE, SIZE), dtype=torch.uint8) for batch in batches]
    for out in outs:
        pipeline.collect(out)
    assert torch.equal(outs[0], torch.cat([*[expected[0]] * (MOST_IMAGES + 3), expected[1]]))
    assert torch.equal(outs[1], expected[2]) and torch.equal(outs[3], expected[1])


def test_the_same_images_give_the_same_tiles_again(pipeline):
    images = [
        Wanted.whole(ready(written(kind), (2, 2))) for kind in ("444.jpg", "progressive.jpg", "lossy.webp")
    ]
    assert torch.equal(pipeline.cut(images), pipeline.cut(images))


def test_a_broken_image_costs_only_itself():
    pipeline = TilePipeline(None, SIZE, threads=1)
    good = [ready(written(kind), (2, 1)) for kind in ("444.jpg", "gray.jpg", "rgba.png", "plain.bmp")]
    broken = [EncodedImage(data, 2, 1, True) for data in (good[0].data[:400], b"junk" * 30, b"")]
    # DALI cannot read it, Pillow can.
    buffer = [EncodedImage(gif(), 2, 1, True)]
    mixed = [good[0], broken[0], good[1], broken[1], buffer[0], good[2], broken[2], good[3]]
    pipeline.start([Wanted.whole(image) for image in mixed])
    pipeline.start([Wanted.whole(image) for image in good])  # on its way when the first fails
    outs = [torch.full((3 * len(batch), 3, SIZE, SIZE), 7, dtype=torch.uint8) for batch in (mixed, good)]
    for out in outs:
        pipeline.collect(out)
    expected = [pipeline.cut([Wanted.whole(image)]) for image in good]
    blank = torch.zeros((3, 3, SIZE, SIZE), dtype=torch.uint8)
    rescued = torch.from_numpy(reference(buffer[0]))
    order = [expected[0], blank, expected[1], blank, rescued, expected[2], blank, expected[3]]
    assert torch.equal(outs[0], torch.cat(order)) and torch.equal(outs[1], torch.cat(expected))
    assert (pipeline.images, pipeline.fallbacks) == (16, {"no decoder for GIF": 1})
    assert pipeline.blank == {"truncated_image": 1, "unreadable_image": 2}
    pipeline.close()


def gif() -> bytes:
    import io

    file = io.BytesIO()
    photograph().save(file, "GIF")
    return file.getvalue()
