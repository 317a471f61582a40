"""A typed line: its text, and the pictures that it names by path.

Terminals write the path of a dragged file between quotes, with a backslash before a space, or as it is; file
managers copy `file://` addresses.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from megatron_internvlx.chat.pictures import SUFFIXES, VIDEOS, ChatError, expand_home

# Parts of a line: text in backticks, in quotes, or a word whose spaces may be escaped.
_PARTS = re.compile(r"`[^`]*`|'[^']*'|\"[^\"]*\"|(?:\\.|[^\s\\])+|\\|\s+")
_WEB = re.compile(r"^(https?|ftp|s3|gs)://", re.IGNORECASE)
_START = ("/", "~/", "./", "../")


@dataclass(frozen=True)
class Line:
    """A line without its paths."""

    text: str
    paths: tuple[Path, ...]


def split_line(line: str) -> Line:
    """Separate a line into text and paths of pictures.

    A word is a path if it ends like a picture's name. Between backticks it is text. Raises ChatError for a path that
    does not exist, a video, or an address on the web.
    """
    parts = _PARTS.findall(line.strip())
    text: list[str] = []
    paths: list[Path] = []
    at = 0
    while at < len(parts):
        path, length = _path_at(parts, at)
        if path is None:
            text.append(parts[at])
        else:
            paths.append(path)
        at += length
    # A path at the end of a sentence leaves its space behind.
    joined = re.sub(r"[ \t]{2,}", " ", "".join(text)) if paths else "".join(text)
    return Line(joined.strip(), tuple(paths))


def split_paths(text: str) -> tuple[Path, ...]:
    """Paths of a command such as `/image`: several words are several paths, or one with spaces if it exists."""
    whole = expand_home(Path(text))
    if _is_file(whole):
        return (whole,)
    words = [part for part in _PARTS.findall(text) if not part.isspace()]
    return tuple(_plain_path(_unquote(word)) for word in words)


def _path_at(parts: list[str], at: int) -> tuple[Path | None, int]:
    """Path that begins at a part, and the number of its parts; (None, 1) if none begins there."""
    part = parts[at]
    if part.isspace() or part.startswith("`"):
        return None, 1
    if part.startswith(_START):
        # The longest run of words that is a file: a path with spaces that nothing quotes.
        for end in range(len(parts), at + 1, -1):
            joined = "".join(parts[at:end])
            if joined.lower().endswith(SUFFIXES) and _is_file(expand_home(Path(joined))):
                return expand_home(Path(joined)), end - at
    name = _unquote(part)
    if not name.lower().endswith((*SUFFIXES, *VIDEOS)):
        bare = name.rstrip("?!.,;:)")
        if not bare.lower().endswith((*SUFFIXES, *VIDEOS)) or part[0] in "'\"":
            return None, 1
        name = bare
    if part[0] in "'\"" and not _is_file(_plain_path(name)) and "/" not in name:
        return None, 1  # words between quotes, such as a file name that is asked about
    if _WEB.match(name):
        raise ChatError(f"{name}: an address on the web; download the picture and give its path")
    path = _plain_path(name)
    if not _is_file(path):
        raise ChatError(f"{path}: no such file; if it is text and not a path, write it between backticks")
    return path, 1


def _unquote(part: str) -> str:
    if part[0] in "'\"" and len(part) > 1 and part[-1] == part[0]:
        return part[1:-1]
    return re.sub(r"\\(.)", r"\1", part)


def _plain_path(name: str) -> Path:
    """Path of a name that may be a `file://` address or begin with `~`."""
    if name.startswith("file://"):
        return Path(unquote(urlparse(name).path))
    return expand_home(Path(name))


def _is_file(path: Path) -> bool:
    """Whether a path is a file; one that is too long for a name is none, such as a long sentence."""
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise
