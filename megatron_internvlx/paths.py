"""Check that the paths on the command line exist, before the slow import of Megatron.

Rejects only what the complete parser would reject too; paths that it misses are checked later.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_internvlx.ranks import local_rank

WEIGHT_FLAGS = ("--load", "--pretrained-checkpoint")
PATH_FLAGS = ("--recipe", "--data", "--valid-data", "--tokenizer-model", *WEIGHT_FLAGS)


def is_url(path: str) -> bool:
    """Whether `path` is the URL of a storage client (`msc://profile/folder`) and not a file."""
    return "://" in path


def check_command_line(words: Sequence[str]) -> None:
    """Check the paths on the first rank of each node. Raises ValueError with flag and path if one is missing."""
    if local_rank():
        return
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--save")
    peek.add_argument("--dry-run", action="store_true")
    for flag in PATH_FLAGS:
        peek.add_argument(flag)
    try:
        named = vars(peek.parse_known_args(list(words))[0])
    except argparse.ArgumentError:
        return  # a flag without its value, for instance
    for flag in ("--recipe",) if named["dry_run"] else PATH_FLAGS:
        check_path(flag, named[flag[2:].replace("-", "_")], named["save"])


def check_path(flag: str, path: str | None, save: str | None) -> None:
    """Check that the path of one flag exists. Raises ValueError if not. `save`: the run's own directory."""
    if not path or is_url(path):
        return
    if flag in WEIGHT_FLAGS and path == save:
        return  # it may not exist before the first checkpoint
    if flag in (*WEIGHT_FLAGS, "--tokenizer-model"):
        if not Path(path).is_dir():
            raise ValueError(f"{flag} {path}: no such directory")
    elif not Path(path).exists():
        raise ValueError(f"{flag} {path}: no such file or directory")
