"""VQA accuracy and the normalisation of answers that it needs.

Source: Antol et al. 2015, "VQA: Visual Question Answering", and the evaluation page of that benchmark; used by
VQAv2, OK-VQA, TextVQA and VizWiz. Two details are decided here: answers are always normalised, as TextVQA's
evaluator does (VQA's own does not where all references are equal), and fewer than four references, for which
three agreeing annotators cannot remain, need as many as remain.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

AGREEING = 3  # annotators that must have given an answer for it to count fully
ARTICLES = frozenset(("a", "an", "the"))
_COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(_COUNTS)} | {"none": "0"}
# Everything but apostrophe, colon, full stop and the signs of units and amounts, such as % and $.
_MARKS = re.compile(r"""[;/\[\]"{}()=+\\_\-><@`,?!]""")
_FULL_STOP = re.compile(r"\.(?!\d)")  # a decimal point stays
_THOUSANDS = re.compile(r"\d,\d")
# Ending -> words that take it. Words that mean something else without an apostrophe (its, were, well, shed) are not
# listed.
_ENDINGS = {
    "t": "ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn shan shouldn wasn weren won wouldn",
    "ve": "i we you they who what could might must should would",
    "s": "he she that there here where what when who why how let somebody someone something everyone everybody nobody",
    "re": "you they who",
    "ll": "you they it that who there",
    "d": "he you they it that who there",
    "m": "i",
}
CONTRACTIONS = {word + end: f"{word}'{end}" for end, words in _ENDINGS.items() for word in words.split()} | {
    "oclock": "o'clock",
    "maam": "ma'am",
    "yall": "y'all",
}


def _without_marks(text: str) -> str:
    """Text without punctuation: a mark between words becomes a space, one beside a space disappears.

    In a text with a comma between digits all marks disappear, so that `1,000` is `1000`.
    """
    thousands = _THOUSANDS.search(text) is not None
    kept = text
    for mark in set(_MARKS.findall(text)):
        beside = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if beside or thousands else " ")
    return _FULL_STOP.sub("", kept)


def normalize_answer(text: str) -> str:
    """Answer in the form that VQA accuracy compares.

    Lower case, without punctuation and articles, number words up to ten as digits, contractions with their
    apostrophe.
    """
    plain = " ".join(text.lower().replace("\u2019", "'").split())
    words = (NUMBERS.get(word, word) for word in _without_marks(plain).split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(references: Sequence[str], given: str) -> float:
    """Agreement with the annotators, 0 to 1: the mean over them of min(matches among the others / 3, 1).

    `references`: an answer of each annotator, ten in the benchmarks; at least one. A single one is compared for
    equality.
    """
    normal = [normalize_answer(reference) for reference in references]
    same, count = normal.count(normalize_answer(given)), len(normal)
    if count == 1:
        return float(same)
    needed = min(AGREEING, count - 1)
    left_out_matches = same * min(1.0, (same - 1) / needed) if same else 0.0
    left_out_differs = (count - same) * min(1.0, same / needed)
    return (left_out_matches + left_out_differs) / count
