"""Recipe files: YAML mappings of argument names to values, and one-line errors for wrong names and values."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Iterable
from typing import Any, NoReturn

from megatron_internvlx.yaml_files import load_yaml


def read_recipe(path: str, parser: argparse.ArgumentParser, without: Iterable[str] = ()) -> dict[str, Any]:
    """Read a recipe file, a flat YAML mapping of argument names to values, as argparse defaults.

    `without` names settings to ignore; there is no other way to turn off a switch of the recipe.

    Raises ValueError that names the file and the problem: not YAML, a name unknown to `parser`, or a value
    of the wrong type.
    """
    try:
        content = load_yaml(path)
    except ValueError as error:
        raise ValueError(f"--recipe {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--recipe {path}: a recipe must be a flat mapping of argument names to values")
    flat = {str(key).replace("-", "_"): value for key, value in content.items()}
    actions = {action.dest: action for action in parser._actions if action.dest not in ("recipe", "without")}
    unknown = sorted(set(flat) - set(actions))
    if unknown:
        names = ", ".join(name + similar(name, actions) for name in unknown)
        raise ValueError(f"--recipe {path}: unknown arguments {names}")
    for name, value in flat.items():
        if problem := _explain_misfit(actions[name], value):
            raise ValueError(f"--recipe {path}: {name}: {value!r} {problem}")
    for name in (name.lstrip("-").replace("-", "_") for name in without):
        if name not in flat:
            raise ValueError(f"--without {name}: {path} has no such setting{similar(name, flat)}")
        del flat[name]
    return flat


def _explain_misfit(action: argparse.Action, value: Any) -> str:
    """Reason why a YAML value does not fit an argument, or "". argparse itself checks single strings only."""
    if value is None:
        if action.default is not None:
            return f"must be a value: give one, or remove the line for {action.default!r}"
        return ""
    if action.nargs == 0:
        return "" if isinstance(value, bool) else "must be true or false"
    if isinstance(value, dict):
        return "must not be a mapping: a recipe is flat"
    if action.nargs in ("+", "*") or isinstance(action.nargs, int):
        if not isinstance(value, list):
            return f"must be a list: write [{value}]"
    elif isinstance(value, list):
        return "must be a single value, not a list"
    for one in value if isinstance(value, list) else [value]:
        if problem := _explain_wrong_value(action, one):
            return problem
    return ""


def _explain_wrong_value(action: argparse.Action, value: Any) -> str:
    if isinstance(value, bool) and action.type in (int, float):
        return "must be a number"
    kind = action.type
    if kind in (int, float):
        try:
            value = kind(value) if isinstance(value, str) else value  # YAML reads 2e-5 as a string
        except ValueError:
            return "must be a number"
        if not isinstance(value, int | float):
            return "must be a number"
        if kind is int and isinstance(value, float) and not value.is_integer():
            return "must be a whole number"
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
    elif kind is str and not isinstance(value, str):
        return "must be text: put it in quotes"
    if (
        action.choices is not None
        and value not in action.choices
        and str(value) not in map(str, action.choices)
    ):
        return f"must be one of {', '.join(map(str, action.choices))}"
    return ""


def similar(name: str, known: Iterable[str]) -> str:
    """Hint " (do you mean NAME?)" with the most similar known name, or ""."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f" (do you mean {close[0]}?)" if close else ""


def raise_instead_of_exit(parser: argparse.ArgumentParser) -> None:
    """Make `parser` raise a one-line ValueError instead of printing hundreds of flags and exiting."""

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
