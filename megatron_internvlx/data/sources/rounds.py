"""Consecutive records of the same images, joined to conversations of several rounds."""

from __future__ import annotations

import re
from collections.abc import Callable

from megatron_internvlx.data.conversation import IMAGE
from megatron_internvlx.data.sources.record import LeftOut, Records, SourceRecord

_PLACEHOLDER = re.compile(re.escape(IMAGE) + "\n?")


def merge_rounds(records: Records, mend: Callable[[SourceRecord], LeftOut | None]) -> Records:
    """Join consecutive records with the same images; records without images are never joined.

    Args:
        records: stream of records as they were read.
        mend: mends a record in place, or returns why it cannot be used. Such a record is left out alone, and the
            others of its images are joined all the same.
    """
    joined: SourceRecord | None = None
    for found in records:
        if isinstance(found, LeftOut):
            yield found
        elif (error := mend(found)) is not None:
            yield error
        elif joined is not None and (turns := _further_turns(joined, found)):
            joined.turns += turns
            joined.mends += [one for one in found.mends if one not in joined.mends]
        else:
            if joined is not None:
                yield joined
            joined = found
    if joined is not None:
        yield joined


def _further_turns(first: SourceRecord, other: SourceRecord) -> list[dict[str, str]]:
    """Turns of a record without the images that an earlier record shows already; none if they do not fit together."""
    if not first.images or _contents(first) != _contents(other):
        return []
    turns = [
        {**turn, "value": _PLACEHOLDER.sub("", turn["value"])} if turn["from"] == "human" else turn
        for turn in other.turns
    ]
    # A question that is an image alone would be empty, and a system turn stands first only.
    fits = turns[0]["from"] == "human" and all(turn["value"].strip() for turn in turns)
    return turns if fits else []


def _contents(record: SourceRecord) -> list[str | bytes]:
    """Bytes of embedded images, names of others."""
    return [image.name if image.data is None else image.data for image in record.images]
