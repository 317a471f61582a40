"""How right an answer is. All scores lie between 0 and 1.

Sources: ANLS of DocVQA (Biten et al. 2019, threshold 0.5), relaxed accuracy of ChartQA (Masry et al. 2022,
5 % tolerance for numbers).
"""

from __future__ import annotations

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05


def normalized(text: str) -> str:
    """Lower case, white space at the ends removed and inside made single."""
    return " ".join(text.lower().split())


def exact_match(expected: str, given: str) -> bool:
    """Whether both are the same text, white space at the ends aside."""
    return expected.strip() == given.strip()


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of characters between two texts."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def anls(expected: str, given: str) -> float:
    """One minus the normalised edit distance; 0 from half of the characters wrong on."""
    a, b = normalized(expected), normalized(given)
    if not a and not b:
        return 1.0
    distance = edit_distance(a, b) / max(len(a), len(b))
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def number(text: str) -> float | None:
    """The number that a text is, percent signs and thousands' commas allowed; None if it is none."""
    plain = text.strip().replace(",", "")
    try:
        return float(plain[:-1]) / 100 if plain.endswith("%") else float(plain)
    except ValueError:
        return None


def relaxed_accuracy(expected: str, given: str) -> bool:
    """Numbers may be 5 % off; other texts must be equal but for case and white space."""
    a, b = number(expected), number(given)
    if a is None or b is None:
        return normalized(expected) == normalized(given)
    return abs(a - b) <= RELAXED_TOLERANCE * abs(a)
