"""File of metrics that a server has not received yet; it survives a kill."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_internvlx.files import write_atomically


@dataclass(frozen=True)
class Value:
    """One metric at one step."""

    key: str
    value: float
    time: int
    """Milliseconds since the epoch."""
    step: int


class Spool:
    """File of undelivered values, one JSON object per line.

    Args:
        path: path of the file.
        most: number of lines after which the file is rewritten without delivered and dropped values.
    """

    def __init__(self, path: Path, most: int) -> None:
        self.path, self.most = path, most
        self.written = 0
        """Number of undelivered values, counted from the oldest, that are in the file."""
        self.error: OSError | None = None
        """Error of the last write; None if it succeeded."""
        self._lines = 0

    def read(self) -> list[Value]:
        """Read the values that the previous start could not deliver; prints the number of unreadable lines."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            print(f"mlflow: the metrics in {self.path} are not sent: {error}", file=sys.stderr, flush=True)
            return []
        values = [value for line in lines if (value := _parsed(line)) is not None]
        if torn := len(lines) - len(values):
            print(
                f"mlflow: {torn} of {len(lines)} lines in {self.path} cannot be read: these metrics are lost",
                file=sys.stderr,
                flush=True,
            )
            if values:
                self._replace(values)  # a line without its end would spoil the next
            else:
                self.path.unlink(missing_ok=True)
        self.written, self._lines = len(values), len(values)
        return values

    def add(self, values: list[Value]) -> None:
        """Append the undelivered values that are not in the file yet."""
        new = values[self.written :]
        if not new:
            return
        if self._lines + len(new) > self.most:
            self._replace(values)  # its oldest lines are delivered, or too many
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.writelines(_line(value) for value in new)
        except OSError as error:
            self._report_once(error)
        else:
            self.written, self.error = len(values), None
            self._lines += len(new)

    def clear(self) -> None:
        """Remove the file, after everything was delivered."""
        if self._lines:
            self.path.unlink(missing_ok=True)
        self.written = self._lines = 0

    def _replace(self, values: list[Value]) -> None:
        try:
            write_atomically(self.path, "".join(_line(value) for value in values))
        except OSError as error:
            self._report_once(error)
        else:
            self.written, self._lines, self.error = len(values), len(values), None

    def _report_once(self, error: OSError) -> None:
        if self.error is None:
            print(f"mlflow: metrics are kept in memory only: {error}", file=sys.stderr, flush=True)
        self.error = error


def _line(value: Value) -> str:
    return json.dumps(vars(value)) + "\n"


def _parsed(line: bytes) -> Value | None:
    try:
        found = json.loads(line)
        return Value(str(found["key"]), float(found["value"]), int(found["time"]), int(found["step"]))
    except (ValueError, TypeError, KeyError):
        return None
