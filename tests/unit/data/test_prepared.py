"""Files of a prepared directory: their exact contents, which older directories and Energon depend on."""

import json
import pickle
import sqlite3

import pytest
import yaml

from megatron_internvlx.data.prepared import (
    Flavors,
    HeldOutSet,
    Part,
    PreparedSet,
    RecordedImage,
    Repeats,
    ShardRecord,
    is_prepared,
    prepared_sets,
    read_broken,
    read_finished_set,
    size_table,
    split_repeats,
    unmark_prepared,
    write_broken,
    write_finished_set,
    write_held_out,
    write_metadataset,
    write_prepared_sets,
)
from megatron_internvlx.data.rejects import BadSample

JSONL = Part("a/records.jsonl", 2, 12, Flavors("a", False, 6, "a.jsonl", "../img"))
SHARDS = Part("b/shards", 1, 4, Flavors("b", True, None))
SETS = [PreparedSet("a", 12, 3, 15, 2, 1, 2.5, (JSONL,)), PreparedSet("b", 4, parts=(SHARDS, SHARDS))]
PART = {
    "path": "a/records.jsonl",
    "repetitions": 2,
    "subset": {"range": [0, 12]},
    "subflavors": {
        "set": "a",
        "label": "a.jsonl",
        "root": "../img",
        "lines": None,
        "data_augment": False,
        "max_tiles": 6,
    },
}
SHARDED = {
    "path": "b/shards",
    "repetitions": 1,
    "subset": {"range": [0, 4]},
    "subflavors": {"set": "b", "shards": True, "data_augment": True, "max_tiles": None},
}


def test_marker_file_has_the_format_of_earlier_versions(tmp_path):
    write_prepared_sets(tmp_path, SETS)
    first = {
        "name": "a",
        "train": 12,
        "validation": 3,
        "images": 15,
        "broken_images": 2,
        "broken_records": 1,
        "repeat_time": 2.5,
        "parts": [PART],
    }
    found = json.loads((tmp_path / "prepared.json").read_text())
    assert (found["version"], found["sets"][0], found["sets"][1]["parts"]) == (1, first, [SHARDED] * 2)
    assert list(found["sets"][0]) == list(first)  # the order too
    assert prepared_sets(tmp_path) == SETS
    unmark_prepared(tmp_path)
    assert not is_prepared(tmp_path)


@pytest.mark.parametrize("damage", ["[]", '{"sets": [[]]}', '{"sets": [{"name": "a"}]}', '{"sets": 1}', "{"])
def test_damaged_marker_is_named(tmp_path, damage):
    (tmp_path / "prepared.json").write_text(damage)
    with pytest.raises(ValueError, match=r"prepared\.json is damaged .* again, it continues"):
        prepared_sets(tmp_path)


def test_blend_gives_energon_the_table_of_jsonl_parts_only_and_no_yaml_alias(tmp_path):
    write_metadataset(tmp_path, SETS)
    text = (tmp_path / "metadataset.yaml").read_text()
    blend = yaml.safe_load(text)["splits"]["train"]["blend_epochized"]
    assert blend == [PART | {"aux": {"sizes": "filesystem://a/media"}}, SHARDED, SHARDED]
    assert "*" not in text


def test_finished_set_counts_only_for_the_same_input(tmp_path):
    path = tmp_path / "done.json"
    assert read_finished_set(path, {"size": 1}) is None
    write_finished_set(path, {"size": 1}, SETS[0])
    assert read_finished_set(path, {"size": 1}) == SETS[0]
    assert read_finished_set(path, {"size": 2}) is None
    path.write_text(path.read_text()[:-9])
    assert read_finished_set(path, {"size": 1}) is None


