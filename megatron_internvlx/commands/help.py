"""One style for the help and the errors of every command: usage, a sentence, options, examples, exit codes."""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_internvlx.commands.values import Number
from megatron_internvlx.exit_codes import DONE, MISTAKE

COLUMN = 34  # where the text of an option begins; the same as in `pretrain_vlm.py --help`
LEAST_WIDTH, MOST_WIDTH = 70, 118
USUAL_EXITS = {DONE: "done", MISTAKE: "wrong arguments or files, with one message"}
_TITLES = {
    "positional arguments": "Arguments",
    "options": "Options",
}  # argparse's own names of its two groups


class CommandParser(argparse.ArgumentParser):
    """Parser of one command of `ivlx`.

    Args:
        command: name of the command, without `ivlx`.
        summary: one sentence on what it does.
        about: more about it, in paragraphs; "" for nothing more.
        examples: complete command lines, with remarks after `#`.
        exits: exit codes and their meaning here.
        rest: placeholder for arguments that are passed on, such as pretrain_vlm.py's.
    """

    def __init__(
        self,
        command: str,
        summary: str,
        *,
        about: str = "",
        examples: Sequence[str] = (),
        exits: Mapping[int, str] | None = None,
        rest: str = "",
        **options: Any,
    ) -> None:
        super().__init__(prog=f"ivlx {command}", description=summary, allow_abbrev=False, **options)
        self.about, self.examples, self.rest = about, tuple(examples), rest
        self.exits = dict(USUAL_EXITS if exits is None else exits)
        self._words: list[str] = []  # that are being parsed, for the message about a mistake in them

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse what is known, as argparse does."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        """Help in the form that all commands have."""
        return help_text(self)

    def error(self, message: str) -> NoReturn:
        """Print a message of one line, and end with code 2."""
        self.exit(MISTAKE, f"{self.prog}: {explain(self, message, self._words)}\n")


def help_requested(words: Sequence[str]) -> bool:
    """Whether the words ask for help; what follows `--` is not looked at."""
    own = words[: words.index("--")] if "--" in words else words
    return any(word in ("-h", "--help") for word in own)


def nearest(word: str, known: Iterable[str], least: float = 0.6) -> str:
    """Hint ": did you mean NAME?" with the known word of the greatest similarity, at least `least`; or ""."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=least)
    return f": did you mean {close[0]}?" if close else ""


def flags(parser: argparse.ArgumentParser) -> list[str]:
    """All option words of a parser, in its order, `--help` last."""
    found = [flag for action in parser._actions for flag in action.option_strings]
    return sorted(found, key=lambda flag: flag in ("-h", "--help"))


def explain(parser: argparse.ArgumentParser, message: str, words: Sequence[str]) -> str:
    """Text of an error of argparse about these words: unknown options come first, each with the most similar one."""
    known = flags(parser)
    wrong = [word.partition("=")[0] for word in words if word.startswith("--") and len(word) > 2]
    hints = [word + nearest(word, known) for word in wrong if word not in known]
    if hints and not getattr(parser, "rest", ""):
        return f"unknown option {', '.join(hints)} ({parser.prog} --help lists the options)"
    message = message.replace("unrecognized arguments: ", "unexpected argument ")
    return f"{message} ({parser.prog} --help explains the options)"


def value_name(action: argparse.Action) -> str:
    """Placeholder for the value of an option or an argument, such as DIR; "" for a switch."""
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, str):
        name = action.metavar
    elif action.choices is not None:
        name = "|".join(map(str, action.choices))
    else:
        names: dict[Any, str] = {int: "INT", float: "FLOAT", Path: "PATH", None: "TEXT", str: "TEXT"}
        name = action.type.name if isinstance(action.type, Number) else names.get(action.type, "VALUE")
        name = name if action.option_strings else action.dest.upper()
    return f"{name} ..." if action.nargs in ("*", "+") else name


