"""meta.json and JSONL reading: paths, repeats, order, and errors that name file and line."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest

from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.data.rejects import BadSample
from tests.unit.data.conftest import record


def keys(manifest):
    return [manifest.record(i).key for i in range(len(manifest))]


def numbered(count):
    return [{"n": i, **record(None, f"q{i}", f"答{i}")} for i in range(count)]


def test_records_are_read_by_position_and_blank_lines_keep_the_numbers(disk):
    manifest = disk.add("a", ["", json.dumps({"n": 0}), " ", json.dumps({"n": 1})]).manifest()
    assert keys(manifest) == ["a.jsonl:2", "a.jsonl:4"]
    assert [manifest.record(i).data["n"] for i in range(2)] == [0, 1]


def test_last_line_without_newline_is_a_record(disk):
    disk.add("a", numbered(2))
    path = disk.folder / "a.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert [disk.manifest().record(i).data["n"] for i in range(2)] == [0, 1]


@pytest.mark.parametrize(
    ("repeat", "counts"), [(1, [1] * 6), (3, [3] * 6), (0.5, [1, 0] * 3), (1.5, [2, 1] * 3)]
)
def test_repeat_time_counts(disk, repeat, counts):
    manifest = disk.add("a", numbered(6), repeat_time=repeat).manifest()
    seen = Counter(manifest.record(i).data["n"] for i in range(len(manifest)))
    assert [seen[n] for n in range(6)] == counts


def test_fractions_are_not_lost_to_rounding(disk):
    for repeat, size in [(0.29, 29), (0.1, 10), (1.1, 110), (0.999, 99)]:
        assert len(disk.add("a", numbered(100), repeat_time=repeat).manifest()) == size


def test_datasets_are_concatenated_with_their_own_settings(disk):
    disk.add("a", numbered(2), data_augment=True, max_dynamic_patch=4)
    disk.add("b", numbered(3), repeat_time=2)
    manifest = disk.add("off", numbered(3), repeat_time=0).manifest()
    assert len(manifest) == 2 + 6
    assert keys(manifest)[:3] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    first, later = manifest.record(0), manifest.record(2)
    assert (first.data_augment, first.max_tiles) == (True, 4)
    assert (later.data_augment, later.max_tiles) == (False, None)


def test_order_is_a_permutation_set_by_seed_and_epoch(disk):
    manifest = disk.add("a", numbered(50)).manifest()
    first = manifest.order(0, 7)
    np.testing.assert_array_equal(np.sort(first), np.arange(50))
    np.testing.assert_array_equal(first, manifest.order(0, 7))
    assert (first != manifest.order(1, 7)).any()
    assert (first != manifest.order(0, 8)).any()


def test_it_pickles_to_other_processes_after_reading(disk):
    manifest = disk.add("a", numbered(4)).manifest()
    manifest.record(1)
    assert keys(pickle.loads(pickle.dumps(manifest))) == keys(manifest)


def test_relative_paths_resolve_beside_meta_json_unless_found_as_given(disk, monkeypatch, tmp_path_factory):
    manifest = disk.add("a", numbered(1), root="images").manifest()
    assert manifest.record(0).root == str(disk.folder / "images")
    elsewhere = tmp_path_factory.mktemp("cwd")
    (elsewhere / "images").mkdir()
    monkeypatch.chdir(elsewhere)
    assert Manifest(disk.folder / "meta.json").record(0).root == "images"


@pytest.mark.parametrize(
    "line",
    ["{broken", '"text"', "\ufffd{", '{"a": 1} x', '{"n": 1, "n": 2}', '{"a": {"b": 1, "b": 1}}', "[" * 9999],
)
def test_malformed_line_names_file_and_line(disk, line):
    manifest = disk.add("a", [json.dumps({"n": 0}), line]).manifest()
    assert manifest.record(0).data == {"n": 0}
    with pytest.raises(BadSample, match=r"^a.jsonl:2: malformed_json") as caught:
        manifest.record(1)
    assert caught.value.key == "a.jsonl:2"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"annotation": "none.jsonl"}, "'bad': annotation file 'none.jsonl' not found"),
        ({"repeat_time": -1}, "repeat_time is -1"),
        ({"repeat_time": "2"}, "repeat_time is '2'"),
        ({"max_dynamic_patch": 0}, "max_dynamic_patch is 0"),
        ({"root": 3}, "root must be a path"),
        ({"repeat": 3}, r"unknown keys 'repeat'; known are root, annotation, .*repeat_time"),
        ({"repeat_tme": 3}, r"unknown keys 'repeat_tme' \(do you mean repeat_time\?\)"),
        ({"data_augment": "false"}, "data_augment is 'false'; it must be true or false"),
        ({"max_dynamic_patch": 2.5}, "max_dynamic_patch is 2.5; it must be a whole number"),
        ({"repeat_time": 1e15}, r"repeat_time is 1000000000000000.0; it must be a number between 0 and 1000"),
        ({"repeat_time": float("nan")}, "repeat_time is nan"),
    ],
)
def test_bad_entries_are_refused_by_name(disk, entry, message):
    with pytest.raises(ValueError, match=message):
        disk.add("bad", numbered(1), **entry).manifest()


def test_missing_keys_are_named(disk):
    disk.meta["half"] = {"root": ""}
    with pytest.raises(ValueError, match=r"'half' needs the keys 'root' and 'annotation'; it has \['root'\]"):
        disk.manifest()


def test_empty_sets_are_refused(disk):
    with pytest.raises(ValueError, match="it names no dataset"):
        disk.manifest()
    with pytest.raises(ValueError, match=r"the data set is empty \(a: 0 records x 1\)"):
        disk.add("a", []).manifest()


def test_json_array_and_broken_meta_are_refused(disk):
    (disk.folder / "b.jsonl").write_text("[\n{}\n]\n")
    disk.meta["b"] = {"root": "", "annotation": "b.jsonl"}
    with pytest.raises(ValueError, match="not a JSON array"):
        disk.manifest()
    (disk.folder / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        Manifest(disk.folder / "meta.json")
    (disk.folder / "meta.json").write_text('{"a": {"root": ""}, "b": {}, "a": {"root": "x"}}')
    with pytest.raises(ValueError, match=r"meta.json is not valid JSON: duplicate key 'a'"):
        Manifest(disk.folder / "meta.json")
    (disk.folder / "meta.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not valid JSON"):
        Manifest(disk.folder / "meta.json")
    with pytest.raises(ValueError, match=r"meta file .* not found"):
        Manifest(disk.folder / "other.json")


def test_a_key_with_an_underscore_is_a_comment(disk):
    assert len(disk.add("a", numbered(2), _note="from the archive").manifest()) == 2


def test_an_epoch_that_no_memory_holds_is_refused(disk, monkeypatch):
    monkeypatch.setattr("megatron_internvlx.data.manifest.MAX_EPOCH", 20)
    assert len(disk.add("a", numbered(4), repeat_time=5).manifest()) == 20
    with pytest.raises(ValueError, match=r"an epoch has 24 records, must be at most 20.*lower repeat_time"):
        disk.add("a", numbered(4), repeat_time=6).manifest()


def test_held_out_records_count_once_whatever_their_repeats(disk):
    disk.add("a", numbered(4), repeat_time=2.5).add("b", numbered(3), repeat_time=0.1)
    disk.add("off", numbered(2), repeat_time=0).manifest()
    manifest = Manifest(disk.folder / "meta.json", each_once=True)
    assert keys(manifest) == [*(f"a.jsonl:{i}" for i in (1, 2, 3, 4)), *(f"b.jsonl:{i}" for i in (1, 2, 3))]
    assert [manifest.key(i) for i in range(7)] == keys(manifest)
