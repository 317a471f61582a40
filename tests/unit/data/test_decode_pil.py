"""Decoding of good, odd and broken files (tile values: tests/parity/test_tiles.py)."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from megatron_internvlx.data.decode_pil import image_size, load_tiles
from megatron_internvlx.data.rejects import BadSample


def refused(cause, source, *, header=False):
    with pytest.raises(BadSample) as caught:
        image_size(source) if header else load_tiles(source, 1, 1, tile_size=16, thumbnail=False)
    assert caught.value.cause == cause, caught.value
    return caught.value


def png_bomb(width, height):
    """A valid PNG header that promises width x height pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_bytes_and_paths_give_the_same_tiles(disk):
    path = disk.folder / disk.image("a.png", 60, 40)
    tiles = load_tiles(path, 3, 2, tile_size=16, thumbnail=True)
    assert (tiles.shape, tiles.dtype) == ((7, 3, 16, 16), np.uint8)
    np.testing.assert_array_equal(tiles, load_tiles(path.read_bytes(), 3, 2, tile_size=16, thumbnail=True))
    assert image_size(path) == image_size(path.read_bytes()) == (60, 40)


def test_a_single_tile_has_no_thumbnail(disk):
    path = disk.folder / disk.image("a.png", 60, 40)
    assert load_tiles(path, 1, 1, tile_size=16, thumbnail=True).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    file = io.BytesIO()
    picture = Image.new("L", (20, 10), 200)
    picture = Image.new("I;16", (20, 10), 200) if mode == "I;16" else picture.convert(mode)
    picture.save(file, format="JPEG" if mode == "CMYK" else "PNG")
    tiles = load_tiles(file.getvalue(), 1, 1, tile_size=16, thumbnail=False)
    assert tiles.shape == (1, 3, 16, 16)


def test_alpha_is_dropped_and_not_blended():
    file = io.BytesIO()
    Image.new("RGBA", (16, 16), (10, 20, 30, 0)).save(file, format="PNG")
    tiles = load_tiles(file.getvalue(), 1, 1, tile_size=16, thumbnail=False)
    assert tiles[0, :, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_turns_size_and_pixels_alike(orientation, form):
    from PIL import ImageOps

    pixels = np.random.default_rng(0).integers(0, 255, (6, 10, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels).resize((100, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, format=form, exif=exif)
    source = file.getvalue()
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(source)))
    assert image_size(source) == upright.size
    expected = np.asarray(upright.convert("RGB").resize((32, 16))).reshape(1, 16, 2, 16, 3).swapaxes(1, 2)[0]
    tiles = load_tiles(source, 2, 1, tile_size=16, thumbnail=False)
    np.testing.assert_array_equal(tiles, expected.transpose(0, 3, 1, 2))
    assert image_size(source, apply_exif=False) == (100, 60)


def test_jpeg_augmentation_reencodes_each_tile_with_a_quality_of_its_own(disk):
    path = disk.folder / disk.image("a.png", 60, 40)

    def tiles(rng):
        return load_tiles(path, 2, 1, tile_size=16, thumbnail=True, jpeg_augment=rng)

    expected, rng = [], random.Random(1)
    for tile in tiles(None):
        file = io.BytesIO()
        Image.fromarray(tile.transpose(1, 2, 0)).save(file, format="JPEG", quality=rng.randint(75, 100))
        expected.append(np.asarray(Image.open(file)).transpose(2, 0, 1))
    np.testing.assert_array_equal(tiles(random.Random(1)), np.stack(expected))
    assert (tiles(random.Random(1)) != tiles(random.Random(2))).any()


def test_missing_files_and_folders(disk):
    refused("missing_image", disk.folder / "none.png", header=True)
    refused("missing_image", disk.folder, header=True)
    (disk.folder / "dangling.png").symlink_to(disk.folder / "none.png")
    refused("missing_image", disk.folder / "dangling.png")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_truncated_files_have_a_size_and_no_tiles(disk, name):
    path = disk.folder / disk.image(name, 160, 120)
    source = path.read_bytes()[: path.stat().st_size // 2]
    if name != "a.webp":
        assert image_size(source) == (160, 120)
    bad = refused("truncated_image" if name != "a.webp" else "unreadable_image", source)
    assert bad.__cause__ is not None


@pytest.mark.parametrize("source", [b"", b"GIF", b"<html>not found</html>", b"\xff\xd8\xff\xe0" + b"\0" * 50])
def test_files_that_are_no_images(source):
    refused("unreadable_image", source, header=True)


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_decompression_bombs_are_refused_by_their_header(side):
    assert "pixels" in refused("bomb", png_bomb(side, side), header=True).detail
    refused("bomb", png_bomb(side, side))


def test_flipped_bits_never_raise_anything_else(disk):
    rng = random.Random(0)
    for name in ("a.jpg", "b.png", "c.webp"):
        good = (disk.folder / disk.image(name, 64, 48)).read_bytes()
        for _ in range(40):
            source = bytearray(good)
            for _ in range(8):
                source[rng.randrange(len(source))] ^= 1 << rng.randrange(8)
            try:
                load_tiles(bytes(source), 1, 1, tile_size=16, thumbnail=False)
            except BadSample as bad:
                assert bad.cause in ("truncated_image", "unreadable_image", "bomb")


def test_impossible_grids_are_programmer_errors():
    with pytest.raises(ValueError, match="cols 0"):
        load_tiles(b"", 0, 1, thumbnail=False)
