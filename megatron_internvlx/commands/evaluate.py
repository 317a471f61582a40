"""`ivlx evaluate`: a Hugging Face model's answers to the questions of a data set, and their scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_internvlx.checkpoint.checks import check_model_directory
from megatron_internvlx.commands.help import CommandParser
from megatron_internvlx.commands.values import Number
from megatron_internvlx.config import settings_from
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.evaluation.metrics import METRICS, metric_lines
from megatron_internvlx.exit_codes import DONE, MISTAKE


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    it = CommandParser(
        "evaluate",
        "Generate a model's answers to the questions of a data set, and score them.",
        about="It writes predictions.jsonl (one answer per line), scores.json, and page.html with images, questions "
        "and answers. The model is an export, or a released InternVL or InternVL-X.",
        examples=(
            "ivlx evaluate --hf demo-model --data runs/demo/data/meta_val.json --out evaluation",
            "ivlx evaluate --hf InternVL-X-8B --data meta_val.json --limit 100 --dtype bfloat16",
            "ivlx evaluate --hf InternVL-X-8B --data docvqa_val.json --metric anls --dtype bfloat16",
        ),
    )
    count = Number(positive_int, "INT")
    add = it.add_argument
    add(
        "--hf",
        type=Path,
        metavar="DIR",
        required=True,
        help="directory with model, tokenizer and config.json",
    )
    add("--data", type=Path, metavar="FILE", required=True, help="InternVL meta.json of the questions")
    add("--out", type=Path, metavar="DIR", default=Path("evaluation"), help="directory to write")
    add(
        "--metric",
        choices=tuple(METRICS),
        help="metric of all answers (unset: the key metric of each record, or exact_match)",
    )
    add("--batch-size", type=count, default=8, help="answers per batch")
    add("--max-new-tokens", type=count, default=64, help="tokens per answer")
    add("--limit", type=count, help="maximum number of records (unset: all)")
    add("--page-limit", type=count, default=300, help="answers on the page")
    types = ("float32", "bfloat16", "float16")
    add("--dtype", choices=types, default="float32", help="type of the weights")
    return it


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; returns the exit code."""
    options = parser().parse_args(argv)
    from megatron_internvlx.data.manifest import Manifest

    try:
        check_model_directory("--hf", options.hf)
        manifest = Manifest(options.data)
        if options.out.exists() and not options.out.is_dir():
            raise ValueError(f"--out {options.out}: a file, not a directory")
        print("ivlx evaluate: loading PyTorch and the model ...", file=sys.stderr, flush=True)
        # Imported late: this takes seconds, on a busy machine half a minute.
        from megatron_internvlx.evaluation.run import EvaluationSettings, evaluate

        scores = evaluate(settings_from(options, EvaluationSettings), manifest)
    except (BadSample, OSError, ValueError) as error:
        print(f"ivlx evaluate: {error}", file=sys.stderr)
        return MISTAKE
    for name in ("exact_match", "anls", "relaxed_accuracy"):
        print(f"{name.replace('_', ' '):17} {100 * scores[name]:6.2f} %")
    for line in metric_lines(scores):
        print(line)
    for kind, (right, asked) in scores["by_kind"].items():
        print(f"  {kind:15} {right:5} of {asked}")
    print(f"{scores['answers']} answers in {options.out}")
    return DONE
