"""Recipe files, and mistakes in names and values: of a recipe or of the command line, said in one line."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Iterable
from typing import Any, NoReturn

from megatron_internvlx.yaml_files import load_yaml


def read_recipe(path: str, parser: argparse.ArgumentParser, without: Iterable[str] = ()) -> dict[str, Any]:
    """A recipe file as argparse defaults: a flat YAML mapping of argument names to values.

    `without` names settings to leave out: switches cannot be switched off otherwise.

    Raises ValueError naming the file and what is wrong: no YAML, a name that `parser` does not know, a
    value that its argument cannot have.
    """
    try:
        content = load_yaml(path)
    except ValueError as error:
        raise ValueError(f"--recipe {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--recipe {path}: a recipe is a flat mapping of argument names to values")
    flat = {str(key).replace("-", "_"): value for key, value in content.items()}
    actions = {action.dest: action for action in parser._actions if action.dest not in ("recipe", "without")}
    unknown = sorted(set(flat) - set(actions))
    if unknown:
        names = ", ".join(name + similar(name, actions) for name in unknown)
        raise ValueError(f"--recipe {path}: unknown arguments {names}")
    for name, value in flat.items():
        if problem := _misfit(actions[name], value):
            raise ValueError(f"--recipe {path}: {name}: {value!r} {problem}")
    for name in (name.lstrip("-").replace("-", "_") for name in without):
        if name not in flat:
            raise ValueError(f"--without {name}: {path} has no such setting{similar(name, flat)}")
        del flat[name]
    return flat


def _misfit(action: argparse.Action, value: Any) -> str:
    """Why a YAML value does not fit an argument; argparse itself looks at single strings only. "": it fits."""
    if value is None:
        if action.default is not None:
            return f"is no value: give one, or leave the line out for {action.default!r}"
        return ""
    if action.nargs == 0:
        return "" if isinstance(value, bool) else "is neither true nor false"
    if isinstance(value, dict):
        return "is a mapping; a recipe is flat"
    if action.nargs in ("+", "*") or isinstance(action.nargs, int):
        if not isinstance(value, list):
            return f"is not a list: write [{value}]"
    elif isinstance(value, list):
        return "is a list, and the argument takes one value"
    for one in value if isinstance(value, list) else [value]:
        if problem := _wrong_value(action, one):
            return problem
    return ""


def _wrong_value(action: argparse.Action, value: Any) -> str:
    if isinstance(value, bool) and action.type in (int, float):
        return "is no number"
    kind = action.type
    if kind in (int, float):
        try:
            value = kind(value) if isinstance(value, str) else value  # YAML reads 2e-5 as a string
        except ValueError:
            return "is no number"
        if not isinstance(value, int | float):
            return "is no number"
        if kind is int and isinstance(value, float) and not value.is_integer():
            return "is no whole number"
        if isinstance(value, float) and not math.isfinite(value):
            return "is no finite number"
    elif kind is str and not isinstance(value, str):
        return "is no text: put it into quotes"
    if (
        action.choices is not None
        and value not in action.choices
        and str(value) not in map(str, action.choices)
    ):
        return f"is not one of {', '.join(map(str, action.choices))}"
    return ""


def similar(name: str, known: Iterable[str]) -> str:
    """ " (do you mean NAME?)" with the most similar known name; "" if none is similar."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f" (do you mean {close[0]}?)" if close else ""


def raise_errors(parser: argparse.ArgumentParser) -> None:
    """Make `parser` raise ValueError with one line, instead of printing hundreds of flags and exiting."""

    def error(message: str) -> NoReturn:
        head, _, words = message.partition("unrecognized arguments: ")
        if not head and words:
            flags = [flag for action in parser._actions for flag in action.option_strings]
            hints = (
                word + similar(word.partition("=")[0], flags) * word.startswith("-") for word in words.split()
            )
            message = "unknown arguments " + " ".join(hints)
        raise ValueError(f"{message}; --help shows the usual arguments, --help-all lists all")

    parser.error = error  # type: ignore[method-assign]
