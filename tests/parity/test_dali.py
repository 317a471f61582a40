"""DALI's tiles against Pillow's: golden images, photographs and drawings of every format we name.

Decoding is equal bit for bit (so are chroma upsampling and IDCT). What remains is the resize: torch's uint8
weights have 16 bits, Pillow's 22, worth 2 of 255 at most. Where Pillow 13 squeezes an image that is taller than wide,
its own pixels differ from those of Pillow 12.3 and older, by up to 13 here; ours follow the older ones.
"""

import io
import os
import random
import struct
import zlib
from functools import cache

import matplotlib
import numpy as np
import pytest
import skimage
import sklearn
from PIL import Image

from megatron_internvlx.data import decode_pil
from megatron_internvlx.data.decode_dali import DaliDecoder, load_tiles
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.data.rvtc import tile_grid

SKIMAGE = os.path.join(os.path.dirname(skimage.__file__), "data")
SKLEARN = os.path.join(os.path.dirname(sklearn.__file__), "datasets", "images")
MATPLOTLIB = os.path.join(os.path.dirname(matplotlib.__file__), "mpl-data", "sample_data")
GOLDEN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "golden", "rvtc")

PNGS = """
astronaut brick camera cell chelsea chessboard_GRAY chessboard_RGB clock_motion coffee coins color grass gravel
horse ihc logo microaneurysms moon motorcycle_left motorcycle_right page phantom text
"""
FILES = [
    *(os.path.join(SKIMAGE, f"{name}.png") for name in PNGS.split()),
    *(os.path.join(SKIMAGE, name) for name in ("hubble_deep_field.jpg", "retina.jpg", "rocket.jpg")),
    os.path.join(SKIMAGE, "no_time_for_that_tiny.gif"),
    *(os.path.join(SKLEARN, name) for name in ("china.jpg", "flower.jpg")),
    *(
        os.path.join(MATPLOTLIB, f)
        for f in ("grace_hopper.jpg", "logo2.png", "Minduka_Present_Blue_Pack.png")
    ),
    *(os.path.join(GOLDEN, name) for name in ("a_500x400.png", "c_300x200.png", "f_640x960.png")),
]
# file format, mode, options: real photographs written in every format named
KINDS = {
    "gray.jpg": ("JPEG", "L", {}),
    "cmyk.jpg": ("JPEG", "CMYK", {}),
    "progressive.jpg": ("JPEG", "RGB", {"progressive": True}),
    "444.jpg": ("JPEG", "RGB", {"subsampling": 0, "quality": 95}),
    "422.jpg": ("JPEG", "RGB", {"subsampling": 1}),
    "rgba.png": ("PNG", "RGBA", {}),
    "palette.png": ("PNG", "P", {}),
    "transparent_palette.png": ("PNG", "P", {"transparency": 3}),
    "gray_alpha.png": ("PNG", "LA", {}),
    "16bit.png": ("PNG", "I;16", {}),
    "one_bit.png": ("PNG", "1", {}),
    "lossy.webp": ("WEBP", "RGB", {}),
    "lossless.webp": ("WEBP", "RGBA", {"lossless": True}),
    "plain.bmp": ("BMP", "RGB", {}),
    "plain.tiff": ("TIFF", "RGB", {}),
    "phone.mpo": ("MPO", "RGB", {"save_all": True}),
    **{f"exif{n}.jpg": ("JPEG", "RGB", {"exif": n}) for n in range(1, 9)},
}


@cache
def photograph() -> Image.Image:
    return Image.open(os.path.join(SKLEARN, "china.jpg")).convert("RGB").resize((500, 333))


def encoded(kind: str) -> bytes:
    form, mode, options = KINDS[kind]
    image, options = photograph(), dict(options)
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options["exif"] = exif
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    else:
        image = image.convert(mode)
    if form == "MPO":  # with a smaller picture behind the first
        options["append_images"] = [image.resize((100, 60))]
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def compare(source, **options) -> tuple[np.ndarray, tuple[int, int], DaliDecoder]:
    """Absolute differences of all tiles, the grid, and the decoder."""
    size = decode_pil.image_size(source)
    grid = tile_grid(*size, tile_size=224, max_tiles=6)
    decoder = DaliDecoder(tile_size=224)
    ours = decoder.load_tiles(source, *grid, thumbnail=True, **options)
    reference = decode_pil.load_tiles(source, *grid, tile_size=224, thumbnail=True, **options)
    assert ours.shape == reference.shape
    assert ours.dtype == np.uint8
    assert ours.flags.c_contiguous
    return np.abs(ours.astype(int) - reference), size, decoder


