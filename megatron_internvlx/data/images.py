"""Sources of image bytes and recorded image sizes: folders, object stores, WebDataset shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from megatron_internvlx.data.decode_pil import image_size
from megatron_internvlx.data.prepared import RecordedImage, SizeTable
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.paths import is_url


class ImageStore(Protocol):
    """Images by their name in a record."""

    def size(self, name: str, *, apply_exif: bool) -> tuple[int, int]:
        """Width and height in pixels, as recorded, or else from the header. Raises BadSample if it is broken."""

    def read(self, name: str) -> bytes:
        """Bytes of the undecoded file. Raises BadSample (missing_image)."""


def read_image(root: str, name: str) -> bytes:
    """Bytes of an image below a folder or an object-store URL. Raises BadSample (missing_image)."""
    path = os.path.join(root, name)  # noqa: PTH118 (keeps URLs and paths as written)
    try:
        if is_url(path):
            from megatron.energon.epathlib import EPath

            return EPath(path).read_bytes()
        return Path(path).read_bytes()
    except Exception as error:  # storage clients raise classes of their own
        raise BadSample(path, "missing_image", f"{type(error).__name__}: {error}") from error


def measure(source: str | bytes, name: str) -> RecordedImage:
    """Read the header of an image. A broken image gives an entry that says why."""
    try:
        width, height = image_size(source)
        turned = (width, height) != image_size(source, apply_exif=False)
    except BadSample as bad:
        return RecordedImage.unreadable(bad.cause, bad.detail)
    kind = Path(name).suffix.lstrip(".").upper() or "UNKNOWN"
    return RecordedImage.readable(width, height, kind, turned=turned)


class FolderImages:
    """Images below a folder or URL; sizes from `sizes`, or from the headers of images that are not in it."""

    def __init__(self, root: str, sizes: SizeTable | None = None):
        self.root, self.sizes = root, sizes

    def size(self, name: str, *, apply_exif: bool) -> tuple[int, int]:
        """See `ImageStore`."""
        known = self.sizes.size(name, apply_exif=apply_exif) if self.sizes else None
        if known is not None:
            return known
        if is_url(self.root):
            return image_size(self.read(name), apply_exif=apply_exif)
        return image_size(os.path.join(self.root, name), apply_exif=apply_exif)  # noqa: PTH118

    def read(self, name: str) -> bytes:
        """See `ImageStore`."""
        return read_image(self.root, name)


class ShardImages:
    """Images of one WebDataset record, stored beside it in the shard; names are their extensions."""

    def __init__(self, sizes: dict[str, RecordedImage], key: str, shards: Any):
        self.sizes, self.key, self.shards = sizes, key, shards

    def size(self, name: str, *, apply_exif: bool) -> tuple[int, int]:
        """See `ImageStore`."""
        if name not in self.sizes:
            raise BadSample(self.key, "missing_image", f"the shard has no {name} for this record")
        return self.sizes[name].size(name, apply_exif=apply_exif)

    def read(self, name: str) -> bytes:
        """See `ImageStore`."""
        try:
            data, _ = self.shards[f"{self.key}.{name}"]
        except Exception as error:  # a shard that changed since it was indexed
            raise BadSample(self.key, "missing_image", f"{type(error).__name__}: {error}") from error
        return data
