"""torchrun, with its arguments, that ends without a traceback of its own when the ranks have said why.

    python -m megatron_internvlx.launch --nproc-per-node 2 pretrain_vlm.py ...

Its exit code is the ranks' where torchrun's is always 1, and 130 after Ctrl-C. What it does not know about an end, it
leaves to torchrun to tell.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Sequence

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
    try:
        run.main(words)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except ChildFailedError as failed:
        codes = {failure.exitcode for failure in failed.failures.values()}
        for code in SAID:
            if code in codes:
                return code
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
