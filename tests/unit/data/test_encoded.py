"""Which files may travel undecoded: all that are whole and of a kind DALI decodes; Pillow sees the others first."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from megatron_internvlx.data.decode_pil import load_tiles
from megatron_internvlx.data.encoded import HUGE_PIXELS, EncodedImage, encoded
from megatron_internvlx.data.file_kinds import SENT, kind_of, small_picture
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.data.sample import ImageTiles
from tests.unit.data.test_decode_pil import png_bomb

GRID = ImageTiles("", 60, 40, 2, 1, True)


def written(form: str, mode: str = "RGB", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form, **options)
    return file.getvalue()


TRAVELS = {
    "jpeg": written("JPEG"),
    "progressive": written("JPEG", progressive=True),
    "two jpegs of a phone": written(
        "MPO", save_all=True, append_images=[Image.effect_noise((30, 20), 9).convert("RGB")]
    ),
    "restart markers": written("JPEG", restart_marker_blocks=1),
    "cmyk": written("JPEG", "CMYK"),
    "png": written("PNG"),
    "palette": written("PNG", "P"),
    "webp": written("WEBP"),
    "webp without loss": written("WEBP", lossless=True),
    "bmp": written("BMP"),
    "gray bmp": written("BMP", "L"),
    "tiff": written("TIFF"),
    "jpeg with a tail": written("JPEG") + b"tail",
}
STAYS = {
    "format GIF": written("GIF"),
    "format AVIF": written("AVIF"),
    "TIFF of other kinds": written("TIFF", compression="tiff_lzw"),
    "TIFF of mode L": written("TIFF", "L"),
    "JPEG not whole": written("JPEG")[:-2],
    "PNG not whole": written("PNG")[:-12],
    "several frames": written("PNG", save_all=True, append_images=[Image.new("RGB", (60, 40))]),
}


@pytest.mark.parametrize("kind", TRAVELS)
def test_whole_files_travel(kind):
    image = encoded(TRAVELS[kind], GRID, apply_exif=True)
    assert image == EncodedImage(TRAVELS[kind], 2, 1, True, 1)
    assert image.num_tiles == 3


@pytest.mark.parametrize("reason", STAYS)
def test_the_others_stay_with_their_reason(reason):
    assert encoded(STAYS[reason], GRID, apply_exif=True) == reason


def test_sixteen_bits_stay():
    file = io.BytesIO()
    Image.new("I;16", (20, 10), 200).save(file, "PNG")
    assert encoded(file.getvalue(), GRID, apply_exif=True) == "mode I;16"


def test_extended_webp_stays():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert encoded(written("WEBP", exif=exif), GRID, apply_exif=True) == "extended WEBP"


def test_huge_images_stay_and_bombs_are_refused_by_their_headers():
    file = io.BytesIO()
    Image.new("1", (HUGE_PIXELS // 4096 + 1, 4096)).save(file, "PNG")
    assert encoded(file.getvalue(), GRID, apply_exif=True) == "huge"
    with pytest.raises(BadSample) as caught:
        encoded(png_bomb(30_000, 30_000), GRID, apply_exif=True)
    assert caught.value.cause == "bomb"


@pytest.mark.parametrize("form", ["JPEG", "MPO"])
@pytest.mark.parametrize("turn", range(10))
def test_the_turn_is_what_pillow_reads(turn, form):
    exif = Image.Exif()
    exif[0x0112] = turn
    more = {"save_all": True, "append_images": [Image.new("RGB", (60, 40))]} if form == "MPO" else {}
    data = written(form, exif=exif, **more)
    image, ignored = (encoded(data, GRID, apply_exif=flag) for flag in (True, False))
    assert isinstance(image, EncodedImage) and isinstance(ignored, EncodedImage)
    assert (image.turn, ignored.turn) == (turn if 1 <= turn <= 8 else 1, 1)


def test_kinds_without_a_decoder_stay():
    lacking = frozenset({("PNG", "P"), ("JPEG", "RGB")})
    reasons = {kind: encoded(data, GRID, apply_exif=True, lacking=lacking) for kind, data in TRAVELS.items()}
    stay = {kind for kind, reason in reasons.items() if isinstance(reason, str)}
    assert stay == {
        kind for kind in TRAVELS if "jpeg" in kind or kind in ("progressive", "restart markers", "palette")
    }
    assert {reasons[kind] for kind in stay} == {"no decoder for JPEG", "no decoder for PNG"}


def test_a_missing_decoder_rejects_nobody_and_saves_nobody():
    """Verdicts do not depend on it: a broken file has its own reason."""
    for data, reason in (
        (STAYS["JPEG not whole"], "JPEG not whole"),
        (STAYS["PNG not whole"], "PNG not whole"),
    ):
        assert encoded(data, GRID, apply_exif=True, lacking=frozenset(SENT)) == reason


def test_kinds_that_are_sent_are_those_that_may_travel():
    """A small picture of each is whole and of that kind, and no other mode of these formats may travel."""
    formats = {kind[0] for kind in SENT}
    modes = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")
    travelling = set()
    for form in formats:
        for mode in modes:
            data = small_picture((form, mode))
            if data is None:
                continue
            with Image.open(io.BytesIO(data)) as header:
                kind = kind_of(header)
            if isinstance(encoded(data, GRID, apply_exif=True), EncodedImage):
                travelling.add(kind)
    assert travelling == set(SENT)


@pytest.mark.parametrize("kind", TRAVELS)
def test_what_travels_is_never_refused_by_pillow(kind):
    """Cut anywhere, or with random bytes in it: what Pillow refuses must not have passed as whole."""
    draw, whole, missed = random.Random(kind), TRAVELS[kind], 0
    for trial in range(120):
        data = bytearray(whole)
        if trial % 2:
            del data[draw.randrange(len(data)) :]
        else:
            for _ in range(draw.choice((1, 3, 20))):
                data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            travels = isinstance(encoded(bytes(data), GRID, apply_exif=True), EncodedImage)
        except BadSample:
            continue
        if not travels:
            continue
        assert trial % 2 == 0 or kind in ("jpeg with a tail", "two jpegs of a phone"), (
            f"cut to {len(data)} bytes"
        )
        try:
            load_tiles(bytes(data), 2, 1, tile_size=16, thumbnail=True)
        except BadSample:
            missed += 1
    assert missed == 0
