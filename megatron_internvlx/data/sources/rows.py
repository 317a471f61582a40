"""Records from JSON objects and table rows: conversations, messages, texts, or an image with question and answer."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from typing import Any

from megatron_internvlx.data.conversation import IMAGE
from megatron_internvlx.data.messages import decode_data_url
from megatron_internvlx.data.rejects import BadSample, printable
from megatron_internvlx.data.sources.record import LeftOut, ReadSettings, SourceImage, SourceRecord
from megatron_internvlx.recipe import similar

DESCRIBE = "Describe the image."
"""Question of tables and captions that have none."""
USUAL = {
    "image": (
        "image", "images", "image_path", "image_file", "image_name", "img", "img_path", "file", "file_name",
        "filename", "filepath", "file_path", "path", "picture", "photo", "jpg", "png",
    ),
    "question": ("question", "query", "prompt", "instruction", "problem", "input", "user", "human", "q"),
    "answer": (
        "answer", "response", "output", "solution", "target", "assistant", "gpt", "caption", "captions", "text",
        "description", "label", "a",
    ),
}  # fmt: skip
"""Usual names of the columns of a table, the surest first; case does not count."""
_MISTYPED = 0.85  # similarity: `qestion` and `questions` have more, `user_id` and `prompt_id` less
_TURNS = ("conversations", "conversation", "messages")
_USED = (*_TURNS, "texts", "image", "images", "video", "videos")
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")


@dataclass(frozen=True)
class Columns:
    """Columns of a table: `image`, `answer`, and `question`, which may be None."""

    image: str
    question: str | None
    answer: str


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def choose_columns(names: Sequence[str], settings: ReadSettings, where: str) -> Columns:
    """Columns of a table, from the user's choice or usual names. Raises ValueError that suggests and names the flag."""
    by_plain = {_plain(name): name for name in reversed(names)}
    found: dict[str, str | None] = {}
    for role, usual in USUAL.items():
        given = getattr(settings, f"{role}_column")
        if given is not None and given not in names:
            listed = ", ".join(names)
            raise ValueError(
                f"--{role}-column {given}: {where} has the columns {listed}{similar(given, names)}"
            )
        taken = set(found.values())
        free = (by_plain[name] for name in usual if name in by_plain and by_plain[name] not in taken)
        found[role] = given or next(free, None)
    for role in ("image", "answer"):
        if found[role] is None:
            rest = [name for name in names if name not in found.values()]
            close = {name: similar(_plain(name), USUAL[role]) for name in rest}
            likely = next((name for name in rest if close[name]), rest[0] if rest else "NAME")
            raise ValueError(
                f"{where}: no column has a usual name of the {role} ({', '.join(USUAL[role][:4])}, ...); its columns "
                f"are {', '.join(names)}. Name it: --{role}-column {likely}"
            )
    assert found["image"] is not None and found["answer"] is not None
    if found["question"] is None and settings.question is None:
        rest = [name for name in names if name not in found.values()]
        meant = (name for name in rest if get_close_matches(_plain(name), USUAL["question"], 1, _MISTYPED))
        if (asked := next(meant, None)) is not None:
            raise ValueError(
                f"{where}: no column has a usual name of the question, and {asked!r} looks like one. If it is, name "
                f"it: --question-column {asked}; if not, give one question for all: --question {DESCRIBE!r}"
            )
    return Columns(found["image"], found["question"], found["answer"])


def column_notes(columns: Columns, names: Iterable[str], settings: ReadSettings) -> list[str]:
    """Sentences about columns that are not read, and about where the questions come from."""
    rest = [name for name in names if name not in (columns.image, columns.question, columns.answer)]
    notes = []
    if rest:
        more = f" and {len(rest) - 8:,} more" if len(rest) > 8 else ""
        notes.append(f"columns not read: {', '.join(rest[:8])}{more}")
    if columns.question is None and settings.question is None:
        notes.append(
            f"no column of questions: each is {DESCRIBE!r} (--question-column or --question changes it)"
        )
    if columns.question is not None and settings.question is not None:
        notes.append(f"--question is not used: the column {columns.question!r} has the questions")
    return notes


