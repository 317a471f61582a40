"""A caller's mistake, said once, in whatever order the ranks end.

All ranks see most mistakes, and the first one that ends makes torchrun end the others: no rank can be relied on to
live until it has spoken. So whoever is first speaks, and the others of its node leave only when it has.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import sys
from pathlib import Path

from megatron_internvlx.ranks import launched_nodes

MISTAKE = 2


def complain(error: ValueError) -> int:
    """Print a caller's mistake, once per node and start; returns the exit code: the error's, or 2."""
    where = f" on {socket.gethostname()}" if launched_nodes() > 1 else ""
    _say_once(f"pretrain_vlm.py{where}: {error}")
    return int(getattr(error, "exit_code", MISTAKE))


def said() -> bool:
    """Whether a rank on this node has named a mistake in this start."""
    notes = _notes()
    return notes is not None and notes.exists()


def _notes() -> Path | None:
    """A file that the ranks of this node and this start share, and no others; None without torchrun."""
    # torchrun makes a directory per start, with one for each rank in it.
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(own).parent.parent / "said" if own and own != os.devnull else None


def _say_once(text: str) -> None:
    notes = _notes()
    try:
        if notes is None:
            raise FileNotFoundError
        stderr = os.fstat(2)  # ranks that write to files of their own each say it there
        mark = hashlib.sha256(f"{stderr.st_dev} {stderr.st_ino} {text}".encode()).hexdigest()
        with notes.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed: the others wait, and then know
            file.seek(0)
            if mark in file.read().split():
                return
            print(text, file=sys.stderr, flush=True)
            file.write(f"{mark}\n")
    except OSError:  # better twice than never
        print(text, file=sys.stderr, flush=True)
