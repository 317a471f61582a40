"""Scores of a generated answer against one expected text, all between 0 and 1.

Sources: ANLS of ST-VQA and DocVQA (Biten et al. 2019, threshold 0.5), relaxed accuracy of PlotQA and ChartQA (Methani
et al. 2020, Masry et al. 2022; 5 % tolerance for numbers).
"""

from __future__ import annotations

import re

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:e[+-]?\d+)?%?", re.IGNORECASE)


def normalize_text(text: str) -> str:
    """Convert to lower case and collapse white space."""
    return " ".join(text.lower().split())


def exact_match(expected: str, given: str) -> bool:
    """Whether both texts are equal, ignoring white space at the ends."""
    return expected.strip() == given.strip()


def normalized_match(expected: str, given: str) -> bool:
    """Whether both texts are equal in lower case, ignoring white space and full stops at the end.

    For benchmarks with one short answer, such as GQA (Hudson and Manning 2019).
    """
    return normalize_text(expected).rstrip(". ") == normalize_text(given).rstrip(". ")


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance of two texts: minimum number of inserted, deleted and substituted characters."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def anls(expected: str, given: str) -> float:
    """One minus the normalised edit distance; 0 if at least half of the characters are wrong."""
    a, b = normalize_text(expected), normalize_text(given)
    if not a and not b:
        return 1.0
    distance = edit_distance(a, b) / max(len(a), len(b))
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def parse_number(text: str) -> float | None:
    """Value of a numeric text, which may have a percent sign and thousands separators; None if not a number."""
    plain = text.strip()
    if not _NUMBER.fullmatch(plain):
        return None
    plain = plain.replace(",", "")
    try:
        return float(plain[:-1]) / 100 if plain.endswith("%") else float(plain)
    except ValueError:  # nothing but a sign, a point or an exponent
        return None


def relaxed_accuracy(expected: str, given: str) -> bool:
    """Whether numbers differ by at most 5 % of the expected one, or other texts are equal up to case and white space.

    `12%` is 0.12, as in ChartQA's evaluation; 0 is met only by 0.
    """
    a, b = parse_number(expected), parse_number(given)
    if a is None or b is None:
        return normalize_text(expected) == normalize_text(given)
    return abs(a - b) <= RELAXED_TOLERANCE * abs(a)
