"""Records and images as readers of foreign formats give them, and the error of one that is left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_internvlx.data.rejects import BadSample, printable

CAUSES = {
    "missing_image": "no file of this name, or none named",
    "url_image": "a URL in place of a path; nothing is downloaded",
    "unreadable_image": "not an image, broken, or in a format that training does not read (HEIC, SVG, 16 bits)",
    "truncated_image": "the file ends too early",
    "animated_image": "several frames, of which training would see the first",
    "bomb": "too many pixels or bytes",
    "video": "a video",
    "malformed_json": "not JSON, no object, or a key given twice",
    "bad_encoding": "not UTF-8",
    "bad_row": "another number of cells than the header, or an unclosed quote",
    "bad_member": "a member of a tar file that is no plain file, or cut short",
    "missing_key": "no conversation, question or answer under a known name",
    "bad_message": "a turn or part of an unknown kind",
    "unknown_role": "a turn of an unknown role",
    "turn_order": "an answer first, or two turns of one side in a row",
    "empty_question": "a human turn without text or image",
    "empty_answer": "an answer without text",
    "no_supervision": "nothing to learn",
    "placeholder_mismatch": "`<image>` and images differ in number, or `<image>` is in an answer",
    "reserved_token": "a special token in a message",
    "too_long": "a text of which nearly nothing would fit",
    "duplicate": "the same pictures and the same text as an earlier record of the set",
    "unexpected_error": "anything else; the detail has it",
}
"""Cause of a record that is left out -> its meaning."""

MAX_IMAGE_BYTES = 1 << 28
"""Largest image file, in bytes."""
MAX_TEXT_BYTES = 1 << 26
"""Largest text of one record, in bytes."""


class LeftOut(Exception):
    """Record that is not used: its `key` (`questions.csv:12`), a `cause` of `CAUSES`, and finding and remedy."""

    def __init__(self, key: str, cause: str, detail: str):
        assert cause in CAUSES, cause
        detail = " ".join(printable(detail).split())
        super().__init__(key, cause, detail)
        self.key, self.cause, self.detail = printable(key), cause, detail[:600]

    def __str__(self) -> str:
        return f"{self.key}: {self.cause}: {self.detail}"

    def named(self, key: str) -> LeftOut:
        """Same finding under the name of the record that it belongs to."""
        return LeftOut(key, self.cause, self.detail)

    @classmethod
    def of(cls, bad: BadSample, key: str) -> LeftOut:
        """Same finding of training's own checks, for the record `key`."""
        return cls(key, bad.cause if bad.cause in CAUSES else "unexpected_error", bad.detail)


@dataclass(frozen=True)
class SourceImage:
    """Image of a record: the name that the record gives it, and the bytes of its file if they are embedded."""

    name: str
    data: bytes | None = None


@dataclass
class SourceRecord:
    """Record as it was read: turns {from, value} with roles as written, images in order, and what was mended."""

    key: str
    turns: list[dict[str, Any]]
    images: list[SourceImage]
    extra: dict[str, Any] = field(default_factory=dict)
    mends: list[str] = field(default_factory=list)


Records = Iterator[SourceRecord | LeftOut]
"""Stream of records of a file; those that cannot be read come as the error that says why."""


@dataclass(frozen=True)
class ReadSettings:
    """Choices of the user about how files are read; None means: found by looking."""

    image_column: str | None = None
    question_column: str | None = None
    answer_column: str | None = None
    question: str | None = None
    """Question for tables and captions without one."""
    encoding: str | None = None
    """Encoding of text files; None for UTF-8 and what a byte order mark says."""


@dataclass(frozen=True)
class SetEntry:
    """Settings of one data set that a `meta.json` gives: they are passed through."""

    data_augment: bool = False
    repeat_time: float = 1
    max_dynamic_patch: int | None = None


@dataclass
class Source:
    """Data set that was found: name, format in words, files, folder of the images, and its stream of records.

    `roots` are folders in which images are looked for, the likeliest first; `notes` say what was passed over.
    """

    name: str
    kind: str
    files: list[Path]
    roots: list[Path]
    records: Records
    entry: SetEntry = SetEntry()
    notes: list[str] = field(default_factory=list)
    beside: list[Path] = field(default_factory=list)
    """Further files that the records are made of: images and captions, or the file that names the set."""
