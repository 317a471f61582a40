"""Argument types of the tools: finite numbers in a range; argparse rejects others with exit code 2."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

LARGE = 2**31 - 1


def int_in_range(low: int, high: int = LARGE) -> Callable[[str], int]:
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

    return parse


def float_in_range(low: float, high: float = 1e12, *, above: bool = False) -> Callable[[str], float]:
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

    return parse
