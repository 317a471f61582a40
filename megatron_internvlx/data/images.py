"""Where image bytes and recorded image sizes come from: folders, object stores, WebDataset shards.

Sizes are kept in Energon's media metadata table (SQLite), width and height as seen upright. An image that
could not be read when sizes were recorded has the format ``broken`` and its cause as mode.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from pathlib import Path
from typing import Any, Protocol

from megatron_internvlx.data.decode_pil import image_size
from megatron_internvlx.data.manifest import is_url
from megatron_internvlx.data.rejects import BadSample

BROKEN = "broken"
TURNED = ";turned"


class ImageStore(Protocol):
    """Images by their name in a record."""

    def size(self, name: str, *, apply_exif: bool) -> tuple[int, int]:
        """Width and height in pixels, without opening the image where they are recorded."""

    def read(self, name: str) -> bytes:
        """The undecoded file."""


def read_image(root: str, name: str) -> bytes:
    """Bytes of an image below a folder or an object-store URL; BadSample (missing_image) if there is none."""
    path = os.path.join(root, name)  # noqa: PTH118 (keeps URLs and paths as written)
    try:
        if is_url(path):
            from megatron.energon.epathlib import EPath

            return EPath(path).read_bytes()
        return Path(path).read_bytes()
    except Exception as error:  # storage clients raise classes of their own
        raise BadSample(path, "missing_image", f"{type(error).__name__}: {error}") from error


class SizeTable:
    """Recorded sizes of the images of one data set, in ``folder/.nv-meta/index.sqlite``.

    Every process and thread that reads opens a connection of its own, as SQLite demands.
    """

    def __init__(self, folder: Path):
        self.path = folder / ".nv-meta" / "index.sqlite"
        self._local = threading.local()

    def create(self) -> sqlite3.Connection:
        """A connection for writing; makes the table where it is missing. Raises ValueError if it is damaged."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            connection = sqlite3.connect(self.path)
            connection.execute(
                "CREATE TABLE IF NOT EXISTS media_metadata (entry_key TEXT PRIMARY KEY, "
                "metadata_type TEXT NOT NULL, metadata_json TEXT NOT NULL)"
            )
        except sqlite3.Error as error:
            raise ValueError(f"{self.path}: {error}: delete it, or prepare into another directory") from error
        return connection

    def get(self, name: str, *, apply_exif: bool) -> tuple[int, int] | None:
        """Size of an image, None if it is not recorded; BadSample if it was broken then."""
        local = self._local
        if getattr(local, "owner", None) != os.getpid():
            local.owner = os.getpid()
            local.db = sqlite3.connect(f"file:{self.path}?mode=ro&immutable=1", uri=True)
        row = local.db.execute(
            "SELECT metadata_json FROM media_metadata WHERE entry_key = ?", (name,)
        ).fetchone()
        return None if row is None else unpack_size(name, json.loads(row[0]), apply_exif=apply_exif)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self._local = state["path"], threading.local()


def measure(source: str | bytes, name: str) -> dict[str, Any]:
    """What is recorded of an image: Energon's ImageMetadata fields."""
    try:
        width, height = image_size(source)
        turned = (width, height) != image_size(source, apply_exif=False)
    except BadSample as bad:
        return {"width": 0, "height": 0, "format": BROKEN, "mode": f"{bad.cause}: {bad.detail}"[:500]}
    kind = Path(name).suffix.lstrip(".").upper() or "UNKNOWN"
    return {"width": width, "height": height, "format": kind, "mode": "RGB" + (TURNED if turned else "")}


def unpack_size(name: str, entry: dict[str, Any], *, apply_exif: bool) -> tuple[int, int]:
    """Reverses `measure`: the size, or the BadSample that it met."""
    if entry["format"] == BROKEN:
        cause, _, detail = entry["mode"].partition(": ")
        raise BadSample(name, cause, f"broken when sizes were recorded: {detail}")
    width, height = entry["width"], entry["height"]
    return (height, width) if entry["mode"].endswith(TURNED) and not apply_exif else (width, height)


class FolderImages:
    """Images below a folder or URL, their sizes from a table if there is one."""

    def __init__(self, root: str, sizes: SizeTable | None = None):
        self.root, self.sizes = root, sizes

    def size(self, name: str, *, apply_exif: bool) -> tuple[int, int]:
        """See `ImageStore`."""
        known = self.sizes.get(name, apply_exif=apply_exif) if self.sizes else None
        if known is not None:
            return known
        if is_url(self.root):
            return image_size(self.read(name), apply_exif=apply_exif)
        return image_size(os.path.join(self.root, name), apply_exif=apply_exif)  # noqa: PTH118

    def read(self, name: str) -> bytes:
        """See `ImageStore`."""
        return read_image(self.root, name)


class ShardImages:
    """Images of one record of a WebDataset, which lie beside it in the shard; names are their extensions."""

    def __init__(self, sizes: dict[str, dict[str, Any]], key: str, shards: Any):
        self.sizes, self.key, self.shards = sizes, key, shards

    def size(self, name: str, *, apply_exif: bool) -> tuple[int, int]:
        """See `ImageStore`."""
        if name not in self.sizes:
            raise BadSample(self.key, "missing_image", f"the shard holds no {name} for this record")
        return unpack_size(name, self.sizes[name], apply_exif=apply_exif)

    def read(self, name: str) -> bytes:
        """See `ImageStore`."""
        try:
            data, _ = self.shards[f"{self.key}.{name}"]
        except Exception as error:  # a shard that changed since it was indexed
            raise BadSample(self.key, "missing_image", f"{type(error).__name__}: {error}") from error
        return data
