#!/usr/bin/env python
"""Whether the demo's model sees: every kind of question, all together, and no answer that wins by itself.

    python tools/demo_goals.py runs/demo/predictions.jsonl

`make demo` ends with it. Exit code 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # works without an installed package too
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_internvlx.reporting.picture import KindAccuracy, kind_accuracies, read_predictions
from tools.demo_questions import KINDS

EVERY, TOGETHER, COMMONEST = 0.70, 0.85, 0.30
"""Least share of right answers of a kind and of all, and the share that the commonest answer of a kind stays below."""


def missed(found: Sequence[KindAccuracy]) -> list[str]:
    """Goals that these answers miss, each in words with both numbers."""
    asked, right = sum(kind.asked for kind in found), sum(kind.right for kind in found)
    texts = [f"no question of kind {name}" for name in sorted(KINDS - {kind.name for kind in found})]
    for kind in found:
        if kind.right < EVERY * kind.asked:
            texts.append(
                f"{kind.name}: {kind.right} of {kind.asked} right, {100 * kind.right / kind.asked:.1f} %, "
                f"goal {100 * EVERY:.0f} %"
            )
        if kind.commonest >= COMMONEST:
            texts.append(
                f"{kind.name}: always the commonest answer is {100 * kind.commonest:.1f} % right, "
                f"goal below {100 * COMMONEST:.0f} %"
            )
    if right < TOGETHER * asked:
        texts.append(
            f"together: {right} of {asked} right, {100 * right / asked:.1f} %, goal {100 * TOGETHER:.0f} %"
        )
    return texts


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per missed goal, or one that all are met; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("predictions", help="file of --predictions-file")
    found = kind_accuracies(read_predictions(parser.parse_args(arguments).predictions))
    if texts := missed(found):
        print("\n".join(f"goal missed: {text}" for text in texts), file=sys.stderr)
        return 1
    lowest = min(found, key=lambda kind: kind.right / kind.asked)
    print(f"goals met: the lowest kind is {lowest.name}, {lowest.right} of {lowest.asked} right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
