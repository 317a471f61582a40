"""torchrun, with its arguments, that ends without a traceback of its own when the ranks have said why.

    python -m megatron_internvlx.launch --nproc-per-node 2 pretrain_vlm.py ...

Its exit code is the ranks' where torchrun's is always 1, and 130 after Ctrl-C, 143 after SIGTERM, if the ranks ended
as they should. What it does not know about an end, it leaves to torchrun to tell.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence

from megatron_internvlx.lifecycle.complaint import MISTAKE
from megatron_internvlx.lifecycle.interrupt import INTERRUPTED
from megatron_internvlx.lifecycle.lock import IN_USE
from megatron_internvlx.lifecycle.resume import SAVE_FAILED, STOP

SAID = (IN_USE, STOP, SAVE_FAILED, MISTAKE, INTERRUPTED)
"""Exit codes of ranks that have named their reason."""


class _Filter(logging.Filter):
    """Drops what torchrun says of ranks that end as they should."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if re.match(r"Sending process \d+ closing signal|Received \d+ death signal", text):
            return False
        code = re.match(r"failed \(exitcode: (\d+)\)", text)
        return code is None or int(code[1]) not in SAID


def _ended_by(number: int, codes: Mapping[int, int | None]) -> int:
    """The exit code after a signal to torchrun; `codes` are the local ranks'. One line if any has not ended of it."""
    as_they_should = (0, INTERRUPTED, 128 + number, -number)
    wrong = {rank: code for rank, code in codes.items() if code not in as_they_should}
    if not wrong:
        return 128 + number
    said = ", ".join(f"rank {rank} {_end(code)}" for rank, code in sorted(wrong.items()))
    print(
        f"launch: after {signal.Signals(number).name}, of this node's ranks: {said}",
        file=sys.stderr,
        flush=True,
    )
    ends = list(wrong.values())
    code = next((code for code in SAID if code in ends), ends[0])
    # A rank that nothing ends will not be seen to end: as if killed.
    return 128 + signal.SIGKILL if code is None else code if code > 0 else 128 - code


def _end(code: int | None) -> str:
    if code is None:
        return "still lives"
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has a number only
        return f"was ended by signal {-code}"


def main(words: Sequence[str] | None = None) -> int:
    """Run torchrun with these arguments (the command line's); returns the exit code."""
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # until torchrun takes it: importing it is nothing to be told about
    print("launch: starting torchrun", file=sys.stderr, flush=True)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if os.environ.get("INTERNVLX_VERBOSE") != "1":
        for name in ("multiprocessing.api", "agent.server.api"):
            logging.getLogger(f"torch.distributed.elastic.{name}").addFilter(_Filter())
    from megatron_internvlx.platform import torchrun

    codes = torchrun.keep_exit_codes()
    try:
        run.main(words)
    except SignalException as stop:
        return _ended_by(int(stop.sigval), codes)
    except ChildFailedError as failed:
        ends = {failure.exitcode for failure in failed.failures.values()}
        for code in SAID:
            if code in ends:
                return code
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
