"""The tile picture: its table's numbers, its PNG, its errors."""

import pytest
from PIL import Image

from megatron_internvlx.commands import tile_cuts, tiles


def image(path, size):
    Image.new("RGB", size, (200, 80, 40)).save(path)
    return path


def run(path, out, *more):
    return tiles.main([str(path), "--out", str(out), *map(str, more)])


def test_table_and_picture(tmp_path, capsys):
    assert run(image(tmp_path / "a.png", (800, 600)), tmp_path / "tiles.png") == 0
    rows = {line.split()[0]: line.split(maxsplit=8) for line in capsys.readouterr().out.splitlines()[1:4]}
    # 4:3 is at hand with 12 tiles; four cover the image, and less than three hold its pixels.
    assert rows["off"][:8] == ["off", "4", "x", "3", "yes", "13", str(13 * 64), str(13 * 256)]
    assert rows["edge"][:8] == ["edge", "2", "x", "2", "yes", "5", str(5 * 64), str(5 * 256)]
    assert rows["area"][:8] == ["area", "1", "x", "1", "no", "1", "64", "256"]
    assert rows["edge"][8].startswith("the released InternVL-X rule")
    with Image.open(tmp_path / "tiles.png") as drawn:
        drawn.load()
        assert drawn.format == "PNG"


def test_no_thumbnail(tmp_path, capsys):
    assert run(image(tmp_path / "a.png", (900, 450)), tmp_path / "t.png", "--no-thumbnail") == 0
    assert "no" in capsys.readouterr().out.splitlines()[2].split()


@pytest.mark.parametrize("size", [(1, 1), (5000, 40), (40, 5000)])
def test_extreme_sizes(tmp_path, size):
    assert run(image(tmp_path / "a.png", size), tmp_path / "t.png") == 0


def test_tokens_per_tile():
    assert tile_cuts.tokens_per_tile(448, 14, 0.25) == 64
    assert tile_cuts.tokens_per_tile(448, 14, 0.5) == 256
    assert tile_cuts.tokens_per_tile(224, 28, 0.5) == 16


@pytest.mark.parametrize("more", [["--tile-size", 450], ["--low-ratio", 0.3], ["--low-ratio", 0]])
def test_ratios_that_give_no_grid(tmp_path, capsys, more):
    assert run(image(tmp_path / "a.png", (50, 50)), tmp_path / "t.png", *more) == 2
    assert "whole number" in capsys.readouterr().err


def test_files_that_are_no_images(tmp_path, capsys):
    assert run(tmp_path / "none.png", tmp_path / "t.png") == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("words")
    assert run(tmp_path / "text.png", tmp_path / "t.png") == 2
    assert "not an image" in capsys.readouterr().err
    whole = image(tmp_path / "a.jpg", (300, 300)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    assert run(tmp_path / "cut.jpg", tmp_path / "t.png") == 2
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "t.png").exists()


@pytest.mark.parametrize("more", [["--max-tiles", 0], ["--min-tiles", 5, "--max-tiles", 2], ["--patch", 0]])
def test_numbers_that_mean_nothing(tmp_path, capsys, more):
    assert run(image(tmp_path / "a.png", (50, 50)), tmp_path / "t.png", *more) == 2
    assert "must be" in capsys.readouterr().err
