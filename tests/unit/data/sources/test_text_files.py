"""Tables with broken quotes, odd headers and marks: what is lost is counted and named by its lines."""

import pytest

from megatron_internvlx.data.sources.record import LeftOut
from megatron_internvlx.data.sources.text_files import table_rows
from tests.preparing import items, write_captions, write_images


def _read(path, text, encoding=None):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    header, separator, rows = table_rows(path, path.name, encoding)
    rows = list(rows)
    lost = [row for row in rows if isinstance(row, LeftOut)]
    return header, separator, [row for row in rows if not isinstance(row, LeftOut)], lost


@pytest.mark.parametrize(
    ("rows", "lines", "kept"),
    [
        ('a,"q,1\nb,q,2\nc,q,3\n', [2, 3, 4], 0),
        ('a,q,1\nb,"q,2\nc,"q",3\nd,q,4\n', [3, 4], 2),
        ('a,"q"x,1\nb,q,2\n', [2], 1),
    ],
)
def test_lines_lost_by_an_open_quote_are_counted(rows, lines, kept, tmp_path):
    _, _, good, lost = _read(tmp_path / "t.csv", "image,question,answer\n" + rows)
    assert [one.key for one in lost] == [f"t.csv:{line}" for line in lines]
    assert (f"lines {lines[0]}-{lines[-1]} are lost" in lost[0].detail) == (len(lines) > 1)
    assert len(good) == kept


def test_row_over_several_lines_with_too_few_cells_names_them(tmp_path):
    _, _, good, (lost,) = _read(tmp_path / "t.csv", 'image,question,answer\na,"q\nb,q,2\nc,"\nd,q,4\n')
    assert "2 cells in lines 2-4" in lost.detail
    assert [key for key, _ in good] == ["t.csv:5"]


def test_header_with_a_broken_quote_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the first line does not name the columns"):
        _read(tmp_path / "t.csv", 'image,"question"x,answer\na,b,c\n')


@pytest.mark.parametrize("encoding", [None, "utf-8", "UTF8"])
def test_byte_order_mark_is_no_part_of_a_name(encoding, tmp_path):
    header, *_ = _read(tmp_path / "t.csv", b"\xef\xbb\xbfimage,answer\na,b\n", encoding)
    assert header == ["image", "answer"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_separator_named_by_the_first_line(mark, tmp_path):
    header, separator, good, lost = _read(
        tmp_path / "t.csv", f"{mark}sep=;\r\nimage;answer\r\na;b,c,d,e\r\nf\r\n"
    )
    assert (header, separator) == (["image", "answer"], ";")
    assert good == [("t.csv:3", {"image": "a", "answer": "b,c,d,e"})]
    assert lost[0].key == "t.csv:4"


def test_encoding_that_is_none_of_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--encoding base64: unknown"):
        _read(tmp_path / "t.csv", "image,answer\n", "base64")


def test_table_whose_first_column_begins_with_pk(tmp_path, prepare):
    write_images(tmp_path, items(1))
    (tmp_path / "t.csv").write_text("PK,image,question,answer\n1,p0.jpg,A?,b\n")
    text = prepare(tmp_path / "t.csv", "--check")
    assert "1 records" in text
    assert "columns not read: PK" in text


def test_mistyped_column_of_questions_is_refused(tmp_path, prepare):
    write_images(tmp_path, items(1))
    (tmp_path / "t.csv").write_text("image,qestion,answer,user_id\np0.jpg,A?,b,1\n")
    assert "--question-column qestion" in prepare(tmp_path / "t.csv", "--check", code=2)
    text = prepare(tmp_path / "t.csv", "--check", "--question", "What?")
    assert "columns not read: qestion, user_id" in text
    (tmp_path / "t.csv").write_text("image,question,answer\np0.jpg,A?,b\n")
    text = prepare(tmp_path / "t.csv", "--check", "--question", "What?")
    assert "--question is not used: the column 'question'" in text
    (tmp_path / "t.csv").write_text("image,answer\np0.jpg,b\n")
    assert "no column of questions: each is 'Describe the image.'" in prepare(tmp_path / "t.csv", "--check")


def test_caption_with_its_suffix_in_capitals(tmp_path, prepare):
    write_captions(tmp_path, items(2))
    (tmp_path / "p0.txt").rename(tmp_path / "p0.TXT")
    assert "2 records" in prepare(tmp_path, "--check")
