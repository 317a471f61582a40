"""Let a Hugging Face model answer the questions of a data set, and score the answers.

    python tools/evaluate.py --hf DIR --data meta_val.json --out evaluation

It writes `predictions.jsonl` (one answer a line), `scores.json`, and `page.html` with images, questions and
answers for a person to look through. DIR is an exported model, or a released InternVL or InternVL-X.

Exit codes: 0 done; 2 a mistake of the caller or of the files, after one message.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

if __name__ == "__main__":  # a checkout that was not installed runs too
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_internvlx import platform
from megatron_internvlx.data.decode_pil import image_size
from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.evaluation.answers import Answerer, questions, summary
from megatron_internvlx.evaluation.hf_model import load_model
from megatron_internvlx.evaluation.page import write_page

RESULTS = ("predictions.jsonl", "scores.json", "page.html")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    it = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    it.add_argument("--hf", type=Path, required=True, help="directory with model, tokenizer and config.json")
    it.add_argument("--data", type=Path, required=True, help="InternVL meta.json of the questions")
    it.add_argument("--out", type=Path, default=Path("evaluation"), help="directory (default: evaluation)")
    it.add_argument("--batch-size", type=positive, default=8, help="answers generated together (default: 8)")
    it.add_argument("--max-new-tokens", type=positive, default=64, help="of an answer (default: 64)")
    it.add_argument("--limit", type=positive, help="records at most (default: all)")
    it.add_argument("--page-limit", type=positive, default=300, help="answers on the page (default: 300)")
    it.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the computation"
    )
    return it


def evaluate(args: argparse.Namespace) -> dict:
    """Generate, score, write; returns the scores. Raises ValueError (ConversionError, BadSample)."""
    manifest = Manifest(args.data)
    model, processor, template = load_model(args.hf, getattr(torch, args.dtype))
    answerer = Answerer(model.to(platform.device()), processor, args.max_new_tokens)
    asked = list(questions(manifest, template, args.limit))
    if not asked:
        raise ValueError(f"{args.data}: none of its records has an answer to compare with")
    for path in dict.fromkeys(path for question in asked for path in question.images):
        image_size(path)  # a missing image is told before hours of generation
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for start in tqdm(range(0, len(asked), args.batch_size), desc="answers", unit="batch"):
        batch = asked[start : start + args.batch_size]
        rows += [answerer.row(q, given) for q, given in zip(batch, answerer.answer(batch), strict=True)]
    scores = summary(rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    title = f"{args.hf.resolve().name} on {args.data.stem}"
    parts = [args.out / f"{name}.partial" for name in RESULTS]
    try:
        parts[0].write_text(lines, encoding="utf-8")
        parts[1].write_text(json.dumps(scores, indent=2) + "\n")
        write_page(parts[2], title, scores, rows, args.page_limit)
    except OSError:
        for part in parts:
            part.unlink(missing_ok=True)
        raise
    for part in parts:
        part.replace(part.with_suffix(""))
    return scores


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        scores = evaluate(args)
    except (BadSample, OSError, ValueError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    for name in ("exact_match", "anls", "relaxed_accuracy"):
        print(f"{name.replace('_', ' '):17} {100 * scores[name]:6.2f} %")
    for kind, (right, asked) in scores["by_kind"].items():
        print(f"  {kind:15} {right:5} of {asked}")
    print(f"{scores['answers']} answers in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
