"""`ivlx completion`: a script for bash or zsh that completes commands, options, their values, and files.

The script holds all words itself, so that the shell starts no Python at a press of Tab.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_internvlx.commands import registry
from megatron_internvlx.commands.help import CommandParser, flags, value_name
from megatron_internvlx.exit_codes import DONE

# Values that are directories; those of other options with a value are files or words of the user's own.
DIRECTORIES = ("DIR", "CKPT")


def parser() -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    it = CommandParser(
        "completion",
        "Print a script that completes commands, options and files in a shell.",
        examples=(
            "source <(ivlx completion bash)                       # this shell; a line of ~/.bashrc for all",
            "source <(ivlx completion zsh)                        # the same in ~/.zshrc, after compinit",
        ),
    )
    it.add_argument("shell", choices=("bash", "zsh"), help="bash or zsh")
    return it


@dataclass(frozen=True)
class Words:
    """Words that may follow a command."""

    options: tuple[str, ...]
    choices: dict[str, tuple[str, ...]]
    """Option -> its values; "" for those of the first argument."""
    folders: tuple[str, ...]
    """Options whose value is a directory."""


def words_of(command: registry.Command) -> Words:
    """Options of a command, their values, and which of them are directories."""
    it = command.parser()
    choices: dict[str, tuple[str, ...]] = {}
    folders: list[str] = []
    for action in it._actions:
        name = action.option_strings[-1] if action.option_strings else ""
        if action.nargs == 0:
            continue
        value = value_name(action)
        if action.choices is not None:
            choices[name] = tuple(map(str, action.choices))
        elif (
            "|" in value and value.replace("|", "").replace("_", "").isalnum()
        ):  # of pretrain_vlm.py's arguments
            choices[name] = tuple(value.split("|"))
        elif name and value in DIRECTORIES:
            folders.append(name)
    return Words(tuple(flags(it)), choices, tuple(folders))


@dataclass(frozen=True)
class Shell:
    """Notation of a shell for what completes a command."""

    words: str
    """A list of words, which replace `{}`."""
    folder: str
    """Kind of a value that is a directory."""
    first: str
    """Condition under which the first argument is being written."""


def _cases(shell: Shell) -> str:
    """Branches of the script, one for each command: its options, and the values after one of them."""
    cases = []
    for command in registry.COMMANDS:
        words = words_of(command)
        cases += [
            f"    {command.name})",
            f"      options={shell.words.format(' '.join(words.options))}",
            '      case "$before" in',
        ]
        for option, values in words.choices.items():
            if option:
                cases.append(f"        {option}) values={shell.words.format(' '.join(values))} ;;")
        if words.folders:
            cases.append(f"        {'|'.join(words.folders)}) kind={shell.folder} ;;")
        cases.append("      esac")
        if first := words.choices.get(""):
            cases.append(f"      [[ {shell.first} ]] && values={shell.words.format(' '.join(first))}")
        cases.append("      ;;")
    return "\n".join(cases)


def bash_script() -> str:
    """Script for bash 4 and later."""
    names = " ".join([*(one.name for one in registry.COMMANDS), "help"])
    shell = Shell(words="'{}'", folder="-d", first="$COMP_CWORD == 2 && $current != -*")
    return BASH.replace("@NAMES@", names).replace("@CASES@", _cases(shell))


def zsh_script() -> str:
    """Script for zsh, with the line of the list beside each command."""
    described = [f"{one.name}:{one.summary}".replace("'", "'\\''") for one in registry.COMMANDS]
    names = "\n".join(f"    '{text}'" for text in described)
    shell = Shell(words="({})", folder="/", first="$CURRENT == 3 && $words[CURRENT] != -*")
    return ZSH.replace("@NAMES@", names).replace("@CASES@", _cases(shell))


BASH = """\
# Completion of ivlx for bash, from `ivlx completion bash`.
_ivlx() {
  local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
  local options='' values='' kind=-f
  COMPREPLY=()
  if [ "$COMP_CWORD" = 1 ]; then
    mapfile -t COMPREPLY < <(compgen -W '@NAMES@ --help --version' -- "$current")
    return
  fi
  case "${COMP_WORDS[1]}" in
    help) [ "$COMP_CWORD" = 2 ] && values='@NAMES@' ;;
@CASES@
  esac
  if [ -n "$values" ]; then
    mapfile -t COMPREPLY < <(compgen -W "$values" -- "$current")
  elif [[ $current == -* ]]; then
    mapfile -t COMPREPLY < <(compgen -W "$options" -- "$current")
  else
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen "$kind" -- "$current")
  fi
}
complete -F _ivlx ivlx
"""
ZSH = """\
#compdef ivlx
# Completion of ivlx for zsh, from `ivlx completion zsh`.
_ivlx() {
  local before=$words[CURRENT-1] kind=''
  local -a options values commands
  commands=(
@NAMES@
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  case "$words[2]" in
    help) (( CURRENT == 3 )) && values=(${commands%%:*}) ;;
@CASES@
  esac
  if (( $#values )); then
    compadd -- $values
  elif [[ $words[CURRENT] == -* ]]; then
    compadd -- $options
  elif [[ $kind == / ]]; then
    _files -/
  else
    _files
  fi
}
compdef _ivlx ivlx
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script; returns the exit code."""
    options = parser().parse_args(argv)
    print(bash_script() if options.shell == "bash" else zsh_script(), end="")
    return DONE
