"""The program `ivlx`: finds the command, prints help without loading anything heavy, and runs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from megatron_internvlx.commands import registry
from megatron_internvlx.commands.help import help_requested, nearest, print_help
from megatron_internvlx.exit_codes import DONE, FAILED, INTERRUPTED, MISTAKE

HEAD = """\
ivlx: InternVL-X vision-language models, from your own pictures to a model that answers

usage: ivlx COMMAND [options]"""
FOOT = """\
  ivlx COMMAND --help             its options, examples and exit codes
  ivlx --version                  versions of this package, PyTorch and Megatron

Guides: README.md and docs/ of the project; docs/commands.md has the commands, exit codes and completion."""


def overview() -> str:
    """Text of `ivlx --help`."""
    width = max(len(one.name) for one in registry.COMMANDS)
    lines = [HEAD]
    for title, commands in registry.groups():
        lines += [f"\n{title}", *(f"  {one.name.ljust(width)}  {one.summary}" for one in commands)]
    return "\n".join([*lines, "", FOOT])


def versions() -> str:
    """Text of `ivlx --version`, from what is installed, without importing it."""
    found = []
    for package in ("megatron-internvlx", "torch", "megatron-core"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} is not installed")
    return ", ".join(found)


def unknown(word: str) -> str:
    """Message about a first word that is not a command, with the most similar one."""
    if word.startswith("-"):
        hint = ": options come after the command, such as ivlx train"
        return f"ivlx: {word} is not a command{hint}; ivlx --help lists them"
    meant = registry.SYNONYMS.get(word.lower())
    known = registry.find(meant) if meant else None
    hint = (
        f": did you mean {known.name}?" if known else nearest(word, [one.name for one in registry.COMMANDS])
    )
    return f"ivlx: {word} is not a command{hint} (ivlx --help lists the commands)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ivlx` with these words (the command line's); returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except BrokenPipeError:  # such as `ivlx --help | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print(f"\nivlx {words[0]}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(words: list[str]) -> int:
    if words[:1] == ["help"]:
        words = [*[word for word in words[1:2] if word != "help"], "--help"]
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return DONE if words else MISTAKE
    if words[0] in ("-V", "--version"):
        print(versions())
        return DONE
    command = registry.find(words[0])
    if command is None:
        print(unknown(words[0]), file=sys.stderr)
        return MISTAKE
    if help_requested(words[1:]):
        return print_help(command.parser())
    # Commands, Megatron and torchrun read the command line from here.
    own, sys.argv = sys.argv, [f"ivlx {command.name}", *words[0 if command.shared else 1 :]]
    try:
        code: int = command.load().main()
        return code
    finally:
        sys.argv = own


if __name__ == "__main__":
    sys.exit(main())