def is_conversation(row: Mapping[str, Any]) -> bool:
    """Whether a row holds turns, and not an image with question and answer in columns."""
    return any(name in row for name in (*_TURNS, "texts"))


class RowReader:
    """Converts rows of one file to records; columns are chosen once for each set of names.

    `where` names the file in messages.
    """

    def __init__(self, settings: ReadSettings, where: str):
        self.settings, self.where = settings, where
        self._columns: dict[tuple[str, ...], Columns] = {}

    def columns(self, names: Iterable[str]) -> Columns:
        """Columns of rows with these names. Raises ValueError if they are not usual ones."""
        key = tuple(names)
        if key not in self._columns:
            self._columns[key] = choose_columns(key, self.settings, self.where)
        return self._columns[key]

    def read(self, row: Any, key: str) -> SourceRecord:
        """Record of a row. Raises LeftOut named `key`."""
        if not isinstance(row, dict):
            raise LeftOut(key, "malformed_json", f"expected a JSON object, found {type(row).__name__}")
        for name in ("video", "videos"):
            if row.get(name):
                raise LeftOut(key, "video", "videos are not supported: save frames as images and name these")
        try:
            return self._conversation(row, key) if is_conversation(row) else self._flat(row, key)
        except LeftOut:
            raise
        except Exception as error:  # whatever a row holds costs this row alone
            raise LeftOut(key, "unexpected_error", f"{type(error).__name__}: {error}") from error

    def _conversation(self, row: dict[str, Any], key: str) -> SourceRecord:
        name = next(name for name in (*_TURNS, "texts") if name in row)
        turns = row[name]
        if isinstance(turns, str):
            turns = _parsed(turns)
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise LeftOut(key, "missing_key", f"'{name}' must be a list of turns, such as {{from, value}}")
        named = next((row[field] for field in ("images", "image") if row.get(field) is not None), None)
        images = [] if named is None else images_of(named, key)
        if name == "texts":
            turns = [turn for pair in turns for turn in _pair(pair, key)]
        extra = {field: value for field, value in row.items()
                 if field not in _USED and _storable(field) and _storable(value)}  # fmt: skip
        parts = _Parts(images, key)
        read = [
            {"from": turn.get("from", turn.get("role")), "value": parts.text(turn, number)}
            for number, turn in enumerate(turns)
        ]
        return SourceRecord(key, read, parts.all_images(), extra)

    def _flat(self, row: dict[str, Any], key: str) -> SourceRecord:
        try:
            columns = self.columns(row)
        except ValueError as error:
            raise LeftOut(
                key,
                "missing_key",
                f"it must have 'conversations', 'messages', or an image and an answer: {error}",
            ) from error
        named = row[columns.image]
        if named is None or named == "" or named == []:
            raise LeftOut(
                key,
                "missing_image",
                f"its '{columns.image}' is empty; records of text alone need a JSONL of conversations",
            )
        answer = _cell(row[columns.answer], columns.answer, key)
        question = DESCRIBE if self.settings.question is None else self.settings.question
        if columns.question is not None:
            question = _cell(row[columns.question], columns.question, key)
        images = images_of(named, key)
        return SourceRecord(key, one_round(question, answer, len(images)), images)


def one_round(question: str, answer: str, images: int) -> list[dict[str, Any]]:
    """Turns of one question about images, which come before it unless it places them itself."""
    asked = question if IMAGE in question else f"{IMAGE}\n" * images + question
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]


