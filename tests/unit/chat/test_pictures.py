"""Pictures that cannot be read are told with their names; cuts are drawn."""

import struct
import zlib
from pathlib import Path

import pytest

from megatron_internvlx.chat import pictures
from megatron_internvlx.chat.pictures import ChatError, check_picture, describe_cut, draw_cut, read_picture
from megatron_internvlx.evaluation.generation import Cut
from tests.unit.chat.conftest import save_picture


def bomb() -> bytes:
    """A PNG of some bytes whose header claims 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_files(tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = read_picture(photo)
    assert (picture.name, picture.size, picture.path) == ("my photo.png", (40, 20), photo)
    whole = photo.read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "bomb.png").write_bytes(bomb())
    for name, message in {
        "none.png": "none.png: no such file",
        ".": "a directory",
        "cut.png": "the picture is cut off",
        "empty.png": "the file is empty",
        "text.jpg": "not a picture that Pillow can read",
        "bomb.png": "too large to decode: more than 89,478,485 pixels",
    }.items():
        with pytest.raises(ChatError, match=message) as caught:
            read_picture(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
    monkeypatch.setattr(pictures, "FILE_BYTES", len(whole) - 1)
    with pytest.raises(ChatError, match="are read; save it smaller"):
        read_picture(photo)


def test_a_video_is_named() -> None:
    with pytest.raises(ChatError, match=r"clip\.MP4: videos cannot be asked about; save a frame"):
        check_picture("clip.MP4", b"\0")


def test_preview_is_small_and_upright(tmp_path: Path) -> None:
    picture = read_picture(save_picture(tmp_path / "wide.png", 90, 30))
    small = check_picture("preview", picture.preview(45))
    assert small.size == (45, 15)


def test_a_cut_is_drawn() -> None:
    assert draw_cut(Cut(2, 1, True)) == [
        "┌────┬────┐  ┌────┐",
        "│ 1  │ 2  │  │ 3  │ thumbnail",
        "└────┴────┘  └────┘",
    ]
    assert draw_cut(Cut(1, 2, False)) == ["┌────┐", "│ 1  │", "├────┤", "│ 2  │", "└────┘"]
    assert describe_cut(Cut(3, 2, True)) == "3 x 2 grid and a thumbnail: 7 tiles"
    assert describe_cut(Cut(1, 1, False)) == "1 tile"
