"""Whether the paths of a command line are there, before Megatron is imported to read all of it.

Only refuses what reading all of it would refuse too; what it does not see is found later.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_internvlx.ranks import local_rank

WEIGHTS = ("--load", "--pretrained-checkpoint")
PATHS = ("--recipe", "--data", "--valid-data", "--tokenizer-model", *WEIGHTS)


def check_command_line(words: Sequence[str]) -> None:
    """Raises ValueError, naming flag and path, if one is not there. The first rank of each node looks."""
    if local_rank():
        return
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--save")
    peek.add_argument("--dry-run", action="store_true")
    for flag in PATHS:
        peek.add_argument(flag)
    try:
        named = vars(peek.parse_known_args(list(words))[0])
    except argparse.ArgumentError:
        return  # a flag without its value, for instance
    for flag in ("--recipe",) if named["dry_run"] else PATHS:
        check_path(flag, named[flag[2:].replace("-", "_")], named["save"])


def check_path(flag: str, path: str | None, save: str | None) -> None:
    """Raises ValueError if what a flag names is not there. `save`: the run's own directory."""
    if not path or "://" in path:  # of a storage client
        return
    if flag in WEIGHTS and path == save:
        return  # may be named before its first checkpoint is there
    if flag in (*WEIGHTS, "--tokenizer-model"):
        if not Path(path).is_dir():
            raise ValueError(f"{flag} {path}: no such directory")
    elif not Path(path).exists():
        raise ValueError(f"{flag} {path}: no such file or directory")
