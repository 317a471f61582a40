"""Files that DALI fails on: Pillow cuts them, and a kind without decoder never stops the pipeline again.

Pixels of the pipeline against Pillow's are compared in tests/parity.
"""

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image

from megatron_internvlx.data import dali_pipeline as module
from megatron_internvlx.data.dali_pipeline import TilePipeline
from megatron_internvlx.data.decode_pil import load_tiles
from megatron_internvlx.data.encoded import EncodedImage, Wanted, fallback_counts

SIZE = 16


def image(form, mode="RGB", seed=0):
    file = io.BytesIO()
    Image.effect_noise((40 + seed, 30), 60).convert(mode).save(file, form)
    return EncodedImage(file.getvalue(), 2, 1, True)


def pillow(one):
    tiles = torch.from_numpy(load_tiles(one.image.data, 2, 1, tile_size=SIZE, thumbnail=True))
    return tiles[one.first : one.first + one.count]


@pytest.fixture
def built(monkeypatch):
    """Counts the pipelines that were built."""
    found, build = [], module.build
    monkeypatch.setattr(module, "build", lambda *a: (found.append(1), build(*a))[1])
    return found


@pytest.fixture
def no_png(monkeypatch):
    """DALI fails on every PNG file, as on a machine without that decoder: it is fed bytes of no format."""
    inputs = module.inputs

    def changed(run, size):
        broken = [
            replace(one, image=replace(one.image, data=b"junk" * 30))
            if one.image.data[1:4] == b"PNG"
            else one
            for one in run
        ]
        return inputs(broken, size)

    monkeypatch.setattr(module, "inputs", changed)


def test_kind_without_decoder_is_remembered_and_stops_no_later_batch(built, no_png):
    pipeline = TilePipeline(None, SIZE, threads=1)
    jpeg, png = image("JPEG"), image("PNG")
    (expected,) = [pipeline.cut([Wanted.whole(jpeg)])]
    first = [Wanted.whole(one) for one in (jpeg, png, jpeg)]
    assert torch.equal(pipeline.cut(first), torch.cat([expected, pillow(first[1]), expected]))
    after_the_first = len(built)
    assert after_the_first > 1
    # Parts of images, several in a row, at both ends; and a second batch in flight.
    later = [Wanted(png, 1, 2), Wanted.whole(jpeg), *[Wanted.whole(image("PNG", seed=n)) for n in range(3)]]
    later += [Wanted(jpeg, 0, 1), Wanted(png, 2, 1)]
    outs = [torch.full((sum(one.count for one in later), 3, SIZE, SIZE), 7, dtype=torch.uint8) for _ in "ab"]
    for _ in outs:
        pipeline.start(later)
    parts = [pillow(one) if one.image.data[1:4] == b"PNG" else expected[: one.count] for one in later]
    for out in outs:
        pipeline.collect(out)
        assert torch.equal(out, torch.cat(parts))
    assert len(built) == after_the_first
    assert (pipeline.fallbacks, pipeline.blank) == ({"no decoder for PNG": 11}, {})
    assert fallback_counts(pipeline.fallbacks)[0] == 11
    pipeline.close()


def test_missing_decoders_are_found_at_the_start(built, no_png):
    """One pipeline more for each that is missing, and none is left, so that the process can fork."""
    pipeline = TilePipeline(None, SIZE, threads=1)
    missing = pipeline.missing_decoders()
    assert missing == {("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")}
    assert len(built) <= 2 + len(missing) and pipeline._pipeline is None
    assert (pipeline.images, pipeline.fallbacks) == (0, {})
    before = len(built)
    wanted = [Wanted.whole(image("PNG")), Wanted.whole(image("JPEG"))]
    assert torch.equal(pipeline.cut(wanted)[:3], pillow(wanted[0]))
    assert len(built) == before + 1  # no batch had to fail for it
    assert pipeline.fallbacks == {"no decoder for PNG": 1}
    pipeline.close()


def test_all_decoders_are_here():
    assert TilePipeline(None, SIZE, threads=1).missing_decoders() == frozenset()


def test_a_later_batch_can_be_collected_first():
    """Held-out data in between: the batch that was begun ahead of them is kept."""
    pipeline = TilePipeline(None, SIZE, threads=1)
    wanted = [[Wanted.whole(image("JPEG", seed=n))] * (n + 1) for n in range(4)]
    expected = [pipeline.cut(batch) for batch in wanted]
    numbers = [pipeline.start(batch) for batch in wanted]
    outs = [torch.zeros_like(tiles) for tiles in expected]
    for n in (2, 0, 3):
        pipeline.collect(outs[n], numbers[n])
    pipeline.collect(outs[1])  # the oldest that is left
    assert all(torch.equal(out, tiles) for out, tiles in zip(outs, expected, strict=True))
    assert not pipeline._kept and not pipeline._runs
    pipeline.close()


def test_one_odd_file_does_not_send_others_of_its_kind_to_pillow(built, monkeypatch):
    odd, good = image("PNG", seed=3), image("PNG")
    inputs = module.inputs

    def changed(run, size):
        return inputs(
            [one if one.image != odd else replace(one, image=replace(odd, data=b"junk")) for one in run], size
        )

    monkeypatch.setattr(module, "inputs", changed)
    pipeline = TilePipeline(None, SIZE, threads=1)
    for _ in range(2):
        pipeline.cut([Wanted.whole(one) for one in (odd, good)])
    assert pipeline.fallbacks == {"DALI failed": 2}
    assert fallback_counts(pipeline.fallbacks)[-1] == 2
    pipeline.close()


def test_broken_file_of_a_kind_without_decoder_is_black(no_png):
    pipeline = TilePipeline(None, SIZE, threads=1)
    png = image("PNG")
    pipeline.cut([Wanted.whole(png)])
    cut = replace(png, data=png.data[: len(png.data) // 2])
    assert not pipeline.cut([Wanted.whole(cut)]).any()
    assert (pipeline.fallbacks, pipeline.blank) == ({"no decoder for PNG": 1}, {"truncated_image": 1})
    pipeline.close()