def _parsed(text: str) -> Any:
    """Value of a text that holds JSON, as columns of Parquet files do; None if it does not."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _storable(value: Any) -> bool:
    """Whether a further field of a record is kept: texts that UTF-8 can hold, finite numbers, and lists of them."""
    if isinstance(value, list):
        return all(not isinstance(one, list) and _storable(one) for one in value)
    if isinstance(value, str):
        return printable(value) == value
    return isinstance(value, int) or (isinstance(value, float) and isfinite(value))


def _cell(value: Any, column: str, key: str) -> str:
    """Text of a cell. Raises LeftOut for a list of several texts, of which none may be chosen by guessing."""
    if isinstance(value, list):
        if len(value) > 1:
            raise LeftOut(key, "bad_message", f"'{column}' has {len(value)} texts: keep one")
        value = value[0] if value else ""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    raise LeftOut(key, "bad_message", f"'{column}' must be a text, found {type(value).__name__}")


def _pair(pair: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Turns of a {user, assistant} pair."""
    if "user" not in pair or "assistant" not in pair:
        raise LeftOut(key, "bad_message", f"'texts' must hold pairs {{user, assistant}}, found {list(pair)}")
    return [{"from": "user", "value": pair["user"]}, {"from": "assistant", "value": pair["assistant"]}]


class _Parts:
    """Texts of turns whose content may be a list of parts, and the images in their order."""

    def __init__(self, named: list[SourceImage], key: str):
        self.waiting, self.key = list(named), key
        self.found: list[SourceImage] = []

    def all_images(self) -> list[SourceImage]:
        """Images of the parts, then those that only the record names."""
        return [*self.found, *self.waiting]

    def text(self, turn: Mapping[str, Any], number: int) -> str:
        """Text of a turn, each image part an `<image>` on a line of its own."""
        content = turn.get("value", turn.get("content"))
        if isinstance(content, str):
            return content
        if content is None:
            return ""
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
            raise LeftOut(
                self.key,
                "bad_message",
                f"turn {number} must have a text ('value' or 'content'), or a list of parts",
            )
        return "\n".join(self._part(part, number) for part in content)

    def _part(self, part: Mapping[str, Any], number: int) -> str:
        kind = part.get("type")
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            return part["text"]
        if kind in _IMAGE_PARTS:
            source = part.get("image_url") or part.get("image")
            if source:
                self.found += images_of(source, self.key)
            elif self.waiting:
                self.found.append(self.waiting.pop(0))
            else:
                raise LeftOut(self.key, "missing_image", f"turn {number} has an image without a path or URL")
            return IMAGE
        if kind in ("video", "video_url"):
            raise LeftOut(self.key, "video", "videos are not supported: save frames as images and name these")
        raise LeftOut(
            self.key,
            "bad_message",
            f"turn {number} has a part of type {kind!r}; known are text and image_url",
        )


def images_of(value: Any, key: str) -> list[SourceImage]:
    """Images of a field: a path, a data URL, bytes, {bytes, path}, {url}, or a list of these. Raises LeftOut."""
    if isinstance(value, list | tuple):
        return [image for one in value for image in images_of(one, key)]
    if isinstance(value, bytes):
        return [SourceImage("embedded image", value)]
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return [SourceImage(str(value.get("path") or "embedded image"), value["bytes"])]
        value = value.get("url") or value.get("path")
    if isinstance(value, str) and value.strip():
        try:
            embedded = decode_data_url(value)
        except BadSample as bad:
            raise LeftOut.of(bad, key) from bad
        if embedded is not None:
            return [SourceImage("embedded image", embedded[0])]
        plain = _plain_base64(value)
        return [SourceImage("embedded image", plain) if plain is not None else SourceImage(value)]
    raise LeftOut(key, "missing_image", f"an image must be a path or hold bytes, found {str(value)[:60]!r}")


def _plain_base64(text: str) -> bytes | None:
    """Bytes of a long base64 text without a prefix, as some hubs publish images in tables; None for a path."""
    if len(text) < 256 or "." in text[:256]:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return None
