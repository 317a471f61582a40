"""Pictures of a conversation: read completely and checked before they are asked about."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from megatron_internvlx.data.decode_pil import MAX_PIXELS, image_size, read_header
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.evaluation.generation import Cut
from megatron_internvlx.hf.processing_internvlx import upright

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2", ".heic",
)  # fmt: skip
"""Endings of names that are taken for pictures in a line of text."""
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
FILE_BYTES = 32 << 20
"""Largest file of a picture, in bytes."""


class ChatError(ValueError):
    """Mistake of a user, told in one line; the chat continues."""


@dataclass(frozen=True)
class Picture:
    """A picture that can be decoded."""

    name: str
    data: bytes = field(repr=False)
    """Content of the file."""
    width: int
    """Pixels, upright."""
    height: int
    path: Path | None = None
    """Absolute path; None for an upload."""
    digest: str = ""
    """Short name of the content."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, upright."""
        return self.width, self.height

    def open(self) -> Image.Image:
        """Open the picture for the processor, which turns it upright itself."""
        return Image.open(io.BytesIO(self.data))

    def preview(self, side: int) -> bytes:
        """JPEG of the upright picture, at most `side` pixels wide and high."""
        small = upright(self.open()).convert("RGB")
        small.thumbnail((side, side))
        buffer = io.BytesIO()
        small.save(buffer, format="JPEG", quality=88)
        return buffer.getvalue()


def expand_home(path: Path) -> Path:
    """Path with the home directory instead of `~` or `~name`. Raises ChatError if there is no such user."""
    try:
        return path.expanduser()
    except (RuntimeError, ValueError) as error:
        raise ChatError(f"{path}: no user {path.parts[0][1:]} with a home directory") from error


def read_picture(path: Path) -> Picture:
    """Read a picture file. Raises ChatError with the path and the remedy."""
    path = expand_home(path)
    try:
        if not path.is_file():
            found = path.exists()
            what = "a directory" if path.is_dir() else "not a file" if found else "no such file"
            raise ChatError(f"{path}: {what}")
        size = path.stat().st_size
        if size > FILE_BYTES:
            raise ChatError(_too_large(str(path), size))
        data = path.read_bytes()
    except OSError as error:
        raise ChatError(f"{path}: {error.strerror}") from error
    return check_picture(str(path), data, path.absolute())


def check_picture(name: str, data: bytes, path: Path | None = None) -> Picture:
    """Picture from the content of a file. Raises ChatError that begins with `name`.

    The header is checked before anything is decoded: a small file may claim any number of pixels.
    """
    if name.lower().endswith(VIDEOS):
        raise ChatError(f"{name}: videos cannot be asked about; save a frame of it as a picture")
    if len(data) > FILE_BYTES:
        raise ChatError(_too_large(name, len(data)))
    if not data:
        raise ChatError(f"{name}: the file is empty")
    try:
        width, height = image_size(data)
        with read_header(data) as image:
            image.convert("RGB")
    except BadSample as bad:
        raise ChatError(f"{name}: {_reason(bad)}") from bad
    digest = hashlib.sha256(data).hexdigest()[:16]
    return Picture(Path(name).name or name, data, width, height, path, digest)


def _too_large(name: str, size: int) -> str:
    return f"{name}: {size / 2**20:.0f} MiB, at most {FILE_BYTES >> 20} MiB are read; save it smaller"


def _reason(bad: BadSample) -> str:
    if bad.cause == "bomb":
        return f"too large to decode: more than {MAX_PIXELS:,} pixels; save it smaller"
    if bad.cause == "truncated_image":
        return "the picture is cut off"
    unknown = "cannot identify" in bad.detail
    return "not a picture that Pillow can read" if unknown else f"the picture is damaged ({bad.detail})"


def describe_cut(cut: Cut) -> str:
    """Words for a cut: grid, thumbnail, number of tiles."""
    if cut.tiles == 1:
        return "1 tile"
    thumbnail = " and a thumbnail" if cut.thumbnail else ""
    return f"{cut.cols} x {cut.rows} grid{thumbnail}: {cut.tiles} tiles"


def draw_cut(cut: Cut) -> list[str]:
    """Lines of text that draw the grid with the numbers of its tiles, and the thumbnail beside it."""
    width = max(4, len(str(cut.tiles)) + 2)

    def rule(left: str, middle: str, right: str) -> str:
        return left + middle.join(["─" * width] * cut.cols) + right

    lines = [rule("┌", "┬", "┐")]
    for row in range(cut.rows):
        if row:
            lines.append(rule("├", "┼", "┤"))
        numbers = (f"{row * cut.cols + column + 1}".center(width) for column in range(cut.cols))
        lines.append("│" + "│".join(numbers) + "│")
    lines.append(rule("└", "┴", "┘"))
    if cut.thumbnail:
        beside = ["┌" + "─" * width + "┐", "│" + f"{cut.tiles}".center(width) + "│", "└" + "─" * width + "┘"]
        for number, text in enumerate(beside):
            lines[number] += "  " + text
        lines[1] += " thumbnail"
    return lines
