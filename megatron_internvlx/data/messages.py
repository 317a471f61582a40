"""OpenAI's chat records (`messages`) as InternVL's (`conversations`).

A message's content is a text, or a list of parts: `{"type": "text", "text": ...}` and `{"type": "image_url",
"image_url": {"url": ...}}`. Images are paths, `file://` addresses, or `data:` addresses, whose bytes become files.
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

ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
_DATA = re.compile(r"data:image/(?P<kind>[a-z0-9.+-]+);base64,", re.IGNORECASE)


def conversation_of(record: Mapping[str, Any], key: str, images: Path) -> dict[str, Any]:
    """The record with `conversations` and `image` instead of `messages`; other keys stay.

    Args:
        record: one record of an OpenAI fine-tuning file.
        key: its name in messages.
        images: folder for images that lie in the record itself; relative paths are written below it.

    Raises:
        BadSample: named `key`, for roles, parts and image addresses that training cannot use.
    """
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadSample(key, "missing_key", "the record needs 'messages', a list of {role, content}")
    names: list[str] = []
    turns = []
    for number, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise BadSample(
                key, "bad_message", f"message {number} has the role {role!r}; usable are {', '.join(ROLES)}"
            )
        text, found = _convert_content(message.get("content"), f"message {number}", key, images)
        turns.append({"from": ROLES[role], "value": text})
        names += found
    kept = {name: value for name, value in record.items() if name not in ("messages", "image")}
    return {**kept, **({"image": names} if names else {}), "conversations": turns}


def _convert_content(content: Any, where: str, key: str, images: Path) -> tuple[str, list[str]]:
    """Text with an `<image>` for each image, and the images' names."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise BadSample(key, "bad_message", f"the content of {where} is neither a text nor a list of parts")
    texts, names = [], []
    for part in parts:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            if IMAGE in part["text"]:
                raise BadSample(
                    key, "placeholder_mismatch", f"{where} holds {IMAGE!r}, which stands for an image here"
                )
            texts.append(part["text"])
        elif kind in ("image_url", "image"):
            names.append(_convert_image(part, where, key, images))
            texts.append(IMAGE)
        else:
            raise BadSample(
                key, "bad_message", f"{where} has a part of type {kind!r}; usable: text, image_url"
            )
    return "\n".join(texts), names


def _convert_image(part: Mapping[str, Any], where: str, key: str, images: Path) -> str:
    """Name of an image; one that lies in the record is written below `images` first."""
    address = part.get("image_url", part.get("image"))
    if isinstance(address, dict):
        address = address.get("url")
    if not isinstance(address, str) or not address:
        raise BadSample(key, "bad_message", f"{where} has an image without an address")
    if data := _DATA.match(address):
        try:
            content = base64.b64decode(address[data.end() :], validate=True)
        except binascii.Error as error:
            raise BadSample(
                key, "unreadable_image", f"{where}: base64 that cannot be decoded: {error}"
            ) from error
        name = f"{hashlib.sha256(content).hexdigest()[:32]}.{data['kind'].partition('+')[0].lower()}"
        if not (images / name).exists():
            with atomic_path(images / name) as partial:
                partial.write_bytes(content)
        return name
    if address.startswith("file://"):
        return unquote(urlparse(address).path)
    if "://" in address or address.startswith("data:"):
        raise BadSample(
            key, "missing_image", f"{where}: {address[:60]!r} is not a file: download it and name its path"
        )
    return address
