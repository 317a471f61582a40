"""Record of a run's end, for its launcher and its trackers."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_internvlx import files
from megatron_internvlx.exit_codes import INTERRUPTED, SAVE_FAILED
from megatron_internvlx.lifecycle import resume, signals
from megatron_internvlx.lifecycle.interrupt import newest_checkpoint
from megatron_internvlx.lifecycle.lock import SaveLock
from megatron_internvlx.lifecycle.resume import Unsaved
from megatron_internvlx.lifecycle.setup import RunSetup
from megatron_internvlx.lifecycle.signals import StopSignals
from megatron_internvlx.ranks import local_rank


class Outcome:
    """Writes the run's state when this rank ends, and tells the trackers.

    Args:
        setup: the run's directory and ranks.
        stop: signal handler, which records whether a signal or Ctrl-C ended the run.
        report: called when the run ends, with FINISHED, FAILED, KILLED (by Ctrl-C) or SCHEDULED (another start
            continues it), and with True if only this rank knows; otherwise every rank calls it.
        lock: lock of `--save`, on the rank that holds it.
    """

    def __init__(
        self,
        setup: RunSetup,
        stop: StopSignals,
        report: Callable[[str, bool], None] = lambda status, only_here: None,
        lock: SaveLock | None = None,
    ) -> None:
        self.setup, self.stop, self.report, self.lock = setup, stop, report, lock
        self._before = resume.RunState.read(setup.save).updated if setup.save else 0.0
        signals.interrupts.newest = lambda: newest_checkpoint(setup.save)
        signals.interrupts.last_acts.append(self.interrupted)

    def crashed(self, error: BaseException, mistake: ValueError | None) -> None:
        """Record an error that ended training.

        Args:
            error: the error.
            mistake: message for the caller if the error is theirs, else None.
        """
        if mistake is not None:
            self.failed(str(mistake), quiet=True)
        else:
            cause = first_failure(error)
            first, _, more = f"{type(cause).__name__}: {cause}".partition(
                "\n"
            )  # only the first line is printed
            self.failed("\n".join(["; ".join([first, *getattr(cause, "__notes__", [])]), more]).rstrip())

    def failed(self, reason: str, *, unsaved: int | None = None, quiet: bool = False) -> None:
        """Record the failure of this rank, with its number and host: that shows a bad node.

        Args:
            reason: description of the failure.
            unsaved: step of a checkpoint for which there was no room at the end; then all ranks end. None: the
                other ranks do not know of the failure, and may be killed before they can report it.
            quiet: whether the caller prints the reason.
        """
        signals.interrupts.yield_to_end()
        only_here = unsaved is None
        reason = f"rank {self.setup.rank} on {socket.gethostname()}: {reason}"
        if not quiet:
            print(f"pretrain_vlm.py: {reason.splitlines()[0]}", file=sys.__stderr__, flush=True)
        if (folder := self.setup.state_folder) is not None:
            state = resume.RunState.read(folder)
            if self._stopped(state):
                # Ctrl-C on another node: the connection to ranks that are gone fails here, and a launcher must stop.
                self.report("KILLED", False)
                return
            only_here = only_here and state.status != "failed"  # another rank was faster
            state.status, state.reason, state.unsaved = "failed", reason, unsaved
            try:
                state.write(folder)
            except OSError as error:  # the disk is full, for instance
                print(f"{folder / resume.STATE} could not be written: {error}", file=sys.stderr)
        self.report("FAILED", only_here)

    def interrupted(self) -> None:
        """Record that Ctrl-C has ended the run at once; called in the thread that waits for it."""
        if (folder := self.setup.state_folder) is not None:
            self._record_interrupt(folder)
        self.report("KILLED", False)

    def _record_interrupt(self, folder: Path) -> None:
        """Write the state on rank 0, or else on the first rank of a node; the others wait until it is written.

        A rank that ended earlier would look like a failure to other nodes.
        """
        first = local_rank() == 0
        end = time.monotonic() + (0.0 if self.setup.rank == 0 else 1.0 if first else 2.0)
        while not self._stopped(state := resume.RunState.read(folder)):
            if time.monotonic() >= end:
                if first:
                    state.status, state.reason = "stopped", "by Ctrl-C"
                    state.write(folder)
                return
            time.sleep(0.05)

    def _stopped(self, state: resume.RunState) -> bool:
        """Whether Ctrl-C has ended a rank in this start; compares no clocks, which differ between nodes."""
        return state.status == "stopped" and state.updated != self._before

    def ended(self, *, early: bool, unsaved: Unsaved | None = None) -> int:
        """Record the end of training on every rank; returns the exit code.

        Args:
            early: whether training stopped before its last step.
            unsaved: checkpoint of the last step, if the disk had no room for it.
        """
        self.stop.release()
        code = self._record_full_disk(unsaved) if unsaved else self._record_end(early)
        signals.interrupts.last_acts.clear()
        if self.lock is not None:
            self.lock.release()
        return code

    def _record_full_disk(self, unsaved: Unsaved) -> int:
        if self.setup.handles_signals:
            signals.end_children()
        if dist.get_rank() == 0:
            reason = f"it ended at step {unsaved.step}, which was not saved: {unsaved.reason}"
            self.failed(f"{reason}; make room and start it again", unsaved=unsaved.step)
        else:
            self.report("FAILED", False)
        return SAVE_FAILED

    def _record_end(self, early: bool) -> int:
        if self.setup.handles_signals:
            signals.end_children()
        status, reported = "finished", "FINISHED"
        if self.stop.interrupted:
            status, reported = "stopped", "KILLED"
        elif early and (self.stop.received or self.setup.limited):
            status, reported = "preempted", "SCHEDULED"
        elif early:
            status = "stopped"
        self.report(reported, False)
        if dist.get_rank() == 0:
            if line := self._last_line(early):
                print(line, flush=True)
            if (folder := self.setup.state_folder) is not None:
                state = resume.RunState.read(folder)
                state.status = status
                state.reason = "by Ctrl-C" if self.stop.interrupted else state.reason
                state.write(folder)
        return INTERRUPTED if self.stop.interrupted else 0

    def _last_line(self, early: bool) -> str | None:
        """Last line of the output; None where Megatron has printed why it stopped."""
        if self.stop.interrupted:
            return f"stopped by Ctrl-C, {signals.interrupts.newest()}"
        if self.stop.received:
            saved = "after a checkpoint" if self.setup.saves else "without --save, so without a checkpoint"
            return f"stopped by a signal, {saved}"
        if early:
            return None
        line = f"finished: step {self.setup.steps}"
        if self.setup.save is None or not (saved_steps := files.iterations(self.setup.save)):
            return line
        return f"{line}, checkpoint {files.checkpoint_directory(self.setup.save, saved_steps[0])}"


def first_failure(error: BaseException) -> BaseException:
    """Unwrap torch's CheckpointException, which holds one error per rank and prints all of them with tracebacks."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error
