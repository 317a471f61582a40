"""JPEG files that a decoder would refuse are seen without decoding: one mistake each."""

import io

import numpy as np
import pytest
from PIL import Image

from megatron_internvlx.data.decode_pil import load_tiles
from megatron_internvlx.data.jpeg_file import is_whole_jpeg
from megatron_internvlx.data.rejects import BadSample


def written(**options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def changed(marker: int, place: int, value: bytes, **options) -> bytes:
    """A file in which ``value`` stands ``place`` bytes behind the first segment of this kind begins."""
    data = bytearray(written(**options))
    first = data.index(bytes((0xFF, marker))) + 4 + place
    data[first : first + len(value)] = value
    return bytes(data)


BASELINE = written()
WRONG = {
    "code without room": changed(0xC4, 1, bytes([2, 1, 0, 9])),
    "symbol of 16 bits for DC": changed(0xC4, 17, b"\x10"),
    "table number 7": changed(0xC4, 0, b"\x07"),
    "quantization table of another precision": changed(0xDB, 0, b"\x20"),
    "12 bits": changed(0xC0, 0, b"\x0c"),
    "two components": changed(0xC0, 5, b"\x02"),
    "five-fold sampling": changed(0xC0, 7, b"\x51"),
    "scan of an unknown component": changed(0xDA, 1, b"\x09"),
    "scan with an unknown table": changed(0xDA, 2, b"\x33"),
    "progressive scan over DC and AC": changed(0xDA, 8, b"\x05", progressive=True),
    "no scan": BASELINE[: BASELINE.index(b"\xff\xda")] + b"\xff\xd9",
    "no end": BASELINE[:-2],
    "nothing": b"",
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_that_are_seen(mistake):
    assert not is_whole_jpeg(WRONG[mistake])


def test_codes_that_do_not_fit_are_the_only_mistake_of_their_file():
    """The sum of the counts stays, so that lengths do not tell; and Pillow refuses it, too."""
    data = bytearray(written())
    first = data.index(b"\xff\xc4") + 5
    counts = list(data[first : first + 16])
    total = sum(counts)
    data[first : first + 16] = bytes([total, *[0] * 15])  # so many codes of one bit
    assert not is_whole_jpeg(bytes(data))
    with pytest.raises(BadSample):
        load_tiles(bytes(data), 1, 1, tile_size=16, thumbnail=False)


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": 2}, {"comment": b"\xff\xd9"}],
    ids=str,
)
def test_good_files_pass(options):
    data = written(**options)
    assert is_whole_jpeg(data) and is_whole_jpeg(data + b"behind the end")
    assert not any(is_whole_jpeg(data[:length]) for length in range(0, len(data) - 1, 7))
