"""`ivlx doctor`: what is installed on this machine, what is slow or missing, and the remedy."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_internvlx.commands.help import CommandParser
from megatron_internvlx.exit_codes import DONE, FAILED, MISTAKE


def parser() -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    it = CommandParser(
        "doctor",
        "Show what is installed on this machine, what is slow or missing, and the remedy.",
        about="Each line is ok, slow or missing. Slow is a warning: training works, but not as fast as it could. It "
        "takes some seconds, since PyTorch and DALI are tried.",
        examples=("ivlx doctor", "ivlx doctor --json > doctor.json"),
        exits={DONE: "nothing is missing", FAILED: "something is", MISTAKE: "wrong arguments"},
    )
    it.add_argument(
        "--scratch", type=Path, metavar="DIR", default=Path("/tmp"), help="directory of temporary files"
    )
    it.add_argument("--json", action="store_true", help="print a list of objects instead of lines")
    return it


def main(argv: Sequence[str] | None = None) -> int:
    """Examine this machine; returns the exit code."""
    options = parser().parse_args(argv)
    if not options.json:
        print("ivlx doctor: trying PyTorch and DALI ...", file=sys.stderr, flush=True)
    from megatron_internvlx.commands.machine_checks import machine_checks

    found = []
    for check in machine_checks(options.scratch):
        found.append(check)
        if not options.json:
            print(f"{check.status:8} {check.name:20} {check.detail}", flush=True)
            if check.remedy:
                print(f"{'':8} {'':20} -> {check.remedy}", flush=True)
    missing = sum(check.status == "missing" for check in found)
    if options.json:
        print(json.dumps([asdict(check) for check in found], indent=1))
    else:
        slow = sum(check.status == "slow" for check in found)
        print(f"{len(found) - missing - slow} ok, {slow} slow, {missing} missing")
    return FAILED if missing else DONE
