"""Messages of harnesses, in one form and in that of the training data.

A message is (role, parts): the role is `system`, `user` or `assistant`, a part is a text, or an image as a path or a
PIL image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from PIL import Image

from megatron_internvlx.data.conversation import IMAGE

Part = str | Path | Image.Image
Message = tuple[str, Sequence[Part]]

ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
"""Roles of a harness -> those of the training data."""

# Ends of questions that the training data of InternVL have.
ASK_LETTER = "Answer with the option's letter from the given choices directly."
ASK_SHORT = "Answer the question using a single word or phrase."


def training_turns(messages: Sequence[Message]) -> tuple[list[dict[str, str]], list[Path | Image.Image]]:
    """Turns in the form of the training data, and the images in the order of their `<image>`.

    Where the texts of users have exactly one `<image>` for each image, they are taken as they are. Otherwise each part
    gets a line of its own, images as `<image>`, or numbered (`Image-1: <image>`) if there are several; an `<image>`
    in a text, which then stands for nothing, loses its brackets.

    Raises ValueError for an unknown role, and for an image outside of a user's message.
    """
    images = [part for _, parts in messages for part in parts if not isinstance(part, str)]
    texts = [part for role, parts in messages for part in parts if role == "user" and isinstance(part, str)]
    placed = bool(images) and sum(text.count(IMAGE) for text in texts) == len(images)
    turns, number = [], 0
    for role, parts in messages:
        if role not in ROLES:
            raise ValueError(f"role {role!r} must be one of {', '.join(ROLES)}")
        lines = []
        for part in parts:
            if isinstance(part, str):
                lines.append(part if placed else part.replace(IMAGE, IMAGE.strip("<>")))
            elif role != "user":
                raise ValueError(
                    f"a message of role {role!r} has an image; images belong to messages of the user"
                )
            elif not placed:
                number += 1
                lines.append(f"Image-{number}: {IMAGE}" if len(images) > 1 else IMAGE)
        turns.append({"from": ROLES[role], "value": ("" if placed else "\n").join(lines)})
    return turns, images


def chat_parts(content: str | Sequence[Mapping[str, Any]]) -> list[Part]:
    """Parts of a message of lmms-eval. Raises ValueError for video and audio."""
    if isinstance(content, str):
        return [content]
    parts: list[Part] = []
    for part in content:
        if part["type"] == "text":
            parts.append(part["text"])
        elif part["type"] == "image":
            parts.append(Path(part["url"]) if isinstance(part["url"], str) else part["url"])
        else:
            raise ValueError(f"the task has {part['type']}; this model takes text and images")
    return parts


def grouped_messages(items: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages of the kit's items: those of one role after each other are one message; without a role, the user's.

    Raises ValueError for video.
    """
    messages: list[tuple[str, list[Part]]] = []
    for item in items:
        role = item.get("role", "user")
        if item["type"] not in ("text", "image"):
            raise ValueError(f"the data set has {item['type']}; this model takes text and images")
        if not messages or messages[-1][0] != role:
            messages.append((role, []))
        messages[-1][1].append(Path(item["value"]) if item["type"] == "image" else item["value"])
    return list(messages)


def choice_prompt(line: Mapping[str, Any]) -> str:
    """Text of a multiple-choice question: hint, question, an option per line, and the request for a letter."""
    options = [f"{letter}. {line[letter]}" for letter in ascii_uppercase if _is_given(line.get(letter))]
    hint = [str(line["hint"])] if _is_given(line.get("hint")) else []
    return "\n".join([*hint, str(line["question"]), *options, ASK_LETTER if options else ASK_SHORT])


def short_prompt(line: Mapping[str, Any]) -> str:
    """Text of a question, and the request for a short answer."""
    return f"{line['question']}\n{ASK_SHORT}"


def _is_given(cell: Any) -> bool:
    """Whether a cell of a table is not empty, which pandas writes as NaN."""
    return cell is not None and cell == cell
