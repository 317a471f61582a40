"""Argument types of the commands: finite numbers in a range, sizes; argparse rejects others with exit code 2."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

LARGE = 2**31 - 1
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Number[Value: (int, float)]:
    """Argparse type of a number: `parse` converts the text and raises ArgumentTypeError; `name` stands in the help."""

    parse: Callable[[str], Value]
    name: str

    def __call__(self, text: str) -> Value:
        """Convert the text of one argument. Raises ArgumentTypeError."""
        return self.parse(text)


def int_in_range(low: int, high: int = LARGE) -> Number[int]:
    """Argparse type of a whole number between `low` and `high`, both included."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(
                f"{text[:40]}: must be a whole number between {low:,} and {high:,}"
            )
        return number

    return Number(parse, "INT")


def float_in_range(low: float, high: float = 1e12, *, above: bool = False) -> Number[float]:
    """Argparse type of a finite number between `low` and `high`; `above` excludes `low` itself."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not low <= number <= high or (above and number == low):
            bounds = f"{'above' if above else 'at least'} {low:g} and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text[:40]}: must be a number {bounds}")
        return number

    return Number(parse, "FLOAT")


def parse_size(text: str) -> int:
    """Parse a size such as '5GB' or '800MB'; returns bytes."""
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a size such as 5GB or 800MB")
    return int(match[1]) * _UNITS[match[2]]
