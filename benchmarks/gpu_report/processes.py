"""Processes of rows: started early, measured one at a time or beside each other, ended with all they started."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.common import ROOT
from benchmarks.gpu_report.rows import Row
from benchmarks.gpu_report.worker import READY, RESULT

# A row may take so many times its estimate, and at least so many seconds, before it is ended.
PATIENCE, LEAST = 1.6, 45.0
# What imports may take, beside those of others.
IMPORTS = 60.0
LATE = 20.0  # seconds of imports that ran beside no other row
POLL = 0.5  # seconds between two looks whether a silent process still lives
LAST = 8.0  # seconds for the picture and the last table
EXIT = 10.0  # seconds for a process to leave after its last result
LOG_TAIL = 3000  # characters of a failed row's output that are kept
TEST_LINES = 400  # characters of a failed test's message that are kept
COMPILE_THREADS = "4"

Flush = Callable[[str, dict[str, Any]], None]
"""Takes a row's name and the part of its result that has just come."""


class Process:
    """A row's worker, or pytest for a file of tests; it imports as soon as it is made."""

    def __init__(self, row: Row, folder: Path) -> None:
        self.row = row
        self.begun = time.monotonic()  # when it was told to measure
        self.log = folder / f"{row.name}.log"
        self.report = folder / f"{row.name}.xml"
        self.lines: queue.Queue[tuple[float, str | None]] = queue.Queue()  # moment, line; None at the end
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self._command(),
                cwd=ROOT,
                env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": COMPILE_THREADS} | row.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                errors="replace",
                start_new_session=True,  # a group of its own, which `close` ends as a whole
            )
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _command(self) -> list[str]:
        row = self.row
        if row.kind == "tests":
            files = [str(row.settings["file"]), "--junitxml", str(self.report)]
            options = [
                "-v",
                "-m",
                "gpu",
                "-p",
                "no:cacheprovider",
                "-rs",
            ]  # a line per test, for an ended one's log
            return [sys.executable, "-u", "-m", "pytest", *options, *files]
        settings = {"kind": row.kind, "argv": list(row.argv), "packs": row.packs, **row.settings}
        return [sys.executable, "-m", "benchmarks.gpu_report.worker", json.dumps(settings)]

    def _read(self, stream: IO[str]) -> None:
        """In a thread: results to the queue, everything else to the log."""
        with self.log.open("a") as log:
            for line in stream:
                if line.startswith((READY, RESULT)):
                    self.lines.put((time.monotonic(), line))
                else:
                    log.write(line)
                    log.flush()
        self.lines.put((time.monotonic(), None))

    def go(self) -> None:
        """Let it measure, as soon as its imports are done."""
        self.begun = time.monotonic()
        with contextlib.suppress(OSError):  # it has ended already; `collect` says how
            assert self.process.stdin is not None
            self.process.stdin.write("go\n")
            self.process.stdin.close()

    def collect(self, end: float, flush: Flush) -> None:
        """Hand on every result until the process ends; at `end` (monotonic seconds) or after its patience it is ended.

        A row that fails, dies or is ended has an `error` and the tail of its output in its result.
        """
        error, named, begun = None, False, self.begun
        patience = max(PATIENCE * self.row.seconds, LEAST)
        limit = begun + IMPORTS + patience
        while True:
            now = time.monotonic()
            try:
                moment, line = self.lines.get(timeout=max(min(end, limit, now + POLL) - now, 0.01))
            except queue.Empty:
                moment = time.monotonic()
                if self.process.poll() is not None:  # a child of it may hold its output open for longer
                    break
                if moment < min(end, limit):
                    continue
                reason = (
                    "the report's time is over" if limit > end else f"{self.row.seconds:.0f} were expected"
                )
                error = f"ended after {moment - begun:.0f} s: {reason}"
                break
            if line is None:
                break
            if line.startswith(READY):
                begun = max(begun, moment)
                limit = begun + patience
                continue
            part = json.loads(line.removeprefix(RESULT))
            named = named or "error" in part
            flush(self.row.name, part)
        code = self.close() if error else self._ended()
        if self.row.kind == "tests":
            flush(self.row.name, self._tests())
        elif error is None and code and not named:
            error = f"its process ended with code {code}"
        last: dict[str, Any] = {"took": round(moment - begun, 1)}
        if error:
            last["error"] = error
        if code or error:
            last["log"] = self.log.read_text(errors="replace")[-LOG_TAIL:]
        flush(self.row.name, last)
        self.close()

    def _ended(self) -> int:
        """Exit code of a process that has closed its output; one that does not end is ended."""
        try:
            return self.process.wait(EXIT)
        except subprocess.TimeoutExpired:
            self.close()
            return 0

    def _tests(self) -> dict[str, Any]:
        """Counts and failures of a file of tests, from pytest's own report."""
        try:
            cases = list(xml.parse(self.report).getroot().iter("testcase"))
        except (OSError, xml.ParseError):
            return {"error": "pytest wrote no report"}
        failed = {}
        skipped = 0
        for case in cases:
            bad = next((child for child in case if child.tag in ("failure", "error")), None)
            skipped += any(child.tag == "skipped" for child in case)
            if bad is not None:
                failed[case.get("name", "?")] = (bad.get("message") or "")[:TEST_LINES]
        return {"tests": len(cases), "skipped": skipped, "failed": failed}

    def close(self) -> int:
        """End the process and what it has started; safe to repeat. Returns its exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def run(rows: Sequence[Row], end: float, flush: Flush, spare: Sequence[Row] = ()) -> None:
    """Measure `rows` until `end` (monotonic seconds): untimed ones beside each other, then one at a time by priority.

    The next row's process starts when the one before begins, so that its imports run beside that one's model
    building. A row whose estimate no longer fits is left out and says so. Time that is left in the end goes to the
    timed rows of `spare`, by priority too; those that do not fit say nothing.
    """
    beside = [row for row in rows if row.beside]
    extra = {row.name for row in spare}
    alone = sorted(
        (row for row in (*rows, *spare) if not row.beside), key=lambda row: (row.name in extra, row.priority)
    )
    ahead: dict[str, Process] = {}
    running: list[Process] = []
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as name:
        folder = Path(name)
        try:
            for row in beside:
                running.append(Process(row, folder))
                running[-1].go()
            if alone:
                ahead[alone[0].name] = Process(alone[0], folder)
            for process in running:
                process.collect(end, flush)
            running.clear()
            for number, row in enumerate(alone):
                left = end - time.monotonic()
                needed = row.seconds + (0 if row.name in ahead else LATE)
                if left < needed:
                    if row.name not in extra:
                        text = f"left out: {left:.0f} s were left, and it takes about {needed:.0f}"
                        flush(row.name, {"error": text})
                    if row.name in ahead:
                        ahead.pop(row.name).close()
                    continue
                current = ahead.pop(row.name, None) or Process(row, folder)
                running.append(current)
                current.go()
                following = next((r for r in alone[number + 1 :] if r.seconds <= left - row.seconds), None)
                if following is not None and following.name not in ahead:
                    ahead[following.name] = Process(following, folder)
                current.collect(end, flush)
                running.clear()
        finally:
            for process in [*running, *ahead.values()]:
                process.close()