def help_text(parser: argparse.ArgumentParser, width: int | None = None) -> str:
    """Complete help of a command.

    Args:
        parser: its parser; a plain one gets the same form, without examples and exit codes.
        width: of a line in characters; None for that of the terminal.
    """
    columns = shutil.get_terminal_size((MOST_WIDTH, 24)).columns if width is None else width
    return "\n".join(_lines(parser, min(max(columns, LEAST_WIDTH), MOST_WIDTH))) + "\n"


def print_help(parser: argparse.ArgumentParser) -> int:
    """Print the help of a command; returns the exit code."""
    sys.stdout.write(help_text(parser))
    return DONE


def _lines(parser: argparse.ArgumentParser, width: int) -> Iterator[str]:
    yield from _usage(parser, width)
    for text in (parser.description, getattr(parser, "about", ""), parser.epilog):
        for paragraph in (text or "").strip().split("\n\n"):
            if paragraph.startswith("  "):  # commands, which keep their lines
                yield f"\n{paragraph.rstrip()}"
            elif paragraph:
                yield ""
                yield from textwrap.wrap(" ".join(paragraph.split()), width, break_on_hyphens=False)
    for group in parser._action_groups:
        actions = [
            one
            for one in group._group_actions
            if one.help != argparse.SUPPRESS and not isinstance(one, argparse._HelpAction)
        ]
        if actions:
            title = _TITLES.get(group.title or "", group.title or "")
            yield f"\n{title[:1].upper()}{title[1:]}"
            for action in actions:
                yield from _option(action, width)
    if examples := getattr(parser, "examples", ()):
        yield "\nExamples"
        yield from (f"  {line}" for line in examples)
    if exits := getattr(parser, "exits", None):
        yield "\nExit codes"
        for code, meaning in exits.items():
            yield from _row(f"  {code}", meaning, width, column=5)


def _usage(parser: argparse.ArgumentParser, width: int) -> Iterator[str]:
    optional = [action for action in parser._actions if action.option_strings]
    words = [value_name(action) for action in parser._actions if not action.option_strings]
    words += [_spell(action) for action in optional if action.required]
    grouped = [group for group in parser._mutually_exclusive_groups if group.required]
    words += [f"({' | '.join(_spell(one) for one in group._group_actions)})" for group in grouped]
    if len(optional) > 1:  # --help is always there
        words.append("[options]")
    words += [rest] if (rest := getattr(parser, "rest", "")) else []
    start = f"usage: {parser.prog} "
    lines = textwrap.wrap(" ".join(words), width - len(start), break_on_hyphens=False) or [""]
    yield (start + lines[0]).rstrip()
    yield from (" " * len(start) + line for line in lines[1:])


def _spell(action: argparse.Action) -> str:
    return f"{action.option_strings[-1]} {value_name(action)}".rstrip()


def _option(action: argparse.Action, width: int) -> Iterator[str]:
    name = f"  {', '.join(action.option_strings)} {value_name(action)}".rstrip()
    if not action.option_strings:
        name = f"  {value_name(action)}"
    text = (action.help or "").replace(" (default: %(default)s)", "")  # argparse adds it to some
    if "%" in text:
        text = text % (vars(action) | {"prog": "ivlx"})
    yield from _row(name, text + _default(action), width)


def _default(action: argparse.Action) -> str:
    value = action.default
    if isinstance(action, argparse.BooleanOptionalAction):
        return f" [{'on' if value else 'off'}]"
    if action.nargs == 0 or value is None or value is False or value in (argparse.SUPPRESS, "", []):
        return ""
    if "(default" in (action.help or "") or (action.help or "").endswith("]"):
        return ""
    return f" [{' '.join(map(str, value)) if isinstance(value, list) else value}]"


def _row(name: str, text: str, width: int, column: int = COLUMN) -> Iterator[str]:
    lines = textwrap.wrap(text, width - column - 2, break_on_hyphens=False) or [""]
    if len(name) > column:
        yield name
    else:
        yield f"{name.ljust(column)}  {lines.pop(0)}".rstrip()
    yield from (" " * (column + 2) + line for line in lines)
