"""From records to samples: tile counts, several images, text only, and refused records."""

import json
import pickle

import numpy as np
import pytest

from megatron_internvlx.data.quirks import ReleasedQuirks
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.data.sample import EncoderSettings
from tests.unit.data.conftest import record, turns


@pytest.fixture
def encode(disk, encoder):
    disk.image("wide.png", 90, 30)  # 3x1 tiles of 32 pixels
    disk.image("tall.jpg", 30, 60)  # 1x2

    def encode(entry, *, dataset=None, **settings):
        return encoder(**settings).encode(disk.add("a", [entry], **(dataset or {})).manifest().record(0))

    return encode


def refused(cause, encode, *arguments, **options):
    with pytest.raises(BadSample) as caught:
        encode(*arguments, **options)
    assert (caught.value.key, caught.value.cause) == ("a.jsonl:1", cause)
    return caught.value.detail


def grids(sample):
    return [(image.cols, image.rows, image.num_tiles) for image in sample.images]


def test_one_image(encode, disk):
    sample = encode(record("wide.png", "<image>\nWhat?", "A cat."), dataset={"data_augment": True})
    assert sample.key == "a.jsonl:1"
    assert grids(sample) == [(3, 1, 4)]
    assert sample.num_tiles * 4 == sample.is_visual.sum() == 16
    assert (sample.images[0].width, sample.images[0].height) == (90, 30)
    assert sample.images[0].path == str(disk.folder / "wide.png")
    assert sample.jpeg_augment
    assert sample.input_ids.dtype == sample.labels.dtype == np.int64
    assert len(sample.input_ids) == len(sample.labels) == len(sample.is_visual)


def test_placeholder_is_prepended_for_a_single_path_and_not_for_a_list(encode):
    with_it = encode(record("wide.png", "<image>\nWhat?", "A cat."))
    without = encode(record("wide.png", "What?", "A cat."))
    np.testing.assert_array_equal(with_it.input_ids, without.input_ids)
    assert "0 <image>" in refused("placeholder_mismatch", encode, record(["wide.png"], "What?", "A cat."))


def test_several_images_share_the_maximum(encode):
    entry = record(["wide.png", "tall.jpg", "wide.png"], "<image><image>", "A", "<image>?", "B")
    assert grids(encode(entry, max_tiles=6)) == [(2, 1, 3), (1, 2, 3), (2, 1, 3)]
    assert grids(encode(entry, max_tiles=2)) == [(1, 1, 1)] * 3
    assert grids(encode(entry, dataset={"max_dynamic_patch": 9})) == [(3, 1, 4), (1, 2, 3), (3, 1, 4)]


def test_text_only_has_no_tiles(encode):
    for entry in (record(None, "Hi", "Hello"), record("", "Hi", "Hello"), record([], "Hi", "Hello")):
        sample = encode(entry)
        assert (sample.images, sample.num_tiles, int(sample.is_visual.sum())) == ((), 0, 0)


def test_static_size_gives_one_tile_per_image(encode):
    sample = encode(record("wide.png", "What?", "A cat."), dynamic_image_size=False)
    assert grids(sample) == [(1, 1, 1)]


def test_grid_follows_the_upright_size_unless_exif_is_ignored(encode, disk):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    disk.image("turned.jpg", 90, 30, exif=exif)
    entry = record("turned.jpg", "What?", "A cat.")
    assert grids(encode(entry)) == [(1, 3, 4)]
    assert grids(encode(entry, compat=ReleasedQuirks(ignore_exif=True))) == [(3, 1, 4)]


def test_placeholder_mismatches_are_refused(encode):
    assert "2 <image>" in refused("placeholder_mismatch", encode, record("wide.png", "<image><image>", "A"))
    two = record(["wide.png", "tall.jpg"], "<image>", "A")
    assert "for 2 images" in refused("placeholder_mismatch", encode, two)
    sample = encode(two, compat=ReleasedQuirks(drop_surplus_images=True))
    assert len(sample.images) == 1
    assert sample.num_tiles * 4 == sample.is_visual.sum()


def test_typed_context_token_is_refused(encode):
    refused("reserved_token", encode, record("wide.png", "<image> and <IMG_CONTEXT>", "A"))


def test_missing_image_is_named_with_its_record(encode):
    assert "gone.png" in refused("missing_image", encode, record("gone.png", "What?", "A"))


@pytest.mark.parametrize(
    ("entry", "cause"),
    [
        ({"image": "wide.png"}, "missing_key"),
        ({"conversations": "text"}, "missing_key"),
        ({"image": 3, "conversations": turns("a", "A")}, "bad_message"),
        ({"image": ["wide.png", 3], "conversations": turns("a", "A")}, "bad_message"),
        (
            {"image": "wide.png", "conversations": [{"from": "human"}, {"from": "gpt", "value": "A"}]},
            "bad_message",
        ),
        ({"video": "a.mp4", "conversations": turns("<video>", "A")}, "video"),
    ],
)
def test_records_of_another_shape_are_refused(encode, entry, cause):
    refused(cause, encode, entry)


def test_answer_cut_by_the_length_limit_is_refused(encode):
    detail = refused("answer_truncated", encode, record("wide.png", "What?", "A cat. " * 30), max_length=180)
    assert "limit is 180" in detail


def test_dropped_rounds_are_reported(encode):
    entry = record(None, "a", "A", "b", "B " * 200)
    assert encode(entry, max_length=300).dropped_tokens > 100
    assert encode(entry, max_length=None).dropped_tokens == 0


def test_a_text_that_would_be_cut_to_nearly_nothing_is_refused_unread(encode, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it was tokenized")

    entry = record(None, "a", "A", "b", "B" * 70_000)
    assert encode(entry, max_length=2000).dropped_tokens > 1000  # 35 characters for each token: cut as ever
    monkeypatch.setattr("megatron_internvlx.data.sample.encode", never)
    detail = refused("too_long", encode, entry, max_length=1000)
    assert "70,003 characters for 1,000 tokens" in detail


@pytest.mark.parametrize("half", ["\ud800", "a\udfffb"])
def test_half_a_surrogate_pair_is_refused_and_can_be_printed(encode, half):
    for entry in (record(None, "a", half), record(None, half, "A"), record(f"{half}.png", "a", "A")):
        with pytest.raises(BadSample, match="bad_message") as caught:
            encode(json.dumps(entry))
        str(caught.value).encode()
        pickle.dumps(caught.value)


def test_openai_records_are_told_what_converts_them(encode):
    entry = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "A"}]}
    assert "tools/convert_messages.py" in refused("missing_key", encode, entry)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"template": "vicuna"}, "unknown chat template"),
        ({"rvtc": "auto"}, "unknown RVTC policy"),
        ({"tokens_per_tile": 0}, "tokens_per_tile 0"),
        ({"min_tiles": 7, "max_tiles": 6}, "min_tiles 7 must be at most max_tiles 6"),
        ({"max_length": 0}, "max_length 0"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        EncoderSettings(**setting)
