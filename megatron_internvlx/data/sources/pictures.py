"""Images of records: found on the disk, checked as training would decode them, and known by their content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlparse

from PIL import Image

from megatron_internvlx.data.decode_pil import orientation, read_header
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.data.sources.record import MAX_IMAGE_BYTES, LeftOut
from megatron_internvlx.paths import is_url

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".flv", ".wmv", ".m4v"}
TRIMMED = "removed white space around an image's name"
SLASHES = "wrote / for \\ in an image's name"
TRANSPARENT = "transparency is ignored: the colours below it are seen"
ADDED_SUFFIX = "added the suffix of an image's file"
_SHALLOW, _MOST_FOLDERS = 3, 2000
_WIDE_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_NO_IMAGES = (
    (b"version https://git-lfs", "a Git LFS pointer: run 'git lfs pull'"),
    (b"<?xml", "an SVG or XML file: convert it to PNG"),
    (b"<svg", "an SVG file: convert it to PNG"),
    (b"<", "a web page or other markup (a failed download?): get the file again"),
    (b"%PDF", "a PDF file: convert its pages to PNG"),
)


@dataclass(frozen=True, slots=True)
class Picture:
    """A good image: digest of its file (16 bytes), upright size in pixels, suffix of its format, remark or ""."""

    digest: bytes
    width: int
    height: int
    suffix: str
    remark: str = ""


def _format_of(head: bytes) -> str | None:
    """Suffix of an image file by its first bytes; None for formats that are not read."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return ".avif"
    starts = {
        b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n\x1a\n": ".png", b"GIF8": ".gif", b"BM": ".bmp",
        b"II*\0": ".tif", b"MM\0*": ".tif",
    }  # fmt: skip
    return next((suffix for start, suffix in starts.items() if head.startswith(start)), None)


