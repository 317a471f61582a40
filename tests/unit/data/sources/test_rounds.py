"""Rows of one image become one conversation; nothing else is joined, and a bad row costs itself alone."""

import json

from tests.preparing import items, records_of, write_csv, write_parquet


def _values(meta):
    return [[turn["value"] for turn in record["turns"]] for record in records_of(meta)]


def test_records_without_images_stay_alone(tmp_path, prepare):
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "a"}]}
            for n in range(3)]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(tmp_path / "m.jsonl", "--out", tmp_path / "out", "--validation", 0, "--rounds")
    assert _values(tmp_path / "out" / "meta.json") == [["0?", "a"], ["1?", "a"], ["2?", "a"]]


def test_bad_row_is_left_out_alone(tmp_path, prepare):
    first = items(1)[0]
    records = [first, *(first.__class__("p0.jpg", None, asked, answer) for asked, answer in
                        (("Empty?", ""), ("<image> Colour?", "Red."), ("<image>\n", "Only a picture.")))]  # fmt: skip
    text = prepare(write_csv(tmp_path, records), "--out", tmp_path / "out", "--validation", 0, "--rounds")
    assert "left out 1: empty_answer 1" in text
    assert "questions.csv:3: empty_answer" in text
    assert _values(tmp_path / "out" / "meta.json") == [
        ["<image>\nWhat is in picture 0?", "Thing 0.", " Colour?", "Red."], ["<image>\n", "Only a picture."],
    ]  # fmt: skip


def test_embedded_images_are_compared_by_content(tmp_path, prepare):
    records = items(2)
    records.insert(1, records[0].__class__("other name.jpg", records[0].data, "Colour?", "Red."))
    prepare(write_parquet(tmp_path, records), "--out", tmp_path / "out", "--validation", 0, "--rounds")
    assert [len(turns) for turns in _values(tmp_path / "out" / "meta.json")] == [4, 2]
