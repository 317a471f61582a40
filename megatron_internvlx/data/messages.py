"""Convert OpenAI's chat records (`messages`) to InternVL's (`conversations`).

The content of a message is a text, or a list of parts: `{"type": "text", "text": ...}` and `{"type": "image_url",
"image_url": {"url": ...}}`. Images are paths, `file://` URLs, or `data:` URLs, whose bytes are written to files.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from megatron_internvlx.data.conversation import IMAGE
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.files import atomic_path
from megatron_internvlx.paths import is_url

ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
_DATA = re.compile(r"data:image/(?P<kind>[a-z0-9.+-]+);base64,", re.IGNORECASE)


def conversation_of(record: Mapping[str, Any], key: str, images: Path) -> dict[str, Any]:
    """Convert a record: `conversations` and `image` replace `messages`; other keys are kept.

    Args:
        record: record of an OpenAI fine-tuning file.
        key: name of the record in error messages.
        images: folder for images that are embedded in the record.

    Raises:
        BadSample: with `key`, for unsupported roles, parts and image URLs.
    """
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadSample(key, "missing_key", "the record must have 'messages', a list of {role, content}")
    names: list[str] = []
    turns = []
    for number, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise BadSample(
                key,
                "bad_message",
                f"message {number} has the role {role!r}; it must be one of {', '.join(ROLES)}",
            )
        text, found = _convert_content(message.get("content"), f"message {number}", key, images)
        turns.append({"from": ROLES[role], "value": text})
        names += found
    kept = {name: value for name, value in record.items() if name not in ("messages", "image")}
    return {**kept, **({"image": names} if names else {}), "conversations": turns}


def _convert_content(content: Any, where: str, key: str, images: Path) -> tuple[str, list[str]]:
    """Convert a message's content to text with an `<image>` for each image, and the images' names."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise BadSample(key, "bad_message", f"the content of {where} must be a text or a list of parts")
    texts, names = [], []
    for part in parts:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            if IMAGE in part["text"]:
                raise BadSample(
                    key, "placeholder_mismatch", f"{where} contains {IMAGE!r}, which is reserved for images"
                )
            texts.append(part["text"])
        elif kind in ("image_url", "image"):
            names.append(_convert_image(part, where, key, images))
            texts.append(IMAGE)
        else:
            raise BadSample(
                key, "bad_message", f"{where} has a part of type {kind!r}; it must be text or image_url"
            )
    return "\n".join(texts), names


def _convert_image(part: Mapping[str, Any], where: str, key: str, images: Path) -> str:
    """Name of an image's file; the bytes of an embedded image are written to `images` first."""
    address = part.get("image_url", part.get("image"))
    if isinstance(address, dict):
        address = address.get("url")
    if not isinstance(address, str) or not address:
        raise BadSample(key, "bad_message", f"{where} has an image without a URL")
    if embedded := decode_data_url(address, key, where):
        content, kind = embedded
        name = f"{hashlib.sha256(content).hexdigest()[:32]}.{kind}"
        if not (images / name).exists():
            with atomic_path(images / name) as partial:
                partial.write_bytes(content)
        return name
    if address.startswith("file://"):
        return unquote(urlparse(address).path)
    if is_url(address) or address.startswith("data:"):
        raise BadSample(
            key, "missing_image", f"{where}: {address[:60]!r} is not a file: download it and use its path"
        )
    return address


def decode_data_url(address: str, key: str = "?", where: str = "the image") -> tuple[bytes, str] | None:
    """Bytes and kind ("jpeg") of an image in a base64 `data:` URL; None for other addresses.

    Raises BadSample (unreadable_image) named `key` for invalid base64; `where` is the place in the record.
    """
    data = _DATA.match(address)
    if data is None:
        return None
    try:
        content = base64.b64decode(address[data.end() :], validate=True)
    except binascii.Error as error:
        raise BadSample(key, "unreadable_image", f"{where}: invalid base64: {error}") from error
    return content, data["kind"].partition("+")[0].lower()
