"""Every format gives the same records, with images that training finds."""

import base64
import json
import tarfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_internvlx.data.sources.rows import DESCRIBE
from tests.preparing import (
    EMBEDDED,
    FORMATS,
    SECOND,
    add_member,
    items,
    photo,
    records_of,
    write_csv,
    write_images,
    write_internvl,
)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_found_by_looking(name, tmp_path, prepare):
    records = items()
    source = FORMATS[name](tmp_path, records)
    text = prepare(source, "--out", tmp_path / "out", "--validation", 0)
    assert "4 records, 4 images" in text
    assert "left out" not in text
    found = records_of(tmp_path / "out" / "meta.json")
    question = DESCRIBE if name == "captions" else None
    for record, item in zip(found, records, strict=True):
        assert record["turns"] == [
            {"from": "human", "value": f"<image>\n{question or item.question}"},
            {"from": "gpt", "value": item.answer},
        ]
        assert [Path(path).read_bytes() for path in record["paths"]] == [item.data]
        inside = str(tmp_path / "out") in record["paths"][0]
        assert inside == (name in EMBEDDED), "images are named where they lie"
    assert found[1]["data"]["source"] == SECOND[name]
    assert not (tmp_path / "out" / "meta_val.json").exists()


@pytest.mark.parametrize("name", ["captions", "messages"])
def test_copy_makes_a_directory_that_can_be_moved(name, tmp_path, prepare):
    (tmp_path / "in").mkdir()
    source = FORMATS[name](tmp_path / "in", items())
    prepare(source, "--out", tmp_path / "out", "--copy")
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    for path in (tmp_path / "in").rglob("*.jpg"):
        path.unlink()
    found = [*records_of(moved / "meta.json"), *records_of(moved / "meta_val.json")]
    assert len(found) == 4
    assert all(Path(path).is_file() for record in found for path in record["paths"])


def test_images_inside_messages_and_conversations(tmp_path, prepare):
    url = "data:image/jpeg;base64," + base64.b64encode(photo(1)).decode()
    rows = [
        {"messages": [{"role": "system", "content": "Be short."},
                      {"role": "user", "content": [{"type": "image", "image": url}, {"type": "text", "text": "A?"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "B"}]}]},
        {"images": ["x.jpg", "x.jpg"], "messages": [{"role": "user", "content": "<image> or <image>?"},
                                                    {"role": "assistant", "content": "Both."}]},
        {"messages": [{"role": "user", "content": "No picture?"}, {"role": "assistant", "content": "None."}]},
    ]  # fmt: skip
    (tmp_path / "x.jpg").write_bytes(photo(2))
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(tmp_path / "m.jsonl", "--out", tmp_path / "out", "--validation", 0)
    first, second, third = records_of(tmp_path / "out" / "meta.json")
    assert first["turns"][0] == {"from": "system", "value": "Be short."}
    assert first["turns"][1]["value"] == "<image>\nA?"
    assert Path(first["paths"][0]).read_bytes() == photo(1)
    assert second["paths"] == [str(tmp_path / "x.jpg")] * 2
    assert third["paths"] == []


def test_parquet_conversations_with_image_lists(tmp_path, prepare):
    rows = [
        {"images": [{"bytes": photo(n), "path": None}], "texts": [{"user": "A?", "assistant": f"B{n}", "source": "x"}]}
        for n in range(2)
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    rows = [
        {"images": [{"bytes": photo(n + 5), "path": "b.jpg"}],
         "messages": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "C?"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": f"D{n}"}]}]}
        for n in range(2)
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    prepare(tmp_path / "a.parquet", tmp_path / "b.parquet", "--out", tmp_path / "out", "--validation", 0)
    found = records_of(tmp_path / "out" / "meta.json")
    assert [record["turns"][-1]["value"] for record in found] == ["B0", "B1", "D0", "D1"]
    assert [record["turns"][0]["value"] for record in found] == ["<image>\nA?"] * 2 + ["<image>\nC?"] * 2


def test_shards_with_captions_conversations_and_several_images(tmp_path, prepare):
    with tarfile.open(tmp_path / "0.tar.gz", "w:gz") as tar:
        add_member(tar, "a/0001.jpg", photo(1))
        add_member(tar, "a/0001.txt", b"A cat.")
        turns = [{"from": "human", "value": "<image><image>Same?"}, {"from": "gpt", "value": "No."}]
        for number in (10, 2):
            add_member(tar, f"a/0002.{number}.png", photo(number, kind="PNG"))
        add_member(tar, "a/0002.json", json.dumps({"conversations": turns}).encode())
    prepare(tmp_path / "0.tar.gz", "--out", tmp_path / "out", "--validation", 0)
    first, second = records_of(tmp_path / "out" / "meta.json")
    assert first["turns"][1]["value"] == "A cat."
    assert [Path(path).read_bytes() for path in second["paths"]] == [
        photo(2, kind="PNG"), photo(10, kind="PNG"),
    ]  # fmt: skip


def test_meta_file_is_passed_through(tmp_path, prepare):
    write_internvl(tmp_path, items())
    entry = {"root": "", "annotation": "train.jsonl", "data_augment": True, "repeat_time": 2.5}
    (tmp_path / "meta.json").write_text(json.dumps({"a/b": {**entry, "max_dynamic_patch": 6, "length": 4}}))
    prepare(tmp_path / "meta.json", "--out", tmp_path / "out", "--validation", 1)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta == {
        "a_b": {"root": str(tmp_path), "annotation": "train/a_b.jsonl", "data_augment": True, "repeat_time": 2.5,
                "length": 3, "max_dynamic_patch": 6}
    }  # fmt: skip


def test_rows_of_one_image(tmp_path, prepare):
    records = items(2)
    records.insert(1, records[0].__class__("p0.jpg", None, "And the colour?", "Red."))
    write_csv(tmp_path, records)
    prepare(tmp_path, "--out", tmp_path / "each", "--validation", 0)
    assert len(records_of(tmp_path / "each" / "meta.json")) == 3
    prepare(tmp_path, "--out", tmp_path / "joined", "--validation", 0, "--rounds")
    first, second = records_of(tmp_path / "joined" / "meta.json")
    assert [turn["value"] for turn in first["turns"]] == [
        "<image>\nWhat is in picture 0?", "Thing 0.", "And the colour?", "Red.",
    ]  # fmt: skip
    assert len(second["turns"]) == 2


def test_columns_can_be_named(tmp_path, prepare):
    write_images(tmp_path, items(2))
    (tmp_path / "t.tsv").write_text("foto\tfrage\tantwort\np0.jpg\tA?\tB\np1.jpg\tC?\tD\n")
    columns = ("--image-column", "foto", "--question-column", "frage", "--answer-column", "antwort")
    assert "2 records" in prepare(tmp_path / "t.tsv", "--check", *columns)


def test_folders_of_images_are_found(tmp_path, prepare):
    write_csv(tmp_path, items(2))
    below = tmp_path / "all" / "pictures"
    below.mkdir(parents=True)
    for path in tmp_path.glob("*.jpg"):
        path.rename(below / path.name)
    (tmp_path / "questions.csv").rename(tmp_path / "all" / "questions.csv")
    assert f"found in {below}" in prepare(tmp_path / "all", "--check")