@pytest.mark.parametrize("path", FILES, ids=os.path.basename)
def test_photographs_and_drawings(path):
    difference, (width, height), decoder = compare(path)
    assert difference.mean() < 0.5
    assert difference.max() <= (13 if height > width else 2)
    expected = {"chessboard_RGB.png": {"16-bit PNG": 1}, "no_time_for_that_tiny.gif": {"format GIF": 1}}
    assert decoder.fallbacks == expected.get(os.path.basename(path), {})


@pytest.mark.parametrize("kind", KINDS)
def test_every_format(kind):
    difference, (width, height), decoder = compare(encoded(kind))
    assert (width < height) == (kind in {f"exif{n}.jpg" for n in (5, 6, 7, 8)})
    assert difference.mean() < 0.5
    assert difference.max() <= (13 if height > width else 2)
    expected = {"16bit.png": {"mode I;16": 1}}
    assert decoder.fallbacks == expected.get(kind, {})


def test_at_least_forty_images_are_compared():
    assert len(FILES) + len(KINDS) >= 40


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "16bit.png"])
def test_decoded_pixels_are_equal_bit_for_bit(kind):
    data = encoded(kind)
    pixels = DaliDecoder()._decode(data)
    assert (pixels == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


def test_tiles_come_row_by_row_and_the_thumbnail_last():
    canvas = np.zeros((448, 672, 3), np.uint8)
    for row in range(2):
        for col in range(3):
            canvas[row * 224 : row * 224 + 224, col * 224 : col * 224 + 224] = 40 * (3 * row + col)
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, format="PNG")
    tiles = load_tiles(buffer.getvalue(), 3, 2, tile_size=224, thumbnail=True)
    assert [int(tile[0, 112, 112]) for tile in tiles[:6]] == [0, 40, 80, 120, 160, 200]
    assert len(tiles) == 7
    assert len(load_tiles(buffer.getvalue(), 1, 1, tile_size=224, thumbnail=True)) == 1


def test_jpeg_augmentation_draws_the_same_qualities():
    data = encoded("444.jpg")
    seeds = [random.Random(5), random.Random(5)]
    ours = load_tiles(data, 2, 1, tile_size=224, thumbnail=True, jpeg_augment=seeds[0])
    reference = decode_pil.load_tiles(data, 2, 1, tile_size=224, thumbnail=True, jpeg_augment=seeds[1])
    assert seeds[0].random() == seeds[1].random()
    # A pixel that differs by 1 may round to another JPEG coefficient, which is then worth more: 0.70 here.
    assert np.abs(ours.astype(int) - reference).mean() < 1


def test_broken_images_name_their_cause_and_the_next_one_decodes(tmp_path):
    decoder, good = DaliDecoder(tile_size=224), encoded("444.jpg")
    (tmp_path / "cut.jpg").write_bytes(good[: len(good) // 2])
    small = io.BytesIO()
    Image.new("1", (8, 8)).save(small, format="PNG")
    header = small.getvalue()
    header = header[:16] + struct.pack(">II", 30_000, 30_000) + header[24:29]
    header += struct.pack(">I", zlib.crc32(header[12:29])) + small.getvalue()[33:]
    (tmp_path / "bomb.png").write_bytes(header)
    for name, cause in (("cut.jpg", "truncated_image"), ("bomb.png", "bomb"), ("none.jpg", "missing_image")):
        with pytest.raises(BadSample) as caught:
            decoder.load_tiles(str(tmp_path / name), 1, 1, thumbnail=False)
        assert caught.value.cause == cause
        assert decoder.load_tiles(good, 2, 1, thumbnail=True).shape == (3, 3, 224, 224)
    assert decoder.fallbacks == {}
