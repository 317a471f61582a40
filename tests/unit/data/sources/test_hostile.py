"""Files made to harm or to break: nothing is written outside the output, nothing fills the memory, nothing crashes."""

import gzip
import json
import os
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_internvlx.data.sources import pictures, text_files
from megatron_internvlx.data.sources.record import LeftOut, ReadSettings
from megatron_internvlx.data.sources.tables import read_table
from megatron_internvlx.data.sources.webdataset import read_shards
from tests.preparing import add_member, items, photo, write_csv, write_llava, write_parquet, write_shards


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "name", ["../../evil", "/tmp/evil", "a/../../evil", "C:\\evil", "..//..//evil", "e\nvil"]
)
def test_names_in_a_shard_write_nothing_outside(name, tmp_path, prepare):
    inside = tmp_path / "in" / "deep"
    inside.mkdir(parents=True)
    with tarfile.open(inside / "s.tar", "w") as tar:
        add_member(tar, f"{name}.jpg", photo(1))
        add_member(tar, f"{name}.txt", b"A thing.")
    before = _files(tmp_path)
    prepare(inside / "s.tar", "--out", tmp_path / "out", "--validation", 0)
    new = {path for path in _files(tmp_path) - before if not path.startswith("out")}
    assert not new
    assert len(list((tmp_path / "out" / "images").rglob("*.jpg"))) == 1


def test_links_and_devices_in_a_shard_are_left_out(tmp_path, prepare):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(photo(9))
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
            add_member(tar, f"{number}.txt", b"A thing.")
        add_member(tar, "9.jpg", photo(1))
        add_member(tar, "9.txt", b"A good thing.")
    text = prepare(tmp_path / "s.tar", "--out", tmp_path / "out", "--validation", 0)
    assert "1 records" in text
    assert "bad_member 4" in text
    assert [path.read_bytes() for path in (tmp_path / "out" / "images").rglob("*.jpg")] == [photo(1)]


@pytest.mark.parametrize("cut", [1, 700, 3000])
def test_truncated_shard_keeps_what_is_before(cut, tmp_path, prepare):
    source = write_shards(tmp_path, items(6))
    data = source.read_bytes().rstrip(b"\0")
    source.write_bytes(data[:-cut])
    text = prepare(source, "--check")
    assert "bad_member: the shard is broken or ends here" in text
    assert any(f"{count} records" in text for count in (3, 4, 5))


