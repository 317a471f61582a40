"""Write a directory with several processes, and give it its final name only when it is complete.

The work is divided into units. Each finished unit is recorded in the partial directory, so the same command
continues a conversion that was killed.
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
# Below this size in bytes, starting processes takes longer than the work.
MIN_PARALLEL_BYTES = 512 << 20


def fingerprint(*parts: Any) -> str:
    """Hash of the inputs of a conversion, eight hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def file_stamps(folder: Path, names: Sequence[str]) -> list[list[Any]]:
    """Names, sizes and modification times of files, for a fingerprint."""
    return [[name, (folder / name).stat().st_size, (folder / name).stat().st_mtime_ns] for name in names]


class WorkerKilled(ConversionError):
    """Error: a process of the conversion was killed; finished units are kept."""


class Target:
    """Directory that is being written, named `<name>.partial-<fingerprint>` until `commit`.

    Args:
        final: final path.
        mark: fingerprint of the inputs; a partial directory with another one is not continued.
        needed: number of bytes that will be written.

    Raises:
        ConversionError: `final` exists, the disk has too little space, or the same conversion is running.
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
                f"{final.parent}: {(needed - done) / 1e9:.2f} GB are needed, but only {free / 1e9:.2f} GB are free; "
                "free some space, or choose another disk"
            )
        (self.partial / NOTES).mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire_lock()

    def _acquire_lock(self) -> int:
        """Lock the partial directory; returns the open file. The system releases it when this process ends."""
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
        """Results of the units that an earlier run finished, by number."""
        notes = {}
        for path in (self.partial / NOTES).glob("*.json"):
            notes[int(path.stem)] = json.loads(path.read_text())
        return notes

    def record_unit(self, unit: int, result: Any) -> None:
        """Record the result of a finished unit."""
        path = self.partial / NOTES / f"{unit}.json"
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(result))
        unfinished.replace(path)

    def commit(self) -> None:
        """Give the complete directory its final name."""
        shutil.rmtree(self.partial / NOTES)
        # Another conversion may have created it meanwhile; rename would replace only an empty directory.
        if os.path.lexists(self.final):
            raise ConversionError(f"{self.final} appeared while this conversion ran; the result is discarded")
        self.partial.rename(self.final)


@contextmanager
def new_directory(final: Path, mark: str, needed: int) -> Iterator[Target]:
    """Context with a Target that is committed at the end of the block, and removed after an error.

    If the process or one of its workers is interrupted or killed, the partial directory is kept and can be
    continued. Raises ConversionError for errors of the file system.
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
    """Run `work(unit)` for all units with a progress bar in bytes; returns the results by number.

    Args:
        target: records the finished units.
        units: picklable; each is processed by one process.
        work: function of a module, with a result that JSON can represent.
        sizes: bytes of each unit.
        processes: maximum number of processes; 1: work in this process.
        title: text before the progress bar.
        quiet: no progress bar.
    """
    results = {number: result for number, result in target.finished_units().items() if number < len(units)}
    todo = [number for number in range(len(units)) if number not in results]
    # The largest first, so that the last unit to start is a small one.
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
        # The server inherits this mask: Ctrl-C reaches all processes, but only this one must handle it.
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
                f"a process was killed, perhaps because memory was full; {len(todo)} parts of {size / 1e9:.2f} GB were "
                "to do. The same command continues; fewer --processes need less memory"
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def preload_workers(module: str) -> None:
    """Start the server from which workers are forked; it imports `module` while this process continues.

    Otherwise every worker would import it, which takes seconds.
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
    """Initialise a worker: ignore Ctrl-C, which the parent handles, and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """End this process when its parent ends, for any reason.

    Otherwise a worker would continue with queued units, and overwrite finished units of the next run.
    """

    def wait() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def group_by_size(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Group consecutive positions to at most `limit` bytes; a larger item is a group of its own."""
    groups: list[list[int]] = []
    filled = limit + 1
    for position, size in enumerate(sizes):
        if filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(position)
        filled += size
    return groups