def _no_image(head: bytes) -> str:
    """Kind of a file that is not an image that training reads, with the remedy."""
    if not head:
        return "the file is empty: get it again"
    if head[4:8] == b"ftyp":
        if head[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
            return "a HEIC file: convert it to JPEG (phones can be set to 'most compatible')"
        return "a video file: videos are not supported; save frames as images"
    plain = head.lstrip().lower()
    found = next((what for start, what in _NO_IMAGES if plain.startswith(start.lower())), None)
    return found or "not a JPEG, PNG, WebP, BMP, TIFF, GIF or AVIF file: convert it"


def _misread(image: Image.Image) -> tuple[str, str] | None:
    """Cause and remedy of a good image that training would not see as it is meant; None if it would."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # phones and cameras add a preview
        remedy = "of which training would see the first: save the one that matters"
        return "animated_image", f"{frames} frames, {remedy}"
    if image.mode in _WIDE_MODES:
        return "unreadable_image", f"pixels of over 8 bits ({image.mode}): save it with 8 bits per channel"
    return None


def examine(source: Path | bytes, *, decode: bool = True) -> Picture:
    """Check an image file as training would decode it. Raises LeftOut with cause and remedy, without a key.

    Args:
        source: path, or the bytes of the file.
        decode: whether the pixels are decoded too, which alone finds files that end early.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > MAX_IMAGE_BYTES:
        raise LeftOut("", "bomb", f"{size:,} bytes, the limit is {MAX_IMAGE_BYTES:,}: make it smaller")
    data = source if isinstance(source, bytes) else source.read_bytes()
    suffix = _format_of(data[:32])
    if suffix is None:
        why = _no_image(data[:64])
        raise LeftOut("", "video" if why.startswith("a video") else "unreadable_image", why)
    try:
        with read_header(data) as image:
            width, height = image.size
            if orientation(image) >= 5:
                width, height = height, width
            transparent = "A" in image.getbands() or "transparency" in image.info
            problem = _misread(image)
            if decode and problem is None:
                image.draft(
                    "RGB", (max(1, image.width // 8), max(1, image.height // 8))
                )  # JPEG: a fast decoding
                image.load()
    except BadSample as bad:
        says = {"truncated_image": "the file ends too early: get it again: ", "bomb": ""}
        detail = says.get(bad.cause, "broken: get it again: ") + bad.detail
        raise LeftOut("", bad.cause, detail) from bad
    if problem is not None:
        raise LeftOut("", *problem)
    remark = TRANSPARENT if transparent else ""
    return Picture(hashlib.sha256(data).digest()[:16], width, height, suffix, remark)


@lru_cache(maxsize=64)
def _names_in(folder: str) -> dict[str, list[str]]:
    """Files of a folder by their name in lower case without the suffix."""
    found: dict[str, list[str]] = {}
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208 (a tenth of the time for a folder of a million files)
    except OSError:
        return found
    for name in names:
        found.setdefault(os.path.splitext(name)[0].lower(), []).append(name)  # noqa: PTH122
    return found


class ImageFinder:
    """Finds the files of images by the names in records.

    Args:
        root: folder that relative names start from.
        strip_prefix: beginning of absolute names of another machine, replaced by `root`; None: none.
    """

    def __init__(self, root: Path, strip_prefix: str | None = None):
        self.root, self.strip_prefix = root, strip_prefix

    def find(self, name: str) -> tuple[Path, str]:
        """Path of an image, and what was mended in its name or "". Raises LeftOut without a key."""
        given, mend = name, ""
        if name != name.strip():
            name, mend = name.strip(), TRIMMED
        if name.startswith("file://"):
            name = unquote(urlparse(name).path)
        if is_url(name) or name.startswith("data:"):
            raise LeftOut(
                "",
                "url_image",
                f"{name[:80]!r} is a URL: nothing is downloaded; get the file and give its path",
            )
        if Path(name).suffix.lower() in VIDEO_SUFFIXES:
            raise LeftOut("", "video", f"{name!r} is a video: save frames as images and name these")
        if self.strip_prefix and name.startswith(self.strip_prefix):
            name = name[len(self.strip_prefix) :].lstrip("/\\")
        path, inside = self._below_root(name)
        if not inside:
            raise LeftOut(
                "",
                "missing_image",
                f"{given!r} leads out of {self.root}: give --root, a folder above all images",
            )
        if not path.is_file() and "\\" in name:
            other, inside = self._below_root(name.replace("\\", "/"))
            if inside and other.is_file():
                return other, SLASHES
        if path.is_file():
            return path, mend
        return self._almost(path, given)

    def _below_root(self, name: str) -> tuple[Path, bool]:
        """Path of a name, and whether it is absolute or stays below the root."""
        if "\0" in name:
            return self.root, False
        path = Path(os.path.normpath(self.root / name))
        return path, Path(name).is_absolute() or path.is_relative_to(os.path.normpath(self.root))

    def _almost(self, path: Path, given: str) -> tuple[Path, str]:
        """File of the same name with a suffix, if there is one alone. Raises LeftOut with what is there instead."""
        if len(os.fsencode(path.name)) > 255:
            raise LeftOut("", "missing_image", f"{given[:60]!r}... is too long for a file name")
        if path.is_dir():
            raise LeftOut("", "missing_image", f"{path} is a folder: name the file in it")
        same = _names_in(str(path.parent)).get(path.stem.lower(), [])
        exact = [
            name for name in same if Path(name).stem == path.name and Path(name).suffix.lower() in SUFFIXES
        ]
        if not path.suffix and len(exact) == 1:
            return path.with_name(exact[0]), ADDED_SUFFIX
        if same:
            raise LeftOut("", "missing_image", f"no file {path}, but there is {same[0]!r}: correct the name")
        if Path(given).is_absolute():
            raise LeftOut(
                "",
                "missing_image",
                f"no file {given}: a path of another machine? --strip-prefix FOLDER removes it",
            )
        raise LeftOut("", "missing_image", f"no file {path}: correct the name, or give --root")


def choose_root(names: Sequence[str], roots: Sequence[Path]) -> tuple[Path, int]:
    """Folder below which most of the names are files, the first of equals, and their number."""
    best, most = roots[0], -1
    for root in roots:
        finder, found = ImageFinder(root), 0
        for name in names:
            try:
                finder.find(name)
            except LeftOut:
                continue
            found += 1
        if found > most:
            best, most = root, found
    return best, most


def suggest_root(names: Iterable[str], bases: Iterable[Path]) -> str:
    """Sentence that names the folder or prefix with which missing images would be found, or "".

    Folders below `bases`, at most three levels deep, are searched.
    """
    wanted: dict[str, list[str]] = {}
    for name in names:
        plain = name.strip().replace("\\", "/")
        wanted.setdefault(plain.rsplit("/", 1)[-1], []).append(plain)
    total = sum(map(len, wanted.values()))
    roots: dict[tuple[str, str], int] = {}
    for folder, files in _folders(bases):
        for file in files & wanted.keys():
            for name in wanted[file]:
                root, rest = _without_common_end(f"{folder}/{file}", name)
                roots[root, rest] = roots.get((root, rest), 0) + 1
    if not roots:
        return ""
    (root, rest), found = max(roots.items(), key=lambda item: item[1])
    if not rest:
        return f"--root {root} would find {found} of {total} missing images"
    return f"--root {root} --strip-prefix {rest} would find {found} of {total} missing images"


def _folders(bases: Iterable[Path]) -> Iterable[tuple[str, set[str]]]:
    """Folders below the bases with the names of their files, each once."""
    seen: set[str] = set()
    for base in bases:
        start = str(base.absolute())
        for folder, below, files in os.walk(start):
            if folder.count("/") - start.count("/") >= _SHALLOW:
                below.clear()
            below[:] = sorted(name for name in below if not name.startswith("."))
            if len(seen) >= _MOST_FOLDERS:
                return
            if folder not in seen:
                seen.add(folder)
                yield folder, set(files)


def _without_common_end(path: str, name: str) -> tuple[str, str]:
    """Beginnings of a path and of a name before the parts that both end with."""
    a, b = path.split("/"), name.split("/")
    while a and b and a[-1] == b[-1]:
        a.pop()
        b.pop()
    return "/".join(a) or "/", "/".join(b)
