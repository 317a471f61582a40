"""Prompts as the messages of OpenAI's chat requests, which servers take, and back."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_internvlx.data.conversation import IMAGE, get_template

_MARK = f"{IMAGE}\n"  # what the exported chat template writes for an image


def messages_of(template: str, prompt: str, images: Sequence[str]) -> list[dict[str, Any]]:
    """Messages that the exported chat template renders to `prompt`.

    Args:
        template: name of the chat template.
        prompt: from `evaluation.answers.questions`: it ends with the header of the answer.
        images: paths of its images, in order.

    Raises:
        ValueError: no messages give this prompt, as with an `<image>` that no line break follows.
    """
    form = get_template(template)
    headers = {
        "system": form.system_header,
        "user": form.user_header,
        "assistant": form.answer_header,
    }
    left, messages = list(images), []
    *turns, last = prompt.split(form.end + form.gap)
    for turn in turns:
        role = next((role for role, header in headers.items() if turn.startswith(header)), None)
        if role is None:
            raise ValueError(f"a turn has no header of the template {template}: {turn[:60]!r}")
        messages.append({"role": role, "content": _content(turn.removeprefix(headers[role]), left)})
    if last != form.answer_header or left:
        raise ValueError(
            f"{len(left)} images are left over, or the prompt does not end with an answer's header"
        )
    return messages


def _content(text: str, left: list[str]) -> str | list[dict[str, Any]]:
    """Content of one message; its images are taken from the front of `left`."""
    pieces = text.split(_MARK)
    if any(IMAGE in piece for piece in pieces) or len(pieces) - 1 > len(left):
        raise ValueError(f"an {IMAGE} without a line break after it, or without an image: {text[:60]!r}")
    if len(pieces) == 1:
        return text
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image_url", "image_url": {"url": left.pop(0)}})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def with_data(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose images are `data:` URIs of the files, as they are, instead of paths. Raises OSError."""
    return [_with_parts(message, _embedded) for message in messages]


def _embedded(path: str) -> dict[str, Any]:
    kind = mimetypes.guess_type(path)[0] or "image/png"
    url = f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def template_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a chat template of transformers expects them: an image is a part of the type `image`."""
    return [_with_parts(message, lambda _: {"type": "image"}) for message in messages]


def _with_parts(message: dict[str, Any], image: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Message in which each image is the part that `image` makes of its path."""
    content = message["content"]
    if isinstance(content, str):
        return message
    parts = [image(part["image_url"]["url"]) if part["type"] == "image_url" else part for part in content]
    return {**message, "content": parts}
