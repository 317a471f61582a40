"""Detection of a hung step: which rank keeps the others waiting, and the end of this process.

In a hang all ranks wait, and the first one that times out, which torchrun reports, is usually healthy. So each rank
writes a heartbeat to a file beside the checkpoints. A rank that is stopped, or whose node is gone, writes none; for
the others it says at which step they are, and whether they wait for data.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "heartbeats"
_LONGEST_INTERVAL = 30.0  # seconds between two heartbeats; many ranks share a file system
_SIZE = 512  # bytes of a file, written at once: a reader never sees half of it
_GRACE = 60.0  # seconds for naming ranks, before the process ends without it
_NAMED = 16  # silent ranks with a line of their own


@dataclass(frozen=True, order=True)
class Position:
    """Position of a rank in its training loop."""

    step: int
    passes: int
    """Forward passes begun since its start."""
    doing: str
    """Description of its current work."""

    def __str__(self) -> str:
        return f"step {self.step}, forward pass {self.passes}, {self.doing}"


@dataclass(frozen=True)
class Beat:
    """A rank's heartbeat."""

    rank: int
    host: str
    pid: int
    time: float
    """Seconds since the epoch."""
    position: Position

    @property
    def name(self) -> str:
        """The rank, its host and its process."""
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


class StallClock:
    """Ends this process when a step takes too long, after printing which ranks are silent or behind.

    Args:
        seconds: longest time between two calls of `restart`. 0: the clock is off.
        folder: directory of the heartbeats, visible to all ranks. None: nothing is known about other ranks.
        rank: number of this rank.
        world: number of ranks.
        position: returns the position of this rank; called from another thread.
        report: called with the reason on the lowest living rank, before it ends.
    """

    def __init__(
        self,
        seconds: float,
        folder: Path | None,
        rank: int,
        world: int,
        position: Callable[[], Position],
        report: Callable[[str], None],
    ) -> None:
        self.seconds, self.folder, self.rank, self.world = seconds, folder, rank, world
        self.position, self.report = position, report
        self.interval = min(seconds / 10, _LONGEST_INTERVAL)
        self._deadline = 0.0
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._warned = False

    def restart(self) -> None:
        """Start timing the next step."""
        if self.seconds <= 0:
            return
        self._deadline = time.monotonic() + self.seconds
        # If Python itself hangs, the thread below does not run; this needs no interpreter.
        faulthandler.dump_traceback_later(self.seconds + _GRACE, exit=True, file=2)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="stall clock", daemon=True)
            self._thread.start()

    def release(self) -> None:
        """Stop the clock, when training is over."""
        faulthandler.cancel_dump_traceback_later()
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        if self.folder is not None:
            heartbeat_file(self.folder, self.rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        while True:
            self.beat()
            left = self._deadline - time.monotonic()
            if left <= 0:
                self._end()
            if self._over.wait(min(self.interval, max(left, 0.01))):
                return

    def beat(self) -> None:
        """Write this rank's heartbeat."""
        if self.folder is None:
            return
        beat = Beat(self.rank, socket.gethostname(), os.getpid(), time.time(), self.position())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Written in place and closed: other clients of a shared file system then see it when they open it.
            file = os.open(heartbeat_file(self.folder, self.rank), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(file, json.dumps(asdict(beat)).ljust(_SIZE).encode(), 0)
            finally:
                os.close(file)
        except OSError as error:
            if not self._warned:
                print(
                    f"no heartbeat can be written to {self.folder}: {error}", file=sys.__stderr__, flush=True
                )
            self._warned = True

    def _end(self) -> None:
        """Print the ranks at fault and this rank's stacks, and exit."""
        try:
            reason, lines = self.findings()
            if lines:
                print("\n".join(lines), file=sys.__stderr__, flush=True)
                self.report(reason)
        finally:
            print(
                f"rank {self.rank} waited {self.seconds:.0f} s for a step:", file=sys.__stderr__, flush=True
            )
            faulthandler.dump_traceback(file=2)
            os._exit(1)

    def findings(self) -> tuple[str, list[str]]:
        """Reason and lines with the positions of all ranks; no lines if a lower rank is alive and prints them."""
        reason = f"no step has ended for {self.seconds / 60:.3g} minutes"
        if self.folder is None:
            return reason, [f"{reason}; without --save nothing is known about the other ranks"]
        now = time.time()
        beats: dict[int, Beat | None] = {}
        for rank in range(self.world):
            beats[rank] = read_heartbeat(self.folder, rank)
            if rank < self.rank and not self._silent(beats[rank], now):
                return reason, []
        silent = [rank for rank, beat in beats.items() if rank != self.rank and self._silent(beat, now)]
        living = [beat for rank, beat in beats.items() if beat and rank not in silent]
        lines = [f"{reason}; where the ranks are:"]
        for rank in silent[:_NAMED]:
            lines.append(f"  {_describe_silence(rank, beats[rank], now)}")
        if len(silent) > _NAMED:
            lines.append(f"  as silent: ranks {_format_ranks(silent[_NAMED:])}")
        lines += [f"  {line}" for line in _describe_positions(living)]
        return f"{reason}; {_blame(silent, living, beats, now)}", lines

    def _silent(self, beat: Beat | None, now: float) -> bool:
        # All ranks began to wait about `seconds` ago; half of that allows for differing clocks and slow file systems.
        return beat is None or now - beat.time > self.seconds / 2


def heartbeat_file(folder: Path, rank: int) -> Path:
    """File of a rank's heartbeat."""
    return folder / f"rank{rank:05d}.json"


def read_heartbeat(folder: Path, rank: int) -> Beat | None:
    """Read a rank's last heartbeat; None if it is missing or unreadable."""
    try:
        found = json.loads(heartbeat_file(folder, rank).read_text())
        return Beat(**(found | {"position": Position(**found["position"])}))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _blame(silent: list[int], living: list[Beat], beats: dict[int, Beat | None], now: float) -> str:
    if silent:
        more = f", and {len(silent) - 1} more are silent" if silent[1:] else ""
        return _describe_silence(silent[0], beats[silent[0]], now) + more
    last = min((beat.position for beat in living), key=lambda position: (position.step, position.passes))
    behind = [b for b in living if (b.position.step, b.position.passes) == (last.step, last.passes)]
    if not behind or 2 * len(behind) > len(living):
        return "all ranks live, and few or none are behind"
    return f"all ranks live; furthest behind is {behind[0].name}: {behind[0].position}"


def _describe_silence(rank: int, beat: Beat | None, now: float) -> str:
    if beat is None:
        return f"rank {rank} has never written a heartbeat"
    return f"{beat.name} has written no heartbeat for {now - beat.time:.0f} s; it was at {beat.position}"


def _describe_positions(beats: list[Beat]) -> Iterator[str]:
    """Lines of ranks at the same position, those behind first."""
    places: dict[Position, list[Beat]] = {}
    for beat in beats:
        places.setdefault(beat.position, []).append(beat)
    for place, there in sorted(places.items()):
        who = there[0].name if len(there) == 1 else f"ranks {_format_ranks(beat.rank for beat in there)}"
        yield f"{who}: {place}"


def _format_ranks(numbers: Iterable[int]) -> str:
    """Rank numbers as `0-3, 7, 9-10`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
