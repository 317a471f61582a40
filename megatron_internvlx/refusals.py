"""What Megatron's own checks refuse, as one line: its text, or the condition and the values in it."""

from __future__ import annotations

import argparse
import linecache
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def refusals(args: argparse.Namespace) -> Iterator[None]:
    """A failed check inside becomes a ValueError that says why, with the values of the arguments it names."""
    try:
        yield
    except (AssertionError, RuntimeError, NotImplementedError, TypeError, KeyError) as error:
        raise ValueError(f"Megatron refuses the arguments: {_reason(error, args)}") from error


def _reason(error: BaseException, args: argparse.Namespace) -> str:
    """Most of Megatron's assertions have no text; the source then says what was asked."""
    condition = _statement(error).removeprefix("assert ")
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError | RuntimeError | NotImplementedError) and text:
        return text
    names = [name for name in dict.fromkeys(re.findall(r"args\.(\w+)", condition)) if hasattr(args, name)]
    values = ", ".join(f"--{name.replace('_', '-')} is {getattr(args, name)}" for name in names)
    reason = f"{text}: {condition}" if text else f"it wants {condition.replace('args.', '')}"
    return reason + (f" ({values})" if values else "")


def _statement(error: BaseException) -> str:
    """The whole statement that failed, which may have several lines, in one."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    first, last = frame.lineno or 0, frame.end_lineno or frame.lineno or 0
    lines = (linecache.getline(frame.filename, number).strip() for number in range(first, last + 1))
    return " ".join(line.rstrip("\\").strip() for line in lines)
