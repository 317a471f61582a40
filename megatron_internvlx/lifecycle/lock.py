"""Lock that keeps a second run from the same `--save` directory.

It is an fcntl lock on `run.lock`, whose content names the holder. The system frees it when the holding process
ends, however that happens, and children do not inherit it: a loader worker that outlives its rank does not block
the next start.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import struct
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_internvlx.exit_codes import IN_USE
from megatron_internvlx.lifecycle.setup import RunSetup

FILE = "run.lock"

_PATIENCE = 150.0  # seconds; a lock server forgets a node that died after 90 s or so
_HELD = (errno.EACCES, errno.EAGAIN)  # what POSIX answers where another process has the lock
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_FLOCK = "hhqqi0q"  # struct flock of 64-bit Linux: type, whence, start, length, pid


class SaveInUse(ValueError):
    """Error: another run holds the lock of the directory."""

    exit_code = IN_USE


@dataclass(frozen=True)
class Holder:
    """Process that holds the lock of a directory."""

    host: str = "an unknown host"
    pid: int = 0
    since: float = 0.0
    """Seconds since the epoch."""
    job: str | None = None
    """SLURM's job or torchrun's run, whose starts follow each other."""

    @property
    def known(self) -> bool:
        """Whether the file named the holder."""
        return self.pid != 0

    @property
    def ours(self) -> bool:
        """Whether it is another start of this job."""
        return self.job is not None and self.job == own_job()

    def __str__(self) -> str:
        if not self.known:
            return f"another run ({FILE} does not say which)"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return (
            f"a run on {self.host} (pid {self.pid}, since {since}{f', job {self.job}' if self.job else ''})"
        )


def own_job() -> str | None:
    """Identifier shared by all starts of this job and by no other job; None if unknown."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return os.environ.get("SLURM_JOB_ID") or (run if run not in (None, "", "none") else None)


class SaveLock:
    """Lock of a `--save` directory, kept until `release` or the end of this process.

    Raises SaveInUse, naming the holder, if another run has it. A holder on another host is waited for, whatever its
    job: its node may have died before the file system noticed. A holder on this host is alive, and is waited for only
    if it is an earlier start of the same job. Raises ValueError if the file cannot be opened or locked.
    """

    def __init__(self, save: Path, patience: float = _PATIENCE) -> None:
        self.path = save / FILE
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ValueError(f"--save: {self.path} cannot be written: {error.strerror}") from error
        end = time.monotonic() + patience
        reported, looks = False, 0
        while not self._try_lock():
            holder = _read_holder(self.path)
            if _is_alive(holder) or time.monotonic() > end:
                os.close(self._file)
                raise SaveInUse(
                    f"--save {save} belongs to {holder}, which is still training: wait for it, end it, or choose "
                    "another --save"
                )
            looks += 1
            if not reported and (
                holder.known or looks > 1
            ):  # it writes its name a moment after it has the lock
                print(
                    f"pretrain_vlm.py: --save {save} belongs to {holder}: waiting up to {patience:.0f} s for it to end,"
                    " or for the file system to forget it if its node has died",
                    file=sys.stderr,
                    flush=True,
                )
                reported = True
            time.sleep(1.0)
        holder = Holder(socket.gethostname(), os.getpid(), time.time(), own_job())
        self._write(json.dumps(asdict(holder)))

    def release(self) -> None:
        """Release the lock; safe to repeat."""
        if self._file >= 0:
            self._write("")
            os.close(self._file)
            self._file = -1

    def _try_lock(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            if error.errno not in _UNSUPPORTED:
                os.close(self._file)
                raise ValueError(f"--save: {self.path} cannot be locked: {error.strerror}") from error
            print(
                f"pretrain_vlm.py: {self.path.parent} is on a file system without locks ({error.strerror}): nothing "
                "keeps a second run from the same --save",
                file=sys.stderr,
                flush=True,
            )
        return True

    def _write(self, text: str) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text.encode(), 0)


def lock_save(setup: RunSetup) -> SaveLock | None:
    """Lock `--save` on the first rank; None on others, and where there is nothing to lock. Raises ValueError."""
    return None if setup.rank or setup.save is None else SaveLock(setup.save)


def other_holder(save: Path) -> Holder | None:
    """Another run that trains into this directory; None if there is none or it is an earlier start of this job."""
    try:
        file = os.open(save / FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        # Asking does not take the lock, so a run that starts at this moment finds it free.
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0]
    except OSError:
        return None
    finally:
        os.close(file)
    holder = _read_holder(save / FILE)
    return None if kind == fcntl.F_UNLCK or holder.ours else holder


def _is_alive(holder: Holder) -> bool:
    """Whether waiting is pointless: the system frees the lock of a process on this host as soon as it ends."""
    return holder.host == socket.gethostname() and not holder.ours


def _read_holder(path: Path) -> Holder:
    """The holder named in the file; it writes its name a moment after it locked."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return Holder()
