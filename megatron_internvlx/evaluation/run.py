"""Complete evaluation from model to HTML page; the part of `ivlx evaluate` that needs PyTorch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_internvlx import platform
from megatron_internvlx.data.decode_pil import image_size
from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.evaluation.answers import Answerer, questions, summarize_scores
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


def evaluate(settings: EvaluationSettings, manifest: Manifest) -> dict:
    """Generate and score all answers, and write the result files; returns the scores.

    Args:
        settings: model, directories and limits.
        manifest: records of the data.

    Raises ValueError (ConversionError, BadSample).
    """
    model, processor, template = load_model(settings.hf, getattr(torch, settings.dtype))
    answerer = Answerer(model.to(platform.device()), processor, settings.max_new_tokens)
    asked = list(questions(manifest, template, settings.limit))
    if not asked:
        raise ValueError(f"{settings.data}: no record has an answer to compare with")
    for path in dict.fromkeys(path for question in asked for path in question.images):
        image_size(path)  # report a missing image before hours of generation
    settings.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for start in tqdm(range(0, len(asked), settings.batch_size), desc="answers", unit="batch"):
        batch = asked[start : start + settings.batch_size]
        rows += [
            answerer.prediction_row(q, given) for q, given in zip(batch, answerer.answer(batch), strict=True)
        ]
    scores = summarize_scores(rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    title = f"{settings.hf.resolve().name} on {settings.data.stem}"
    parts = [settings.out / f"{name}.partial" for name in RESULTS]
    try:
        parts[0].write_text(lines, encoding="utf-8")
        parts[1].write_text(json.dumps(scores, indent=2) + "\n")
        write_page(parts[2], title, scores, rows, settings.page_limit)
    except OSError:
        for part in parts:
            part.unlink(missing_ok=True)
        raise
    for part in parts:
        part.replace(part.with_suffix(""))
    return scores
