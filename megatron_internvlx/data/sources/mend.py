"""Check the turns of a record by training's own rules, and mend what can be mended without guessing."""

from __future__ import annotations

from typing import Any

from megatron_internvlx.data.conversation import IMAGE, training_text
from megatron_internvlx.data.rejects import BadSample, printable
from megatron_internvlx.data.sources.record import LeftOut, SourceRecord
from megatron_internvlx.recipe import similar

ROLES = {
    "system": "system",
    "developer": "system",
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
}
_SIDES = {"human": "human turns", "gpt": "answers"}
PUT_IMAGE = f"put {IMAGE} in front"
LOWER_ROLE = "wrote roles in lower case"
DROP_SYSTEM = "dropped an empty system turn"
DROP_QUESTION = "dropped a last question without an answer"
FROM_LIMIT = "split the record, or raise seq_length in the recipe that --recipe names"


def mend_record(record: SourceRecord, template: str, max_characters: int) -> None:
    """Mend a record's turns in place, and check them. Raises LeftOut named by the record.

    Args:
        record: record with roles as written; `mends` is extended by what was changed.
        template: chat template of the training.
        max_characters: longest text that is used.
    """
    record.turns = _named_roles(record)
    _drop_empty_ends(record)
    _check_order(record)
    _place_images(record)
    length = sum(len(turn["value"]) for turn in record.turns)
    if length > max_characters:
        raise LeftOut(
            record.key,
            "too_long",
            f"{length:,} characters, over {max_characters:,}: nearly all would be cut; {FROM_LIMIT}",
        )
    try:
        training_text(template, record.turns, len(record.images), key=record.key)
    except BadSample as bad:
        raise LeftOut.of(bad, record.key) from bad


def _named_roles(record: SourceRecord) -> list[dict[str, Any]]:
    """Turns with the roles system, human and gpt."""
    turns = []
    for number, turn in enumerate(record.turns):
        role, text = turn["from"], turn["value"]
        name = ROLES.get(role) if isinstance(role, str) else None
        if name is None and isinstance(role, str) and role.strip().lower() in ROLES:
            name = ROLES[role.strip().lower()]
            _note(record, LOWER_ROLE)
        if name is None:
            hint = similar(role, ROLES) if isinstance(role, str) else ""
            raise LeftOut(
                record.key,
                "unknown_role",
                f"turn {number} has the role {role!r}{hint}; known are {', '.join(ROLES)}: rename it",
            )
        if printable(text) != text:
            raise LeftOut(
                record.key, "bad_message", f"turn {number} contains half of a surrogate pair: remove it"
            )
        turns.append({"from": name, "value": text})
    return turns


def _note(record: SourceRecord, mend: str) -> None:
    if mend not in record.mends:
        record.mends.append(mend)


def _drop_empty_ends(record: SourceRecord) -> None:
    """Drop what teaches nothing and loses nothing: an empty system turn, a last question without an answer."""
    turns = record.turns
    if turns and turns[0]["from"] == "system" and not turns[0]["value"].strip():
        del turns[0]
        _note(record, DROP_SYSTEM)
    asked = [turn["from"] for turn in turns]
    if asked[-2:] == ["gpt", "human"] and IMAGE not in turns[-1]["value"]:
        turns.pop()
        _note(record, DROP_QUESTION)


def _check_order(record: SourceRecord) -> None:
    """Raises LeftOut unless questions and answers alternate, starting with a question, and none is empty."""
    turns, key = record.turns, record.key
    first = next((turn["from"] for turn in turns if turn["from"] != "system"), None)
    if first is None:
        raise LeftOut(key, "no_supervision", "it has no question and no answer: add them")
    if first == "gpt":
        raise LeftOut(key, "turn_order", "it begins with an answer: put the question before it, or remove it")
    expected = "human"
    for number, turn in enumerate(turns):
        role, text = turn["from"], turn["value"]
        if role == "system":
            if number:
                raise LeftOut(key, "turn_order", f"turn {number} is a system turn: only the first may be one")
            continue
        if role != expected:
            raise LeftOut(
                key,
                "turn_order",
                f"turns {number - 1} and {number} are both {_SIDES[role]}: join them, or add what is missing "
                "between them",
            )
        expected = "gpt" if role == "human" else "human"
        if not text.strip():
            if role == "gpt":
                raise LeftOut(key, "empty_answer", f"turn {number}, an answer, has no text: write it")
            if not (number == (turns[0]["from"] == "system") and record.images):
                raise LeftOut(key, "empty_question", f"turn {number}, a question, has no text: write it")
    if turns[-1]["from"] == "human":
        raise LeftOut(key, "no_supervision", "no answer follows the last question: add it")


def _place_images(record: SourceRecord) -> None:
    """Put an `<image>` for each image before the first question if there is none at all."""
    turns, images = record.turns, len(record.images)
    placed = sum(turn["value"].count(IMAGE) for turn in turns)
    if placed == 0 and images:
        first = next(turn for turn in turns if turn["from"] == "human")
        first["value"] = f"{IMAGE}\n" * images + first["value"]
        _note(record, PUT_IMAGE)
        return
    asked = sum(turn["value"].count(IMAGE) for turn in turns if turn["from"] == "human")
    if placed > asked:
        raise LeftOut(
            record.key,
            "placeholder_mismatch",
            f"{IMAGE} is in an answer or system turn: move it to a question",
        )
    if asked != images:
        remedy = "name the missing images" if asked > images else f"write {IMAGE} where each image belongs"
        raise LeftOut(
            record.key,
            "placeholder_mismatch",
            f"{asked} {IMAGE} for {images} images: {remedy}, one for each",
        )
