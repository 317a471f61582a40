"""Message about a caller's mistake, printed once, in whatever order the ranks end.

All ranks see most mistakes, and the first rank that exits makes torchrun kill the others, so no particular rank can
be trusted to print. The first rank that gets here prints, and the others on its node exit only after it has.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import sys
from pathlib import Path

from megatron_internvlx.exit_codes import MISTAKE
from megatron_internvlx.ranks import launched_nodes


def complain(error: ValueError) -> int:
    """Print a caller's mistake once per node and start; returns the error's `exit_code`, or 2."""
    where = f" on {socket.gethostname()}" if launched_nodes() > 1 else ""
    _print_once(f"pretrain_vlm.py{where}: {error}")
    return int(getattr(error, "exit_code", MISTAKE))


def mistake_was_reported() -> bool:
    """Whether a rank on this node has printed a mistake in this start."""
    notes = _shared_file()
    return notes is not None and notes.exists()


def _shared_file() -> Path | None:
    """File shared by the ranks of this node in this start only; None without torchrun."""
    # torchrun makes a directory per start, with one for each rank in it.
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(own).parent.parent / "reported" if own and own != os.devnull else None


def _print_once(text: str) -> None:
    notes = _shared_file()
    try:
        if notes is None:
            raise FileNotFoundError
        stderr = os.fstat(2)  # ranks whose stderr is a file of their own each print it there
        mark = hashlib.sha256(f"{stderr.st_dev} {stderr.st_ino} {text}".encode()).hexdigest()
        with notes.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed; the others wait for that
            file.seek(0)
            if mark in file.read().split():
                return
            print(text, file=sys.stderr, flush=True)
            file.write(f"{mark}\n")
    except OSError:  # printing twice is better than not at all
        print(text, file=sys.stderr, flush=True)
