"""Kinds of image files: a decoder reads all files of a kind, or none."""

from __future__ import annotations

import io

from PIL import Image

# Format and mode, as Pillow names them.
Kind = tuple[str, str]

# Kinds that may be sent to a GPU; `encoded.unsupported` is the rule.
SENT = (
    *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
    *(("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")),
    *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    *(("BMP", mode) for mode in ("RGB", "L", "P", "1")),
    ("TIFF", "RGB"),
)


def format_of(header: Image.Image) -> str:
    """Format of a file; JPEG for MPO, a JPEG file with more pictures behind it that decoders do not see."""
    return "JPEG" if header.format == "MPO" else header.format or ""


def kind_of(header: Image.Image) -> Kind:
    """Kind of a file with this header."""
    return format_of(header), header.mode


def small_picture(kind: Kind) -> bytes | None:
    """File of a small picture, None if Pillow does not write this kind."""
    form, mode = kind
    file = io.BytesIO()
    try:
        picture = Image.new("RGB", (16, 16), "red").convert(mode)  # a gray palette would be read back as gray
        if mode.endswith("A"):
            picture.putalpha(128)
        # Transparency in WebP with loss takes an extended file, which is not sent.
        picture.save(file, form, lossless=mode == "RGBA")
    except (OSError, ValueError, KeyError):
        return None
    return file.getvalue()
