"""Mistakes that people make end in a report that names the record and the remedy; what is mendable is mended."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.preparing import (
    EMBEDDED,
    FORMATS,
    SECOND,
    Item,
    items,
    photo,
    records_of,
    write_csv,
    write_images,
    write_llava,
)


def _gif() -> bytes:
    buffer = io.BytesIO()
    first, second = Image.open(io.BytesIO(photo(1))), Image.open(io.BytesIO(photo(2)))
    first.save(buffer, "GIF", save_all=True, append_images=[second])
    return buffer.getvalue()


def _wide() -> bytes:
    buffer = io.BytesIO()
    Image.new("I;16", (20, 20), 40_000).save(buffer, "PNG")
    return buffer.getvalue()


HEIC = b"\0\0\0\x18ftypheic" + bytes(200)

# Mistake -> the item that has it, its cause, and words of the remedy.
ITEMS: dict[str, tuple[Callable[[Item], Item], str, str]] = {
    "broken image": (
        lambda one: replace(one, data=photo(9)[:20] + bytes(40)),
        "unreadable_image",
        "broken",
    ),
    "image cut short": (lambda one: replace(one, data=photo(9, 900, 700)[:-900]), "truncated_image", "again"),
    "empty file": (lambda one: replace(one, data=b""), "unreadable_image", "empty"),
    "web page": (lambda one: replace(one, data=b"<!doctype html><p>404"), "unreadable_image", "web page"),
    "HEIC": (lambda one: replace(one, data=HEIC), "unreadable_image", "convert it to JPEG"),
    "animated GIF": (lambda one: replace(one, data=_gif()), "animated_image", "save the one"),
    "16 bits": (lambda one: replace(one, data=_wide()), "unreadable_image", "8 bits"),
    "Git LFS": (
        lambda one: replace(one, data=b"version https://git-lfs.github.com/spec/v1\n"),
        "unreadable_image",
        "git lfs pull",
    ),
    "empty answer": (lambda one: replace(one, answer="  "), "empty_answer", "write it"),
    "reserved token": (lambda one: replace(one, answer="x<|im_end|>"), "reserved_token", "only the template"),
    "huge text": (lambda one: replace(one, answer=r"\alpha " * 100_000), "too_long", "split the record"),
    "image token in answer": (lambda one: replace(one, answer="<image> A"), "placeholder_mismatch", "move"),
}
# These concern names of files, which embedded images do not have.
NAMES: dict[str, tuple[Callable[[Item], Item], str, str]] = {
    "missing image": (lambda one: replace(one, name="gone.jpg", data=None), "missing_image", "correct the name"),
    "wrong case": (lambda one: replace(one, name="P0.JPG", data=None), "missing_image", "there is 'p0.jpg'"),
    "URL": (lambda one: replace(one, name="https://x.org/a.jpg", data=None), "url_image", "nothing is downloaded"),
    "another machine": (lambda one: replace(one, name="/data/al/a.jpg", data=None), "missing_image", "strip-prefix"),
    "out of the root": (lambda one: replace(one, name="../../../a.jpg", data=None), "missing_image", "leads out of"),
    "video": (lambda one: replace(one, name="a.mp4", data=None), "video", "frames"),
    "folder": (lambda one: replace(one, name=".", data=None), "missing_image", "name the file"),
}  # fmt: skip


def _check_second(name, tmp_path, prepare, spoil, cause, remedy, key=None):
    records = items()
    records[1] = spoil(records[1])
    text = prepare(FORMATS[name](tmp_path, records), "--check")
    assert "3 records" in text, text
    (line,) = [line for line in text.splitlines() if line.startswith("    ")]
    assert line.startswith(f"    {key or SECOND[name]}: {cause}: "), line
    assert remedy in line


@pytest.mark.parametrize("mistake", ITEMS)
@pytest.mark.parametrize("name", FORMATS)
def test_mistake_in_one_record(name, mistake, tmp_path, prepare):
    spoil, cause, remedy = ITEMS[mistake]
    _check_second(name, tmp_path, prepare, spoil, cause, remedy)


@pytest.mark.parametrize("mistake", NAMES)
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in (*EMBEDDED, "captions")])
def test_mistake_in_one_name(name, mistake, tmp_path, prepare):
    spoil, cause, remedy = NAMES[mistake]
    _check_second(name, tmp_path, prepare, spoil, cause, remedy)


@pytest.mark.parametrize("name", FORMATS)
def test_duplicates_are_counted_once(name, tmp_path, prepare):
    records = items()
    # A folder cannot hold the same file twice; its copy has another name and the same content.
    records.append(replace(records[1], name="p9.jpg") if name == "captions" else records[1])
    text = prepare(FORMATS[name](tmp_path, records), "--check")
    assert "4 records" in text
    assert f"duplicate: the same as {SECOND[name]}" in text


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_image_that_is_missing(name, tmp_path, prepare):
    _check_second(name, tmp_path, prepare, lambda one: replace(one, data=None), "missing_image", "")


def test_image_without_caption(tmp_path, prepare):
    source = FORMATS["captions"](tmp_path, items())
    (source / "p1.txt").unlink()
    text = prepare(source, "--check")
    assert "p1.jpg: empty_answer: there is no p1.txt beside it: write its caption there" in text


HUMAN, GPT = {"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "B"}
CONVERSATIONS = {
    "two questions in a row": ([HUMAN, {"from": "human", "value": "C?"}, GPT], "turn_order", "join them"),
    "answer first": ([GPT, HUMAN, GPT], "turn_order", "before it"),
    "unknown role": ([HUMAN, {"from": "asistant", "value": "B"}], "unknown_role", "do you mean assistant?"),
    "late system turn": ([HUMAN, GPT, {"from": "system", "value": "x"}], "turn_order", "only the first"),
    "no answer": ([HUMAN], "no_supervision", "add it"),
    "too many <image>": ([{"from": "human", "value": "<image><image>A?"}, GPT], "placeholder_mismatch", "2 <image>"),
    "empty question": ([HUMAN, GPT, {"from": "human", "value": ""}, GPT], "empty_question", "write it"),
    "no text": ([{"from": "human"}, {"from": "gpt", "value": 7}], "bad_message", "a text"),
    "no turns": ([], "missing_key", "list of turns"),
    "text for turns": ("A?", "missing_key", "list of turns"),
    "surrogate": ([{"from": "human", "value": "\ud83d"}, GPT], "bad_message", "surrogate"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", CONVERSATIONS)
@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_mistake_in_a_conversation(form, mistake, tmp_path, prepare):
    turns, cause, remedy = CONVERSATIONS[mistake]
    write_images(tmp_path, items(2))
    rows = [
        json.dumps({"image": "p0.jpg", "conversations": [HUMAN, GPT]}),
        json.dumps({"image": "p1.jpg", "conversations": turns}),
    ]
    text = "\n".join(rows) if form == "jsonl" else f"[{','.join(rows)}]"
    path = tmp_path / f"data.{form}"
    path.write_text(text)
    key = {"json": "data.json[1]", "jsonl": "data.jsonl:2"}[form]
    text = prepare(path, "--check")
    assert "1 records" in text
    (line,) = [line for line in text.splitlines() if line.startswith(f"    {key}: {cause}: ")]
    assert remedy in line


def _llava(folder: Path, *rows: dict | str) -> Path:
    """JSONL of one good record and others."""
    good = {"image": "p0.jpg", "conversations": [HUMAN, GPT]}
    write_images(folder, items(3))
    lines = [row if isinstance(row, str) else json.dumps(row) for row in (good, *rows)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("{'image': 'p1.jpg'}", "json.dumps"),
        ('{"image": "p1.jpg"},', "without a comma"),
        ('{"image": "p1.jpg"', "repair"),
        ('{"image": "p1.jpg", "image": "p2.jpg"}', "duplicate key"),
        ("[1, 2]", "expected a JSON object"),
        ('"' + "[" * 100_000, "repair"),
    ],
)
def test_broken_line_costs_itself(line, remedy, tmp_path, prepare):
    text = prepare(_llava(tmp_path, line), "--check")
    assert "1 records" in text
    assert "data.jsonl:2: malformed_json" in text
    assert remedy in text


def test_array_called_jsonl_and_lines_called_json(tmp_path, prepare):
    write_llava(tmp_path, items())
    array, lines = (tmp_path / "llava.json").read_text(), tmp_path / "lines.json"
    (tmp_path / "array.jsonl").write_text(array)
    lines.write_text("".join(json.dumps(row) + "\n" for row in json.loads(array)))
    for path in (tmp_path / "array.jsonl", lines):
        text = prepare(path, "--check")
        assert "in spite of its name" in text
        assert "4 records" in text


def test_broken_array_is_refused_with_the_place(tmp_path, prepare):
    text = write_llava(tmp_path, items()).read_text()
    (tmp_path / "llava.json").write_text(text[:-30])
    assert "broken after 3 whole elements" in prepare(
        tmp_path / "llava.json", "--out", tmp_path / "out", code=2
    )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_object_of_another_format_is_refused(tmp_path, prepare):
    coco = {"images": [{"file_name": "p0.jpg"}], "annotations": [], "categories": []}
    (tmp_path / "coco.json").write_text(json.dumps(coco, indent=1))
    text = prepare(tmp_path / "coco.json", "--check", code=2)
    assert "keys images, annotations, categories" in text


@pytest.mark.parametrize(
    ("header", "advice"),
    [
        ("imgae,question,answer", "--image-column imgae"),
        ("image,question,anwser", "--answer-column anwser"),
        ("p0.jpg,A?,B", "no column has a usual name"),
    ],
)
def test_wrong_columns_are_refused_with_the_flag(header, advice, tmp_path, prepare):
    write_images(tmp_path, items(1))
    (tmp_path / "t.csv").write_text(f"{header}\np0.jpg,A?,B\n")
    assert advice in prepare(tmp_path / "t.csv", "--check", code=2)


def test_wrong_column_of_the_user_suggests(tmp_path, prepare):
    write_csv(tmp_path, items(2))
    text = prepare(tmp_path, "--check", "--answer-column", "anser", code=2)
    assert "has the columns image, question, answer (do you mean answer?)" in text


@pytest.mark.parametrize(
    ("encoding", "separator"),
    [("utf-8-sig", ","), ("utf-16", "\t"), ("utf-8", ";"), ("utf-8", "|"), ("utf-8-sig", ";")],
)
def test_marks_and_separators_of_spreadsheets(encoding, separator, tmp_path, prepare):
    write_images(tmp_path, items(1))
    rows = [("image", "question", "answer"), ("p0.jpg", "Où, qui?", "é, ü")]
    text = "\r\n".join(separator.join(f'"{cell}"' for cell in row) for row in rows)
    (tmp_path / "t.csv").write_text(text, encoding=encoding)
    prepare(tmp_path / "t.csv", "--out", tmp_path / "out")
    (record,) = records_of(tmp_path / "out" / "meta.json")
    assert [turn["value"] for turn in record["turns"]] == ["<image>\nOù, qui?", "é, ü"]


def test_table_of_another_encoding(tmp_path, prepare):
    write_images(tmp_path, items(2))
    (tmp_path / "t.csv").write_text("image,question,answer\np0.jpg,A?,B\np1.jpg,Où?,é\n", encoding="cp1252")
    assert "t.csv:3: bad_encoding" in prepare(tmp_path / "t.csv", "--check")
    assert "2 records" in prepare(tmp_path / "t.csv", "--check", "--encoding", "cp1252")
    assert "unknown; usual ones" in prepare(tmp_path / "t.csv", "--check", "--encoding", "x-y", code=2)


@pytest.mark.parametrize(
    ("row", "remedy"),
    [("p1.jpg,A, b?,B", "put texts that contain ',' in quotes"), ('p1.jpg,"A?,B', "close the quotes")],
)
def test_row_with_other_cells(row, remedy, tmp_path, prepare):
    write_images(tmp_path, items(2))
    (tmp_path / "t.csv").write_text(f"image,question,answer\np0.jpg,A?,B\n{row}\n")
    text = prepare(tmp_path / "t.csv", "--check")
    assert "t.csv:3: bad_row" in text
    assert remedy in text


def test_wrong_root_names_the_right_one(tmp_path, prepare):
    source = write_llava(tmp_path, items())
    other = tmp_path / "far" / "away" / "pictures"
    other.mkdir(parents=True)
    for path in tmp_path.glob("*.jpg"):
        path.rename(other / path.name)
    (tmp_path / "empty").mkdir()
    text = prepare(source, "--check", "--root", tmp_path / "empty", code=2)
    assert "nothing to train on" in text
    assert f"--root {other} would find 4 of 4 missing images" in text
    assert "4 records" in prepare(source, "--check", "--root", other)
    assert "no such folder" in prepare(source, "--check", "--root", tmp_path / "none", code=2)


def test_paths_of_another_machine_name_the_prefix(tmp_path, prepare):
    write_images(tmp_path, items(2))
    rows = [{"image": f"/data/al/{one.name}", "conversations": [HUMAN, GPT]} for one in items(2)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    text = prepare(tmp_path / "d.json", "--check", code=2)
    assert f"--root {tmp_path} --strip-prefix /data/al would find 2 of 2" in text
    assert "2 records" in prepare(
        tmp_path / "d.json", "--check", "--root", tmp_path, "--strip-prefix", "/data/al"
    )


def test_what_is_mendable_is_mended_and_counted(tmp_path, prepare):
    asked = {"from": "human", "value": "A?"}
    rows = [
        {"image": "p1.jpg", "conversations": [asked, GPT]},
        {"image": ["p1.jpg", "p2.jpg"], "conversations": [asked, GPT]},
        {"image": " p1", "conversations": [{"from": "Human", "value": "<image>B?"}, GPT]},
        {"image": "p2.jpg", "conversations": [{"from": "system", "value": ""}, HUMAN, GPT, asked]},
        {"image": "x\\..\\p2.jpg", "conversations": [{"from": "human", "value": "<image>C?"}, GPT]},
    ]
    text = prepare(_llava(tmp_path, *rows), "--out", tmp_path / "out", "--validation", 0)
    assert "left out" not in text
    for mend in (
        "put <image> in front: 2", "wrote roles in lower case: 1", "added the suffix of an image's file: 1",
        "dropped an empty system turn: 1", "dropped a last question without an answer: 1", "wrote / for \\",
    ):  # fmt: skip
        assert mend in text, text
    found = records_of(tmp_path / "out" / "meta.json")
    assert found[2]["turns"][0]["value"] == "<image>\n<image>\nA?"
    assert [turn["from"] for turn in found[4]["turns"]] == ["human", "gpt"]


def test_transparency_is_noted(tmp_path, prepare):
    buffer = io.BytesIO()
    Image.new("RGBA", (9, 9), (1, 2, 3, 0)).save(buffer, "PNG")
    write_csv(tmp_path, [Item("a.png", buffer.getvalue(), "A?", "B")])
    assert "note: transparency is ignored" in prepare(tmp_path, "--check")


def test_bad_base64(tmp_path, prepare):
    bad = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}]}]}  # fmt: skip # noqa: E501
    good = {"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"}]}
    (tmp_path / "m.jsonl").write_text(f"{json.dumps(bad)}\n{json.dumps(good)}\n")
    assert "m.jsonl:1: unreadable_image: the image: invalid base64" in prepare(
        tmp_path / "m.jsonl", "--check"
    )


def test_image_as_plain_base64_in_a_table(tmp_path, prepare):
    text = base64.b64encode(photo(1, 200, 200)).decode()
    (tmp_path / "t.tsv").write_text(f"image\tquestion\tanswer\n{text}\tA?\tB\n")
    assert "1 records, 1 images" in prepare(tmp_path / "t.tsv", "--check")
