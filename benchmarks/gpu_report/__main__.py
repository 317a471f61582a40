"""What one GPU makes of the trainer: tests, step times, kernels, memory, losses, images. At most 8 minutes.

    python -m benchmarks.gpu_report                    # writes benchmarks/results/gpu_report-DATE.{md,json,png}
    python -m benchmarks.gpu_report --list             # the rows, in the order of their priority
    python -m benchmarks.gpu_report --minutes 4        # the most important rows that fit
    python -m benchmarks.gpu_report --only '2b-*' images
    python -m benchmarks.gpu_report --add-to FILE.json # only what that report lacks or where it failed
    python -m benchmarks.gpu_report --draw FILE.json   # table and picture anew, without a GPU

Needs torch, Transformer Engine and Megatron; DALI for images, matplotlib for the picture. First come the tests of
tests/gpu and the loss curves, beside each other, then the timed rows one at a time; a row's process imports while the
one before builds its model. Time that fast or failed rows leave goes to rows that were left out. Files are written
anew at every result, so that a killed run leaves what it had. A row that fails says why and stops no other. Without
CUDA nothing is written.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.common import RESULTS
from benchmarks.gpu_report import processes, rows
from benchmarks.gpu_report.results import Report

MINUTES = 8.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--minutes", type=float, default=MINUTES, help="at most so long; the least important rows go"
    )
    made.add_argument("--only", nargs="+", metavar="NAME", help="rows by name or shell pattern")
    made.add_argument("--list", action="store_true", help="print the rows and their estimated seconds")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the files")
    made.add_argument("--commit", help="name of the commit, where there is no git")
    made.add_argument(
        "--add-to", type=Path, metavar="FILE", help="JSON of a report whose missing rows are measured"
    )
    made.add_argument("--draw", type=Path, metavar="FILE", help="JSON of a report to draw; measures nothing")
    made.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # on CPU, to try the code
    return made


def main(argv: list[str] | None = None) -> int:
    """Measure and write; returns 0, also when rows have failed."""
    asked = parser()
    chosen = asked.parse_args(argv)
    started = time.monotonic()
    try:
        table = rows.pick(rows.all_rows(), chosen.only or ["*"])
        if chosen.draw:
            return _finish(Report.read(chosen.draw))
        report = _report(chosen, argv)
    except (ValueError, OSError, KeyError) as error:
        asked.error(str(error))
    table = [row for row in table if not report.finished(row.name)]
    if chosen.list:
        for row in sorted(table, key=lambda row: row.priority):
            print(f"{row.priority}  {row.seconds:4.0f} s  {row.name}")
        print(f"all of them: {rows.estimate(table) / 60:.1f} minutes")
        return 0
    if chosen.tiny:
        table = [rows.tiny(row) for row in table if row.kind != "tests"]
    elif not torch.cuda.is_available():
        print("gpu_report: no CUDA device here; nothing measured, nothing written")
        return 0
    kept, left_out = rows.trim(table, chosen.minutes * 60)
    signal.signal(signal.SIGTERM, _stop)
    for row in kept:
        report.results.pop(row.name, None)  # a failed try of a report that is added to
    for row in left_out:
        report.add(row.name, {"error": f"left out: does not fit into {chosen.minutes:g} minutes"})
    print(f"{len(kept)} rows, about {rows.estimate(kept):.0f} s", flush=True)

    waiting = {row.name for row in left_out}

    def flush(name: str, part: dict[str, Any]) -> None:
        if name in waiting:  # others took less than expected, so it is measured after all
            waiting.remove(name)
            report.results.pop(name, None)
        report.add(name, part)
        said = {key: value for key, value in part.items() if key not in ("profile", "losses", "log")}
        print(f"[{time.monotonic() - started:5.0f} s] {name}: {said}", flush=True)
        if "log" in part:
            print(part["log"], flush=True)

    try:
        processes.run(kept, started + chosen.minutes * 60 - processes.LAST, flush, left_out)
    finally:
        _finish(report)
    return 0


def _report(chosen: argparse.Namespace, argv: list[str] | None) -> Report:
    """A new report, or the one that is added to."""
    words = sys.argv[1:] if argv is None else argv
    command = " ".join(["python -m benchmarks.gpu_report", *words])
    if not chosen.add_to:
        return Report(chosen.out, command, version=chosen.commit)
    report = Report.read(chosen.add_to)
    report.head["command"] += f"; {command}"
    return report


def _finish(report: Report) -> int:
    """The picture, then the table that shows it."""
    print(report.draw())
    print(f"table: {report.write()}")
    return 0


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)  # through every `finally`: workers end, what was measured stays


if __name__ == "__main__":
    sys.exit(main())
