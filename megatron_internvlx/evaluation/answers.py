"""Ask a generating model the questions of a data set, and score each answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_internvlx.data.conversation import IMAGE, without_images
from megatron_internvlx.data.decode_pil import image_size, read_header
from megatron_internvlx.data.manifest import Manifest, Record
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.data.sample import parse_record
from megatron_internvlx.evaluation.generation import Generator, Sampling, answer_prompt, cut_of, strip_turns
from megatron_internvlx.evaluation.scores import anls, exact_match, relaxed_accuracy
from megatron_internvlx.hf.processing_internvlx import InternVLXProcessor


@dataclass(frozen=True)
class Question:
    """A question with its context, and the expected answer."""

    key: str
    kind: str
    images: tuple[str, ...]
    """Paths of the images up to this turn."""
    prompt: str
    """Conversation before the answer; earlier answers are the expected ones."""
    text: str
    expected: str


def questions(manifest: Manifest, template: str, limit: int | None = None) -> Iterator[Question]:
    """Yield a question for every answer of every record, in the data set's order; at most `limit` records."""
    for position in range(min(len(manifest), limit or len(manifest))):
        yield from _record_questions(manifest.record(position), template)


def _record_questions(record: Record, template: str) -> Iterator[Question]:
    paths, turns = parse_record(record)
    for number, turn in enumerate(turns):
        if turn.get("from") not in ("system", "human", "gpt") or not isinstance(turn.get("value"), str):
            raise BadSample(
                record.key,
                "bad_message",
                f"turn {number} needs 'from' (system, human or gpt) and a text 'value'",
            )
    turns = strip_turns(template, turns)
    placeholders = sum(turn["value"].count(IMAGE) for turn in turns)
    if placeholders != len(paths):
        raise BadSample(
            record.key, "placeholder_mismatch", f"{placeholders} {IMAGE} placeholders for {len(paths)} images"
        )
    kinds = record.data.get("kinds") or [record.data.get("kind", "")]
    answered = 0
    for number, turn in enumerate(turns):
        if turn["from"] != "gpt":
            continue
        kind = kinds[min(answered, len(kinds) - 1)]
        answered += 1
        prompt = answer_prompt(template, turns[: number + 1], record.key)
        seen = sum(t["value"].count(IMAGE) for t in turns[:number])
        question = next((t["value"] for t in reversed(turns[:number]) if t["from"] == "human"), "")
        yield Question(
            record.key,
            kind,
            tuple(paths[:seen]),
            prompt,
            without_images(question),
            turn["value"],
        )


class Answerer:
    """Generates answers greedily, several at a time.

    Args:
        model: from `load_model`, on its device.
        processor: its processor.
        max_new_tokens: maximum length of an answer.
    """

    def __init__(self, model: Any, processor: InternVLXProcessor, max_new_tokens: int) -> None:
        self.generator, self.processor = Generator(model, processor), processor
        self.sampling = Sampling(max_new_tokens)

    def answer(self, batch: Sequence[Question]) -> list[str]:
        """Generate the answers of a batch. Raises BadSample with the path of an image that cannot be decoded."""
        images = [list(question.images) for question in batch]
        try:
            inputs = self.generator.encode([question.prompt for question in batch], images)
        except (OSError, SyntaxError):  # raised by Pillow for a broken image
            for path in dict.fromkeys(path for own in images for path in own):
                with read_header(path) as image:
                    image.load()
            raise
        return self.generator.texts(self.generator.generate(inputs, self.sampling))

    def prediction_row(self, question: Question, given: str) -> dict[str, Any]:
        """Content of one line of the predictions file."""
        cut = None
        if question.images:
            cut = cut_of(self.processor, image_size(question.images[0]), len(question.images))
        return {
            "key": question.key,
            "kind": question.kind,
            "question": question.text,
            "image": question.images[0] if question.images else None,
            "images": list(question.images),
            "cols": cut.cols if cut else 0,
            "rows": cut.rows if cut else 0,
            "thumbnail": bool(cut and cut.thumbnail),
            "expected": question.expected,
            "given": given,
            "correct": exact_match(question.expected, given),
            "anls": anls(question.expected, given),
            "relaxed": relaxed_accuracy(question.expected, given),
        }


def summarize_scores(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean scores of all answers, and exact match by kind of question."""
    count = max(1, len(rows))
    kinds: dict[str, list[bool]] = {}
    for row in rows:
        kinds.setdefault(row["kind"] or "other", []).append(row["correct"])
    return {
        "answers": len(rows),
        "exact_match": sum(row["correct"] for row in rows) / count,
        "anls": sum(row["anls"] for row in rows) / count,
        "relaxed_accuracy": sum(row["relaxed"] for row in rows) / count,
        "by_kind": {kind: [sum(right), len(right)] for kind, right in sorted(kinds.items())},
    }
