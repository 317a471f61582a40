"""Complete evaluation from model to HTML page; the part of `ivlx evaluate` that needs PyTorch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_internvlx import platform
from megatron_internvlx.data.decode_pil import image_size
from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.evaluation.answers import Answerer, Question, questions, summarize_scores
from megatron_internvlx.evaluation.hf_model import load_model
from megatron_internvlx.evaluation.page import write_page

RESULTS = ("predictions.jsonl", "scores.json", "page.html")


@dataclass(frozen=True)
class EvaluationSettings:
    """Arguments of `ivlx evaluate`, under its flags' names."""

    hf: Path
    """Directory of the model."""
    data: Path
    """File of the questions."""
    out: Path
    """Directory of the results, created if needed."""
    batch_size: int
    """Answers generated together."""
    max_new_tokens: int
    """Longest answer, in tokens."""
    limit: int | None
    """Number of records to ask at most; None: all."""
    page_limit: int
    """Number of answers on the page at most."""
    dtype: str
    """Type of the weights: a name in `torch`, such as `bfloat16`."""
    metric: str | None = None
    """Metric of all answers, a name in `evaluation.metrics`; None: that of each record, or else exact match."""


def generate_answers(
    answerer: Answerer, asked: Sequence[Question], batch_size: int, unfinished: Path
) -> tuple[list[dict[str, Any]], float]:
    """Rows of the predictions file, and seconds of reading images, generating and scoring.

    A bar shows progress and tokens per second. The rows are written to `unfinished` batch by batch, so that an image
    that cannot be read, or Ctrl-C, does not take hours of answers with it.
    """
    rows: list[dict[str, Any]] = []
    begun = time.monotonic()
    with (
        unfinished.open("w", encoding="utf-8") as file,
        tqdm(total=len(asked), desc="answers", unit="answer") as bar,
    ):
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            given = answerer.answer(batch)
            new = [answerer.prediction_row(*pair) for pair in zip(batch, given, strict=True)]
            file.write(lines_of(new))
            file.flush()
            rows += new
            bar.set_postfix_str(f"{answerer.tokens / (time.monotonic() - begun):.0f} tokens/s", refresh=False)
            bar.update(len(batch))
    return rows, time.monotonic() - begun


def _name_unfinished(path: Path, asked: int) -> None:
    """Say where the answers up to an error are; without any the file goes."""
    count = path.read_text(encoding="utf-8").count("\n") if path.is_file() else 0
    if count:
        print(f"ivlx evaluate: {count} of {asked} answers are in {path}", file=sys.stderr)
    else:
        path.unlink(missing_ok=True)


def lines_of(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def evaluate(settings: EvaluationSettings, manifest: Manifest) -> dict:
    """Generate and score all answers, and write the result files; returns the scores.

    Args:
        settings: model, directories and limits.
        manifest: records of the data.

    Raises ValueError (ConversionError, BadSample). Answers up to an error are then in `predictions.jsonl.partial`.
    """
    model, processor, template = load_model(settings.hf, getattr(torch, settings.dtype))
    answerer = Answerer(model.to(platform.device()), processor, settings.max_new_tokens)
    asked = list(questions(manifest, template, settings.limit, settings.metric))
    if not asked:
        raise ValueError(f"{settings.data}: no record has an answer to compare with")
    for path in dict.fromkeys(path for question in asked for path in question.images):
        image_size(path)  # report a missing image before hours of generation
    settings.out.mkdir(parents=True, exist_ok=True)
    parts = [settings.out / f"{name}.partial" for name in RESULTS]
    try:
        rows, seconds = generate_answers(answerer, asked, settings.batch_size, parts[0])
    except BaseException:
        _name_unfinished(parts[0], len(asked))
        raise
    scores = summarize_scores(rows) | {
        "tokens": answerer.tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(answerer.tokens / seconds, 3),
    }
    title = f"{settings.hf.resolve().name} on {settings.data.stem}"
    try:
        parts[1].write_text(json.dumps(scores, indent=2) + "\n")
        write_page(parts[2], title, scores, rows, settings.page_limit)
    except OSError:
        for part in parts[1:]:
            part.unlink(missing_ok=True)
        raise
    for part in parts:
        part.replace(part.with_suffix(""))
    return scores
