"""Answers out of a closed set, found in what a model wrote: yes or no, and the letter of an option."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_internvlx.evaluation.scores import normalize_text

_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s*(\S.*?)\s*$", re.MULTILINE)
# "B", "(B)", "B.", "b) red", "**B**", "B - red"; not "A red car".
_LEADING = re.compile(r"""^[\s(\["'`*]*([A-Za-z])(?=[\s"'`*\])]*$|[.):\],*]|\s+[-–—]\s)""")
# "A, B", "(A) and (B)", "A or B"; not "A, I think".
_SEVERAL = re.compile(
    r"""^\W*([A-Za-z])\b\W*?(?:[,/;&]|\band\b|\bor\b)(?:\W|\band\b|\bor\b)*([A-Za-z])\b(?=\W*$|\W*?[,/;&.):\]]|\s+(?:and|or)\b)"""
)
# "The answer is B", "answer: (B)", "option B". A capital letter: "the answer is a car" names no option.
_STATED = re.compile(
    r"""\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)\b(?:\s+[a-z]+){0,2}[\s:=("'`*\[]+([A-Z])\b(?!['’])"""
)
_ALONE = re.compile(r"(?<![\w'’])([A-Z])(?![\w'’])")
# At the start of a sentence "A" may be the article, and "I" anywhere the pronoun.
_ARTICLE = re.compile(r"(?:^|[.!?]\s+)A\s+[a-z]|\bI\s+[a-z]")


def yes_or_no(text: str) -> str | None:
    """`"yes"` or `"no"` as the first sentence of an answer says it; None if it says neither.

    A negation counts as no, as in the evaluation of POPE.
    """
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.partition(".")[0].lower().replace("\u2019", "'"))
    if any(word in ("no", "not") or word.endswith("n't") for word in words):
        return "no"
    return "yes" if "yes" in words else None


def yes_no(expected: str, given: str) -> bool:
    """Whether an answer says yes where yes is expected, or no where no is.

    Source: POPE (Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models"), where an
    answer without a negation counts as yes.
    """
    return (yes_or_no(given) or "yes") == yes_or_no(expected)


def yes_no_summary(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """POPE's scores of (expected, given) pairs, 0 to 1; 0 where nothing can be counted.

    Keys: `accuracy`; `precision`, `recall` and `f1` of the answer yes; `yes_share`, answers that are yes;
    `unclear`, the number of answers that say neither and are counted as yes.
    """
    found = [(yes_or_no(expected) == "yes", yes_or_no(given)) for expected, given in pairs]
    counted = [(positive, answer != "no") for positive, answer in found]
    hits = sum(positive and said for positive, said in counted)
    said_yes, positives = sum(said for _, said in counted), sum(positive for positive, _ in counted)
    return {
        "accuracy": _ratio(sum(positive == said for positive, said in counted), len(counted)),
        "precision": _ratio(hits, said_yes),
        "recall": _ratio(hits, positives),
        "f1": _ratio(2 * hits, said_yes + positives),
        "yes_share": _ratio(said_yes, len(counted)),
        "unclear": sum(answer is None for _, answer in found),
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def question_options(question: str) -> dict[str, str]:
    """Options that a question lists, a line each (`A. red`), as letter -> text; empty if it lists fewer than two."""
    found = dict(_OPTION.findall(question))
    return found if len(found) > 1 else {}


def choice_letter(text: str, options: Mapping[str, str] | None = None) -> str | None:
    """Letter of the option that an answer chooses, upper case; None if it chooses none or several.

    Tried in this order: a letter at the start (`B`, `(B)`, `B. red`), the last statement of one (`the answer is B`),
    the text of an option, the only capital letter that stands alone, the only option whose text occurs.

    Args:
        text: answer.
        options: letter -> text, where known; other letters are then not taken.
    """
    options = options or {}

    def valid(letters: Sequence[str]) -> list[str]:
        return [letter.upper() for letter in letters if not options or letter.upper() in options]

    several = _SEVERAL.match(text)
    if several and len(set(valid(several.groups()))) > 1:
        return None
    plain = normalize_text(text).rstrip(".")
    texts = {letter: normalize_text(option).rstrip(".") for letter, option in options.items()}
    occurring = [
        letter for letter, option in texts.items() if re.search(rf"(?<!\w){re.escape(option)}(?!\w)", plain)
    ]
    for found in (
        valid(_LEADING.findall(text)),
        valid(_STATED.findall(text))[-1:],
        [letter for letter, option in texts.items() if option == plain],
        valid(_ALONE.findall(_ARTICLE.sub(" ", text))),
        occurring,
    ):
        if len(set(found)) == 1:
            return found[0]
    return None


def multiple_choice(expected: str, given: str, question: str = "") -> bool:
    """Whether an answer chooses the expected option.

    Source: the questions of MMBench (Liu et al. 2023), SEED-Bench (Li et al. 2023), ScienceQA (Lu et al. 2022), AI2D
    (Kembhavi et al. 2016) and MMMU (Yue et al. 2023), without the judge or the random choice that some of them
    resort to for answers without a letter: those are wrong.

    Args:
        expected: letter, or text of an option that the question lists.
        given: answer.
        question: its text, which may list the options.
    """
    options = question_options(question)
    wanted = choice_letter(expected, options)
    return wanted is not None and choice_letter(given, options) == wanted