def test_size_table_keeps_sizes_and_errors(tmp_path):
    table = size_table(tmp_path, "a")
    turned = RecordedImage.readable(40, 80, "JPG", turned=True)
    entries = {
        "t.jpg": turned,
        "cut.png": RecordedImage.unreadable("truncated_image", "at: byte 9" + "x" * 900),
    }
    with table.edit() as sizes:
        sizes.add(entries.items())
        assert sizes.names() == set(entries)
        assert sizes.find("none.png") is None
    rows = sqlite3.connect(table.path).execute("SELECT * FROM media_metadata ORDER BY entry_key").fetchall()
    assert rows[1] == (
        "t.jpg",
        "image",
        '{"width": 40, "height": 80, "format": "JPG", "mode": "RGB;turned"}',
    )
    again = pickle.loads(pickle.dumps(table))  # data workers read it
    assert again.size("t.jpg", apply_exif=True) == (40, 80)
    assert again.size("t.jpg", apply_exif=False) == (80, 40)
    assert again.size("none.png", apply_exif=True) is None
    with pytest.raises(BadSample, match="broken when sizes were recorded: at: byte 9") as bad:
        again.size("cut.png", apply_exif=True)
    assert (bad.value.key, bad.value.cause) == ("cut.png", "truncated_image")
    with table.edit() as sizes:
        assert [name for name, _ in sizes.broken()] == ["cut.png"]
        sizes.remove(["cut.png"])
        assert sizes.names() == {"t.jpg"}


def test_damaged_size_table_is_named(tmp_path):
    table = size_table(tmp_path, "a")
    table.path.parent.mkdir(parents=True)
    table.path.write_text("no table")
    with pytest.raises(ValueError, match=r"index\.sqlite: file is not a database: delete it"), table.edit():
        pass


def test_shard_record_has_the_format_of_earlier_versions():
    record = ShardRecord("a.jsonl:1", {"0.jpg": RecordedImage(4, 5, "JPG")}, {"id": "é"})
    sizes = {"0.jpg": {"width": 4, "height": 5, "format": "JPG", "mode": "RGB"}}
    text = json.dumps({"key": "a.jsonl:1", "sizes": sizes, "record": {"id": "é"}}, ensure_ascii=False)
    assert record.to_json() == text.encode()
    assert ShardRecord.from_json(record.to_json()) == record


def test_image_root_is_relative_to_the_directory_or_a_url(tmp_path):
    assert JSONL.flavors.image_root(tmp_path) == str(tmp_path / "../img")
    assert Flavors("a", False, None, "a.jsonl", "msc://b/c").image_root(tmp_path) == "msc://b/c"


@pytest.mark.parametrize(
    ("repeat_time", "records", "expected"),
    [(2.25, 20, (2, 5)), (0.29, 100, (0, 29)), (3, 7, (3, 0)), (0.1 + 0.2, 10, (0, 3)), (0, 9, (0, 0))],
)
def test_repeats_are_split_without_loss_to_rounding(repeat_time, records, expected):
    assert split_repeats(repeat_time, records) == Repeats(*expected)


def test_held_out_sets_are_a_meta_file(tmp_path):
    (tmp_path / "validation").mkdir()
    write_held_out(tmp_path, [HeldOutSet("a", "/img", 3, 6), HeldOutSet("b", "s3://x", 1, None)])
    assert json.loads((tmp_path / "validation" / "meta.json").read_text()) == {
        "a": {"root": "/img", "annotation": "a.jsonl", "length": 3, "max_dynamic_patch": 6},
        "b": {"root": "s3://x", "annotation": "b.jsonl", "length": 1},
    }


def test_broken_list_is_sorted_and_read_back(tmp_path):
    rejects = [BadSample("b.jsonl:2", "bomb", "big"), BadSample("a.jsonl:9", "missing_image", "é")]
    write_broken(tmp_path / "broken.jsonl", rejects)
    found = [(bad.key, bad.cause, bad.detail) for bad in read_broken(tmp_path / "broken.jsonl")]
    assert found == [("a.jsonl:9", "missing_image", "é"), ("b.jsonl:2", "bomb", "big")]
