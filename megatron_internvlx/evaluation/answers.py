"""Ask a generating model the questions of a data set, and score each answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_internvlx.data.conversation import IMAGE, without_images
from megatron_internvlx.data.decode_pil import image_size, read_header
from megatron_internvlx.data.manifest import Manifest, Record
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.data.sample import parse_record
from megatron_internvlx.evaluation.generation import Generator, Sampling, answer_prompt, cut_of, strip_turns
from megatron_internvlx.evaluation.metrics import DEFAULT_METRIC, RIGHT_FROM, get_metric, summarize_metrics
from megatron_internvlx.hf.processing_internvlx import InternVLXProcessor

ALWAYS = ("exact_match", "anls", "relaxed_accuracy")
"""Metrics of every answer, whichever its question names."""


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
    references: tuple[str, ...] = ()
    """Answers that are compared with, if they differ from `expected`; several where annotators were asked."""
    metric: str = DEFAULT_METRIC
    """Name in `evaluation.metrics.METRICS`."""
    turns: tuple[Mapping[str, Any], ...] = ()
    """Turns before the answer, in InternVL's form, with the expected earlier answers."""

    @property
    def compared(self) -> tuple[str, ...]:
        """Answers that a metric compares with, at least one."""
        return self.references or (self.expected,)


def questions(
    manifest: Manifest, template: str, limit: int | None = None, metric: str | None = None
) -> Iterator[Question]:
    """Yield a question for every answer of every record, in the data set's order.

    Args:
        manifest: records of the data.
        template: name of the model's chat template.
        limit: number of records at most; None: all.
        metric: metric of all questions; None: that of each record, or else exact match.

    Raises BadSample for a record that cannot be asked or scored.
    """
    for position in range(min(len(manifest), limit or len(manifest))):
        yield from _record_questions(manifest.record(position), template, metric)


def _record_references(record: Record, answered: int) -> list[tuple[str, ...]]:
    """References of each of `answered` answers: the record's `answers`, empty where it has none."""
    given = record.data.get("answers")
    if given is None:
        return [()] * answered
    if answered == 1 and isinstance(given, list) and all(isinstance(one, str) for one in given):
        given = [given]
    fine = isinstance(given, list) and all(
        isinstance(own, list) and own and all(isinstance(one, str) for one in own) for own in given
    )
    if not fine or len(given) != answered:
        raise BadSample(
            record.key,
            "bad_message",
            f"'answers' must be a list of texts for one gpt turn, or a list of such lists, one for each of the "
            f"{answered} gpt turns",
        )
    return [tuple(own) for own in given]


def _record_metric(record: Record, metric: str | None) -> str:
    """Name of the metric of a record; `metric` overrides its own."""
    name = metric or record.data.get("metric") or DEFAULT_METRIC
    try:
        return get_metric(name).name
    except (TypeError, ValueError) as error:
        raise BadSample(record.key, "bad_message", str(error)) from error


def _record_questions(record: Record, template: str, metric: str | None) -> Iterator[Question]:
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
    references = _record_references(record, sum(turn["from"] == "gpt" for turn in turns))
    metric = _record_metric(record, metric)
    answered = 0
    for number, turn in enumerate(turns):
        if turn["from"] != "gpt":
            continue
        kind, own = kinds[min(answered, len(kinds) - 1)], references[answered]
        answered += 1
        prompt = answer_prompt(template, turns[: number + 1], record.key)
        seen = sum(t["value"].count(IMAGE) for t in turns[:number])
        question = next((t["value"] for t in reversed(turns[:number]) if t["from"] == "human"), "")
        text = without_images(question)
        if fault := get_metric(metric).fault(own or (turn["value"],), text):
            raise BadSample(record.key, "bad_message", fault)
        asked = tuple(turns[:number])
        yield Question(record.key, kind, tuple(paths[:seen]), prompt, text, turn["value"], own, metric, asked)


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
        self.tokens = 0
        """Tokens generated so far, end tokens included."""

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
        new = self.generator.generate(inputs, self.sampling)
        self.tokens += self.generator.count_tokens(new)
        return self.generator.texts(new)

    def prediction_row(self, question: Question, given: str) -> dict[str, Any]:
        """Content of one line of the predictions file."""
        cut = None
        if question.images:
            cut = cut_of(self.processor, image_size(question.images[0]), len(question.images))
        compared = question.compared
        score = get_metric(question.metric).score(compared, given, question.text)
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
            "references": list(compared),
            "given": given,
            "metric": question.metric,
            "score": score,
            "correct": score >= RIGHT_FROM,
        } | {name: get_metric(name).score(compared, given, question.text) for name in ALWAYS}


def summarize_scores(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean scores of all answers, those of each metric that questions name, and right answers by kind of question."""
    count = max(1, len(rows))
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["kind"] or "other", []).append(row)
    kinds = dict(sorted(kinds.items()))
    return {
        "answers": len(rows),
        **{name: sum(row[name] for row in rows) / count for name in ALWAYS},
        "metrics": summarize_metrics(rows),
        "by_kind": {kind: [sum(row["correct"] for row in own), len(own)] for kind, own in kinds.items()},
        "score_by_kind": {kind: sum(row["score"] for row in own) / len(own) for kind, own in kinds.items()},
    }
