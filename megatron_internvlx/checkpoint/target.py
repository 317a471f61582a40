"""A directory that appears under its final name only when complete, made by several processes.

Work is cut into units. Each finished unit leaves a note in the partial directory, so a conversion
that was killed continues where it was when the same command is given again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, parent_process
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_internvlx.checkpoint.errors import ConversionError

NOTES = ".finished-units"
LOCK = ".lock"
# Under this size starting processes takes longer than the work.
MIN_PARALLEL_BYTES = 512 << 20


def fingerprint(*parts: Any) -> str:
    """Eight letters that stand for the inputs of a conversion."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def file_stamps(folder: Path, names: Sequence[str]) -> list[list[Any]]:
    """Name, size and time of files, for a fingerprint."""
    return [[name, (folder / name).stat().st_size, (folder / name).stat().st_mtime_ns] for name in names]


class WorkerKilled(ConversionError):
    """A process of the conversion was killed; what is finished is kept."""


class Target:
    """The directory being made: `<name>.partial-<fingerprint>` until `commit`.

    Args:
        final: the name it will have.
        mark: fingerprint of the inputs; a partial directory with another one is not continued.
        needed: bytes that will be written.

    Raises:
        ConversionError: `final` exists, the disk has too little room, or the same conversion is running.
    """

    def __init__(self, final: Path, mark: str, needed: int) -> None:
        self.final = final
        self.partial = final.parent / f"{final.name}.partial-{mark}"
        if os.path.lexists(final):
            raise ConversionError(f"{final} exists already; remove it, or choose another name")
        final.parent.mkdir(parents=True, exist_ok=True)
        done = sum(p.stat().st_blocks * 512 for p in self.partial.rglob("*") if p.is_file())
        free = shutil.disk_usage(final.parent).free
        if free < needed - done:
            raise ConversionError(
                f"{final.parent}: {(needed - done) / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
                "free some, or choose another disk"
            )
        (self.partial / NOTES).mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire_lock()

    def _acquire_lock(self) -> int:
        """The open lock file of the partial directory; the system releases it when this process ends."""
        lock = os.open(self.partial / NOTES / LOCK, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise ConversionError(
                f"{self.partial}: the same conversion is running; wait for it, or end it"
            ) from error
        except OSError:  # a file system without locks
            pass
        return lock

    def close(self) -> None:
        """Release the partial directory."""
        os.close(self._lock)

    def finished_units(self) -> dict[int, Any]:
        """Results of the units that an earlier run has finished."""
        notes = {}
        for path in (self.partial / NOTES).glob("*.json"):
            notes[int(path.stem)] = json.loads(path.read_text())
        return notes

    def record_unit(self, unit: int, result: Any) -> None:
        """Remember that a unit is finished, with its result."""
        path = self.partial / NOTES / f"{unit}.json"
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(result))
        unfinished.replace(path)

    def commit(self) -> None:
        """Give the complete directory its final name."""
        shutil.rmtree(self.partial / NOTES)
        # Another conversion may have made it meanwhile; rename would replace an empty directory only.
        if os.path.lexists(self.final):
            raise ConversionError(f"{self.final} appeared while this conversion ran; the result is discarded")
        self.partial.rename(self.final)


@contextmanager
def new_directory(final: Path, mark: str, needed: int) -> Iterator[Target]:
    """A Target that is committed at the end of the block, and removed after an error.

    When the process or one of its workers is interrupted or killed the partial directory stays, to be
    continued. Raises ConversionError for what the file system refuses.
    """
    try:
        target = Target(final, mark, needed)
    except OSError as error:
        raise ConversionError(f"{error.filename or final}: {error.strerror}") from error
    try:
        yield target
        target.commit()
    except WorkerKilled:
        raise
    except OSError as error:
        shutil.rmtree(target.partial, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConversionError(
                f"{final.parent}: the disk is full ({os.strerror(error.errno)}); nothing was kept"
            ) from error
        raise ConversionError(f"{error.filename or final}: {error.strerror}; nothing was kept") from error
    except Exception:
        shutil.rmtree(target.partial, ignore_errors=True)
        raise
    finally:
        target.close()


def run_units(
    target: Target,
    units: Sequence[Any],
    work: Callable[[Any], Any],
    *,
    sizes: Sequence[int],
    processes: int,
    title: str,
    quiet: bool = False,
) -> Mapping[int, Any]:
    """Results of `work(unit)` for all units, by number, with a progress bar in bytes.

    Args:
        target: where finished units are noted.
        units: picklable; each is done by one process.
        work: a function of a module; returns what JSON can hold.
        sizes: bytes of each unit, for the bar.
        processes: at most so many at a time; 1 works in this process.
    """
    results = {number: result for number, result in target.finished_units().items() if number < len(units)}
    todo = [number for number in range(len(units)) if number not in results]
    # The largest first: none is begun when all others are done.
    todo.sort(key=lambda number: -sizes[number])
    bar = tqdm(total=sum(sizes), desc=title, unit="B", unit_scale=True, unit_divisor=1000, disable=quiet)
    with bar:
        bar.update(sum(sizes[number] for number in results))
        for number, result in _run_pending(units, todo, work, processes, sum(sizes[n] for n in todo)):
            target.record_unit(number, result)
            results[number] = result
            bar.update(sizes[number])
    return results


def _run_pending(
    units: Sequence[Any], todo: list[int], work: Callable[[Any], Any], processes: int, size: int
) -> Iterator[tuple[int, Any]]:
    if processes == 1 or len(todo) < 2 or size < MIN_PARALLEL_BYTES:
        for number in todo:
            yield number, work(units[number])
        return
    with ProcessPoolExecutor(
        min(processes, len(todo)), mp_context=get_context("forkserver"), initializer=start_worker
    ) as pool:
        # The server inherits this: Ctrl-C reaches all processes, and is for this one to handle.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = {pool.submit(work, units[number]): number for number in todo}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise WorkerKilled(
                f"a process was killed, perhaps for want of memory, with {len(todo)} parts of "
                f"{size / 1e9:.2f} GB to do; the same command continues, with fewer --processes in less memory"
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def preload_workers(module: str) -> None:
    """Start the server that workers are forked from, which imports `module` while this process does other things.

    Otherwise every worker would import it, for seconds, when there is work to do.
    """
    get_context("forkserver").set_forkserver_preload([module])
    root, before = str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = root if not before else os.pathsep.join((root, before))
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def start_worker() -> None:
    """In a new worker: leave Ctrl-C to the parent, and end when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """In a process that was started here: end when the parent does, however it ends.

    A worker left alone would go on with what was queued, and write over what the next run has finished.
    """

    def wait() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def group_by_size(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive positions in groups of at most `limit` bytes (a larger single one is a group)."""
    groups: list[list[int]] = []
    filled = limit + 1
    for position, size in enumerate(sizes):
        if filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(position)
        filled += size
    return groups
