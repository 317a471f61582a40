"""Metrics by name: those of the benchmarks of visual question answering that need no judge.

A metric compares an answer with the references of its question. The functions themselves, with their sources, are in
`scores.py`, `vqa_text.py` and `closed_answers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_internvlx.evaluation import closed_answers, scores
from megatron_internvlx.evaluation.vqa_text import vqa_accuracy

DEFAULT_METRIC = "exact_match"
RIGHT_FROM = 0.5
"""Score from which an answer counts as right on the page and in the table of kinds."""


@dataclass(frozen=True)
class Metric:
    """Metric of answers."""

    name: str
    """Value of `--metric` and of a record's `metric`."""
    score: Callable[[Sequence[str], str, str], float]
    """(references, given answer, text of the question) to 0..1."""
    fault: Callable[[Sequence[str], str], str | None] = lambda references, question: None
    """(references, text of the question) to the reason why they cannot be scored; None if they can."""
    summary: Callable[[Sequence[tuple[str, str]]], dict[str, Any]] | None = None
    """Further scores of all (first reference, given answer) pairs."""


def _best(function: Callable[[str, str], float]) -> Callable[[Sequence[str], str, str], float]:
    """Score of the reference that fits best."""
    return lambda references, given, question: float(max(function(one, given) for one in references))


def _not_yes_or_no(references: Sequence[str], question: str) -> str | None:
    wrong = [one for one in references if closed_answers.yes_or_no(one) is None]
    return f"metric yes_no needs yes or no as the expected answer, found {wrong[0]!r}" if wrong else None


def _not_an_option(references: Sequence[str], question: str) -> str | None:
    options = closed_answers.question_options(question)
    wrong = [one for one in references if closed_answers.choice_letter(one, options) is None]
    if not wrong:
        return None
    known = f"one of the question's options {', '.join(options)}" if options else "a letter"
    return f"metric multiple_choice needs {known} as the expected answer, found {wrong[0]!r}"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact_match", _best(scores.exact_match)),
        Metric("normalized_match", _best(scores.normalized_match)),
        Metric("anls", _best(scores.anls)),
        Metric("relaxed_accuracy", _best(scores.relaxed_accuracy)),
        Metric("vqa_accuracy", lambda references, given, question: vqa_accuracy(references, given)),
        Metric("yes_no", _best(closed_answers.yes_no), _not_yes_or_no, closed_answers.yes_no_summary),
        Metric(
            "multiple_choice",
            lambda references, given, question: float(
                any(closed_answers.multiple_choice(one, given, question) for one in references)
            ),
            _not_an_option,
        ),
    )
}


def get_metric(name: str) -> Metric:
    """Metric with this name. Raises ValueError that lists the known ones."""
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; it must be one of {', '.join(METRICS)}")
    return METRICS[name]


def summarize_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean score and number of answers of each metric that rows of predictions name, with its further scores."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["metric"] for row in rows):
        own = [row for row in rows if row["metric"] == name]
        found[name] = {"answers": len(own), "score": sum(row["score"] for row in own) / len(own)}
        if summary := get_metric(name).summary:
            found[name] |= summary([(row["references"][0], row["given"]) for row in own])
    return found


def metric_lines(scores: Mapping[str, Any]) -> list[str]:
    """A line for each metric that questions name, with its further scores; none for exact match, which all have."""
    lines = []
    for name, found in scores["metrics"].items():
        if name != DEFAULT_METRIC:
            further = [
                f"{key.replace('_', ' ')} "
                + (str(value) if isinstance(value, int) else f"{100 * value:.2f} %")
                for key, value in found.items()
                if key not in ("answers", "score")
            ]
            lines.append(", ".join([f"{name.replace('_', ' '):17} {100 * found['score']:6.2f} %", *further]))
    return lines
