"""Paths in typed lines: dragged, quoted, escaped, with spaces; and words that are no paths."""

from pathlib import Path

import pytest

from megatron_internvlx.chat.line import split_line, split_paths
from megatron_internvlx.chat.pictures import ChatError
from tests.unit.chat.conftest import save_picture


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Current folder, and home: a.jpg, my cat.png."""
    for name in ("a.jpg", "my cat.png"):
        save_picture(tmp_path / name, 8, 8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "text", "names"),
    [
        ("What is this? a.jpg", "What is this?", ["a.jpg"]),
        ("a.jpg what is this?", "what is this?", ["a.jpg"]),
        ("What is in a.jpg?", "What is in", ["a.jpg"]),
        ("'HOME/my cat.png' whose cat?", "whose cat?", ["my cat.png"]),
        ('whose cat? "my cat.png"', "whose cat?", ["my cat.png"]),
        ("HOME/my\\ cat.png whose cat?", "whose cat?", ["my cat.png"]),
        ("HOME/my cat.png whose cat?", "whose cat?", ["my cat.png"]),
        ("./my cat.png", "", ["my cat.png"]),
        ("~/a.jpg", "", ["a.jpg"]),
        ("file://HOME/my%20cat.png", "", ["my cat.png"]),
        ("compare a.jpg and './my cat.png' closely", "compare and closely", ["a.jpg", "my cat.png"]),
        (f"./a.jpg {'word ' * 60}and a.jpg", f"{'word ' * 60}and", ["a.jpg", "a.jpg"]),
        ("two  spaces stay", "two  spaces stay", []),
        ("does `b.jpg` sound like a picture?", "does `b.jpg` sound like a picture?", []),
        ("it is called 'b.jpg', is it?", "it is called 'b.jpg', is it?", []),
        ("don't you see it's a cat's tail", "don't you see it's a cat's tail", []),
        ("a back\\slash and a /slash", "a back\\slash and a /slash", []),
        ("", "", []),
    ],
)
def test_lines(folder: Path, line: str, text: str, names: list[str]) -> None:
    found = split_line(line.replace("HOME", str(folder)))
    assert found.text == text
    assert [path.absolute() for path in found.paths] == [folder / name for name in names]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("What is b.jpg?", "b.jpg: no such file; if it is text"),
        ("'/nowhere/b.jpg' what?", "/nowhere/b.jpg: no such file"),
        ("https://example.org/b.jpg what?", "an address on the web"),
        ("what is ~nouser/b.jpg", "~nouser/b.jpg: no user nouser with a home directory"),
        (f"what is {'x' * 300}.jpg", "x.jpg: no such file"),
        ("what happens in clip.mp4", "clip.mp4: no such file"),
    ],
)
def test_mistakes(folder: Path, line: str, message: str) -> None:
    with pytest.raises(ChatError, match=message.replace("?", r"\?")):
        split_line(line)


def test_paths_of_a_command(folder: Path) -> None:
    assert split_paths("my cat.png") == (Path("my cat.png"),)
    assert split_paths("a.jpg 'my cat.png'") == (Path("a.jpg"), Path("my cat.png"))
    assert split_paths("~/a.jpg") == (folder / "a.jpg",)
    assert split_paths("") == ()