def test_compressed_shard_of_noise_and_cut(tmp_path, prepare):
    (tmp_path / "s.tar").write_bytes(os.urandom(5000))
    assert "bad_member" in prepare(tmp_path / "s.tar", "--check", code=2)
    write_shards(tmp_path, items(2))
    packed = gzip.compress((tmp_path / "shard-000000.tar").read_bytes())
    (tmp_path / "cut.tar.gz").write_bytes(packed[: len(packed) // 2])
    assert "bad_member" in prepare(tmp_path / "cut.tar.gz", "--check", code=2)


def test_huge_member_is_not_read(tmp_path):
    # A header that announces 1 TB; the file itself is short.
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    (tmp_path / "s.tar").write_bytes(info.tobuf() + bytes(512))
    tracemalloc.start()
    found = list(read_shards([tmp_path / "s.tar"], ReadSettings()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(isinstance(one, LeftOut) for one in found)
    assert peak < 1 << 24


def test_image_bombs(tmp_path, prepare):
    # A small file whose header announces 400 million pixels.
    data = bytearray(photo(1, kind="PNG"))
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    records = items(3)
    records[1].data, records[1].name = bytes(data), "p1.png"
    text = prepare(write_csv(tmp_path, records), "--check")
    assert "questions.csv:3: bomb: p1.png: too large to decode: Image size (400000000 pixels)" in text


def test_other_decoders_are_never_started(tmp_path, prepare):
    # Pillow would run Ghostscript for this one.
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    records = items(2)
    records[1].data = script
    assert "not a JPEG, PNG" in prepare(write_csv(tmp_path, records), "--check")


def test_large_file_is_refused_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_IMAGE_BYTES", 1000)
    (tmp_path / "a.jpg").write_bytes(bytes(1001))
    for source in (tmp_path / "a.jpg", bytes(1001)):
        with pytest.raises(LeftOut, match="1,001 bytes"):
            pictures.examine(source)


def test_links_in_a_folder_lead_to_images_only(tmp_path, prepare):
    folder = tmp_path / "in"
    folder.mkdir()
    write_csv(folder, items(3))
    (tmp_path / "secret").write_text("password")
    for name, target in (("p0.jpg", tmp_path / "secret"), ("p1.jpg", folder / "p1.jpg")):
        (folder / name).unlink()
        (folder / name).symlink_to(target)  # the second one leads to itself
    text = prepare(folder, "--out", tmp_path / "out", "--copy")
    assert "1 records" in text
    assert not any("password" in path.read_text(errors="ignore") for path in (tmp_path / "out").rglob("*.*")
                   if path.is_file())  # fmt: skip


def test_rows_of_a_table_are_streamed(tmp_path):
    path = tmp_path / "t.csv"
    with path.open("w") as file:
        file.write("image,question,answer\n")
        for _ in range(10):
            file.write("p.jpg,What is it?,A thing.\n" * 1000)
    _, records, _ = read_table(path, ReadSettings())
    tracemalloc.start()
    count = sum(1 for _ in records)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000
    assert peak < 1 << 20, "one row at a time"


def test_a_json_array_is_streamed(tmp_path):
    row = json.dumps({"image": "p.jpg", "text": "x" * 1000})
    path = tmp_path / "a.json"
    path.write_text("[" + ",\n".join([row] * 5_000) + "]")
    tracemalloc.start()
    found = sum(not isinstance(piece, LeftOut) for piece in text_files.json_array(path, "a.json", None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == 5_000
    assert path.stat().st_size > 4_500_000
    # The buffer and its copy; the text and its objects take over 10 MB.
    assert peak < 8 << 20


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_array_elements_across_pieces(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_CHUNK", chunk)
    values = [1, 23, 'a,]\\"[', {"b": [1, {"c": None}]}, [], {}, "ü" * 20, -1.5e10, True, None, 1234567]
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(
            json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8"
        )
        pieces = list(text_files.json_array(tmp_path / "a.json", "a", None))
        assert [piece[1] for piece in pieces] == values
    (tmp_path / "a.json").write_text("[]")
    assert list(text_files.json_array(tmp_path / "a.json", "a", None)) == []
    for text in ("[1,", "[1 2]", "[1,]", '["a', "[nul]", "[", "[{]"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match="broken after"):
            list(text_files.json_array(tmp_path / "a.json", "a", None))


def test_error_far_from_the_end_is_found_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_CHUNK", 100)
    path = tmp_path / "a.json"
    path.write_text("[{'a': 1}" + ',{"a": 1}' * 100_000 + "]")
    with path.open() as file:
        reader = text_files._ArrayReader(file, path)
        reader.next_character()
        reader.place += 1
        with pytest.raises(ValueError, match="property name"):
            reader.element()
        assert file.tell() < 20_000


def test_parquet_with_nulls_everywhere(tmp_path, prepare):
    image = {"bytes": photo(1), "path": None}
    rows = [
        {"image": image, "question": "A?", "answer": "b"},
        {"image": None, "question": "A?", "answer": "b"},
        {"image": {"bytes": None, "path": None}, "question": "A?", "answer": "b"},
        {"image": image, "question": None, "answer": "b"},
        {"image": image, "question": "A?", "answer": None},
        {"image": None, "question": None, "answer": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    text = prepare(tmp_path / "a.parquet", "--check")
    assert "2 records" in text  # a picture without a question is one with its answer alone
    assert "left out 4: missing_image 3, empty_answer 1" in text
    rows = [{"images": [None, image], "conversations": None}, {"images": None, "conversations": [None]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert "missing_key 2" in prepare(tmp_path / "b.parquet", "--check", code=2)


def test_broken_parquet(tmp_path, prepare):
    source = write_parquet(tmp_path, items(3))
    data = source.read_bytes()
    source.write_bytes(data[: len(data) // 2])
    assert "not a readable Parquet file" in prepare(source, "--check", code=2)
    source.write_bytes(data[:100] + b"\xff" * 400 + data[500:])
    text = prepare(source, "--check", code=2)
    assert "broken from this row on" in text


@pytest.mark.parametrize(
    ("name", "data", "remedy"),
    [
        ("t.csv", b"PK\x03\x04", "save the table as CSV"),
        ("t.csv", b"", "empty"),
        ("t.csv", b"image,question\0,answer\n", "not a text table"),
        ("t.csv", b"image,image,answer\n", "rename one"),
        ("t.csv", b"\xff\xffimage,answer\n", "UTF-8"),
        ("t.bin", b"\x00\x01", "--format"),
        ("t.json", b"   ", "empty"),
        ("t.jsonl", b"{}\n", "nothing to train on"),
        ("t.json", b"[]", "there are no records"),
        ("t.json", b"[" * 100_000, "broken after 0"),
        ("t.parquet", b"PAR1", "not a readable Parquet"),
    ],
)
def test_files_that_are_something_else(name, data, remedy, tmp_path, prepare):
    (tmp_path / name).write_bytes(data)
    assert remedy in prepare(tmp_path / name, "--check", code=2)


def test_folders_with_nothing_or_too_much(tmp_path, prepare):
    assert "nothing to read in it" in prepare(tmp_path, "--check", code=2)
    (tmp_path / "a.jpg").write_bytes(photo())
    assert "questions.csv with the columns image,question,answer" in prepare(tmp_path, "--check", code=2)
    write_csv(tmp_path, items(2))
    write_llava(tmp_path, items(2))
    assert "2 files could be meant: questions.csv, llava.json" in prepare(tmp_path, "--check", code=2)
    assert "2 records" in prepare(tmp_path, "--check", "--format", "table")
    assert "no such file" in prepare(tmp_path / "none", "--check", code=2)


def test_splits_of_shards(tmp_path, prepare):
    (tmp_path / "data").mkdir()
    source = write_parquet(tmp_path / "data", items(2))
    source.with_name("test-00000-of-00001.parquet").write_bytes(source.read_bytes())
    assert "2 records" in prepare(tmp_path, "--check")
    source.rename(source.with_name("validation-00000-of-00001.parquet"))
    assert "name the files of one" in prepare(tmp_path, "--check", code=2)


def test_half_a_surrogate_and_infinity_beside_a_record_are_dropped(tmp_path, prepare):
    (tmp_path / "a.jpg").write_bytes(photo())
    turns = '[{"from": "human", "value": "A?"}, {"from": "gpt", "value": "b"}]'
    row = f'{{"image": "a.jpg", "id": "x\\ud83d", "k\\udc00": 1, "far": 1e999, "n": 3, "conversations": {turns}}}'
    (tmp_path / "d.jsonl").write_text(row + "\n")
    prepare(tmp_path / "d.jsonl", "--out", tmp_path / "out")
    (line,) = (tmp_path / "out" / "train" / "d.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line).keys() == {"n", "source", "image", "conversations"}


def test_file_name_that_is_not_utf8_costs_its_record(tmp_path, prepare):
    for name in (b"caf\xe9", b"b"):
        (tmp_path / os.fsdecode(name + b".jpg")).write_bytes(photo(len(name)))
        (tmp_path / os.fsdecode(name + b".txt")).write_text("A thing.")
    text = prepare(tmp_path, "--out", tmp_path / "out")
    assert "1 records" in text
    assert "bad_encoding: the name of its image's file is not UTF-8" in text


def test_broken_picture_of_an_unchecked_set_is_a_sentence_on_the_page(tmp_path, prepare):
    records = items(2)
    records[1].data = photo(1, 600, 400)[:1500]
    prepare(write_csv(tmp_path, records), "--out", tmp_path / "out", "--headers-only", "--validation", 0)
    page = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert "p1.jpg cannot be decoded, training will refuse it" in page
    assert page.count("data:image/jpeg") == 1
