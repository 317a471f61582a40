"""Sample photographs: the same bytes twice, a table that names them, nothing half written."""

import csv

import pytest
from PIL import Image

from tools import sample_photos


def test_photographs_and_their_table(tmp_path, capsys):
    for name in ("a", "b"):
        assert sample_photos.main([str(tmp_path / name), "--count", "11"]) == 0
    assert "11 photographs, 22 questions" in capsys.readouterr().out
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1]
    with (tmp_path / "a" / "questions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 22 and {row["image"] for row in rows} == files[0].keys() - {"questions.csv"}
    # The eleventh is another crop of the first.
    assert rows[0]["answer"] == rows[20]["answer"] == "an astronaut"
    assert files[0]["photo_000.jpg"] != files[0]["photo_010.jpg"]
    with Image.open(tmp_path / "a" / "photo_000.jpg") as image:
        assert max(image.size) <= sample_photos.LARGEST


def test_mistakes_leave_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine").mkdir()
    assert sample_photos.main([str(tmp_path / "mine")]) == 2
    assert "give the name of a new folder" in capsys.readouterr().err
    monkeypatch.setitem(sample_photos.PHOTOS, "skimage/data/none.png", ("x", "y"))
    assert sample_photos.main([str(tmp_path / "new")]) == 2
    assert "make setup" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("count", ["0", "-1", "x"])
def test_counts_are_checked(count):
    with pytest.raises(SystemExit) as stopped:
        sample_photos.main(["out", "--count", count])
    assert stopped.value.code == 2
