"""Generate a Hugging Face model's answers to the questions of a data set, and score them.

    python tools/evaluate.py --hf DIR --data meta_val.json --out evaluation

It writes `predictions.jsonl` (one answer per line), `scores.json`, and `page.html` with images, questions and
answers. DIR is an exported model, or a released InternVL or InternVL-X.

Exit codes: 0 done; 2 wrong arguments or files, with one message.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_internvlx.checkpoint.checks import check_model_directory
from megatron_internvlx.config import settings_from
from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.data.rejects import BadSample


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    it = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    it.add_argument("--hf", type=Path, required=True, help="directory with model, tokenizer and config.json")
    it.add_argument("--data", type=Path, required=True, help="InternVL meta.json of the questions")
    it.add_argument("--out", type=Path, default=Path("evaluation"), help="directory (default: evaluation)")
    it.add_argument("--batch-size", type=positive_int, default=8, help="answers per batch (default: 8)")
    it.add_argument("--max-new-tokens", type=positive_int, default=64, help="tokens per answer (default: 64)")
    it.add_argument("--limit", type=positive_int, help="maximum number of records (default: all)")
    it.add_argument("--page-limit", type=positive_int, default=300, help="answers on the page (default: 300)")
    it.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="type of the weights"
    )
    return it


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        check_model_directory("--hf", options.hf)
        manifest = Manifest(options.data)
        if options.out.exists() and not options.out.is_dir():
            raise ValueError(f"--out {options.out}: a file, not a directory")
        print("evaluate.py: loading PyTorch and the model ...", file=sys.stderr, flush=True)
        # Imported late: this takes seconds, on a busy machine half a minute.
        from megatron_internvlx.evaluation.run import EvaluationSettings, evaluate

        scores = evaluate(settings_from(options, EvaluationSettings), manifest)
    except (BadSample, OSError, ValueError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    for name in ("exact_match", "anls", "relaxed_accuracy"):
        print(f"{name.replace('_', ' '):17} {100 * scores[name]:6.2f} %")
    for kind, (right, asked) in scores["by_kind"].items():
        print(f"  {kind:15} {right:5} of {asked}")
    print(f"{scores['answers']} answers in {options.out}")
    return 0
