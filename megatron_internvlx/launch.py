"""Wrapper of torchrun that passes on the ranks' exit code and omits torchrun's traceback for known errors.

    python -m megatron_internvlx.launch --nproc-per-node 2 pretrain_vlm.py ...

It takes torchrun's arguments. torchrun itself always exits with 1 on failure; this program exits with the ranks'
code, with 130 after Ctrl-C and with 143 after SIGTERM if the ranks ended normally. All other failures are reported
by torchrun.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence

from megatron_internvlx.exit_codes import EXPLAINED, INTERRUPTED


class _Filter(logging.Filter):
    """Log filter that drops torchrun's messages about ranks that ended normally."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if re.match(r"Sending process \d+ closing signal|Received \d+ death signal", text):
            return False
        code = re.match(r"failed \(exitcode: (\d+)\)", text)
        return code is None or int(code[1]) not in EXPLAINED


def _exit_code_after_signal(number: int, codes: Mapping[int, int | None]) -> int:
    """Exit code after torchrun received signal `number`; prints one line if a local rank did not end from it.

    Args:
        number: of the signal.
        codes: exit code of each local rank; None if it is still running.
    """
    as_they_should = (0, INTERRUPTED, 128 + number, -number)
    wrong = {rank: code for rank, code in codes.items() if code not in as_they_should}
    if not wrong:
        return 128 + number
    failed = ", ".join(f"rank {rank} {_describe_exit(code)}" for rank, code in sorted(wrong.items()))
    print(
        f"launch: after {signal.Signals(number).name}, of this node's ranks: {failed}",
        file=sys.stderr,
        flush=True,
    )
    ends = list(wrong.values())
    code = next((code for code in EXPLAINED if code in ends), ends[0])
    # A rank that is still running has no exit code: report it as killed.
    return 128 + signal.SIGKILL if code is None else code if code > 0 else 128 - code


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "is still running"
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
    )  # until torchrun installs its handler: an interrupted import needs no traceback
    print("launch: starting torchrun", file=sys.stderr, flush=True)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if os.environ.get("INTERNVLX_VERBOSE") != "1":
        for name in ("multiprocessing.api", "agent.server.api"):
            logging.getLogger(f"torch.distributed.elastic.{name}").addFilter(_Filter())
    from megatron_internvlx.platform import torchrun

    codes = torchrun.record_exit_codes()
    try:
        run.main(words)
    except SignalException as stop:
        return _exit_code_after_signal(int(stop.sigval), codes)
    except ChildFailedError as failed:
        ends = {failure.exitcode for failure in failed.failures.values()}
        for code in EXPLAINED:
            if code in ends:
                return code
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
