"""A conversation: system text, questions with pictures, answers; and its record for training."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_internvlx.chat.pictures import ChatError, Picture, expand_home
from megatron_internvlx.data.conversation import IMAGE, IMG_END, IMG_START, Template
from megatron_internvlx.files import atomic_path


@dataclass
class Turn:
    """A question with its pictures, and its answer."""

    question: str
    pictures: tuple[Picture, ...]
    answer: str

    @property
    def message(self) -> str:
        """Text of the question with an `<image>` for each picture: where the user wrote them, or else before it."""
        if self.question.count(IMAGE) == len(self.pictures):
            return self.question
        return f"{IMAGE}\n" * len(self.pictures) + self.question


@dataclass
class Conversation:
    """Turns so far, and the pictures that wait for the next question."""

    system: str | None = None
    """None: the system text of the model's chat template."""
    turns: list[Turn] = field(default_factory=list)
    waiting: list[Picture] = field(default_factory=list)

    def pictures(self) -> list[Picture]:
        """Pictures of all turns, then the waiting ones."""
        return [picture for turn in self.turns for picture in turn.pictures] + self.waiting

    def messages(self, extra: Turn | None = None) -> list[dict[str, str]]:
        """Turns in InternVL's form, `from` and `value`; `extra` is a last question without an answer."""
        found = [] if self.system is None else [{"from": "system", "value": self.system}]
        for turn in self.turns:
            found.append({"from": "human", "value": turn.message})
            found.append({"from": "gpt", "value": turn.answer})
        if extra is not None:
            found.append({"from": "human", "value": extra.message})
        return found

    def reset(self) -> None:
        """Forget turns and pictures; the system text stays."""
        self.turns.clear()
        self.waiting.clear()

    def undo(self) -> Turn:
        """Take back the last question with its answer; its pictures wait for the next one.

        Raises ChatError if there is none.
        """
        if not self.turns:
            raise ChatError("nothing to take back: no question has been answered")
        turn = self.turns.pop()
        self.waiting[:0] = turn.pictures
        return turn


def check_text(text: str, what: str, template: Template) -> None:
    """Check that a text does not imitate the chat template. Raises ChatError."""
    for token in (*template.reserved, IMG_START, IMG_END):
        if token in text:
            raise ChatError(f"{what} contains {token}, which only the chat template may write")


def check_system(text: str, template: Template) -> None:
    """Check a system text. Raises ChatError."""
    check_text(text, "the system text", template)
    if IMAGE in text:
        raise ChatError(f"the system text contains {IMAGE}; pictures belong to questions")


def check_question(turn: Turn, template: Template) -> None:
    """Check a question's text, and that its `<image>` marks fit its pictures. Raises ChatError."""
    if not turn.question.strip():
        count = len(turn.pictures)
        about = "" if not count else " about the picture" if count == 1 else f" about the {count} pictures"
        raise ChatError(f"the question has no text; type one{about}")
    marks = turn.question.count(IMAGE)
    if marks and marks != len(turn.pictures):
        raise ChatError(
            f"the question has {marks} {IMAGE} for {len(turn.pictures)} pictures; write one for each, or none"
        )
    check_text(turn.question, "the question", template)


def save_conversation(conversation: Conversation, path: Path) -> int:
    """Add the conversation to a JSONL file as a record for training; returns the number of records in the file.

    Pictures are named by their absolute paths. Raises ChatError.
    """
    path = expand_home(path)
    if not conversation.turns:
        raise ChatError("nothing to save: no question has been answered")
    if not path.name or path.is_dir():
        raise ChatError(f"{path}: a directory; name a file, such as {path / 'chat.jsonl'}")
    if any(not turn.answer for turn in conversation.turns):
        raise ChatError("an answer is empty, from which nothing can be learnt; /undo takes it back")
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        count = _check_records(path, before)
        record = _record(conversation)
        before = before if not before or before.endswith("\n") else before + "\n"
        with atomic_path(path) as partial:
            partial.write_text(before + json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ChatError(f"{error.filename or path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ChatError(f"{path}: not UTF-8 text, so nothing is added; name another file") from error
    return count + 1


def _check_records(path: Path, text: str) -> int:
    """Number of records. Raises ChatError for a line that is none and not blank."""
    count = 0
    # Not `splitlines`: a record may have other line ends, such as U+2028, within its text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        count += 1
        try:
            fine = isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            fine = False
        if not fine:
            raise ChatError(f"{path}:{number}: not a JSON record, so nothing is added; name another file")
    return count


def _record(conversation: Conversation) -> dict[str, Any]:
    names = [str(picture.path) for turn in conversation.turns for picture in turn.pictures]
    record: dict[str, Any] = {"image": names} if names else {}
    return record | {"conversations": conversation.messages()}
