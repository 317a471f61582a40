"""Failures of Megatron's own argument checks as one-line ValueErrors, with the failed condition and its values."""

from __future__ import annotations

import argparse
import linecache
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def translate_refusals(args: argparse.Namespace) -> Iterator[None]:
    """Context in which a failed Megatron check becomes a ValueError with the reason and the values involved."""
    try:
        yield
    except (AssertionError, RuntimeError, NotImplementedError, TypeError, KeyError) as error:
        raise ValueError(f"Megatron refuses the arguments: {_describe_refusal(error, args)}") from error


def _describe_refusal(error: BaseException, args: argparse.Namespace) -> str:
    """Reason of a failed check: its message, or its source line, since most of Megatron's assertions have no text."""
    condition = _failed_statement(error).removeprefix("assert ")
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError | RuntimeError | NotImplementedError) and text:
        return text
    names = [name for name in dict.fromkeys(re.findall(r"args\.(\w+)", condition)) if hasattr(args, name)]
    values = ", ".join(f"--{name.replace('_', '-')} is {getattr(args, name)}" for name in names)
    reason = f"{text}: {condition}" if text else f"it requires {condition.replace('args.', '')}"
    return reason + (f" ({values})" if values else "")


def _failed_statement(error: BaseException) -> str:
    """Source of the failed statement, joined to one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    first, last = frame.lineno or 0, frame.end_lineno or frame.lineno or 0
    lines = (linecache.getline(frame.filename, number).strip() for number in range(first, last + 1))
    return " ".join(line.rstrip("\\").strip() for line in lines)
