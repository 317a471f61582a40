"""How a run ends, recorded for its launcher and its trackers."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_internvlx import files
from megatron_internvlx.lifecycle import resume, signals
from megatron_internvlx.lifecycle.interrupt import INTERRUPTED, newest_checkpoint
from megatron_internvlx.lifecycle.lock import SaveLock
from megatron_internvlx.lifecycle.resume import SAVE_FAILED, Unsaved
from megatron_internvlx.lifecycle.setup import RunSetup
from megatron_internvlx.lifecycle.signals import StopSignals
from megatron_internvlx.ranks import local_rank


class Outcome:
    """Writes the run's state when this rank ends, and tells the trackers.

    Args:
        setup: the run's directory and ranks.
        stop: whether a signal or Ctrl-C ended the run.
        tell: called with FINISHED, FAILED, KILLED (by Ctrl-C) or SCHEDULED (will go on) when the run ends, and
            whether only this rank knows; otherwise every rank calls it.
        lock: of `--save`, on the rank that holds it.
    """

    def __init__(
        self,
        setup: RunSetup,
        stop: StopSignals,
        tell: Callable[[str, bool], None] = lambda status, only_here: None,
        lock: SaveLock | None = None,
    ) -> None:
        self.setup, self.stop, self.tell, self.lock = setup, stop, tell, lock
        self._before = resume.RunState.read(setup.save).updated if setup.save else 0.0
        signals.interrupts.newest = lambda: newest_checkpoint(setup.save)
        signals.interrupts.last_acts.append(self.interrupted)

    def crashed(self, error: BaseException, mistake: ValueError | None) -> None:
        """Record an error that ended training; `mistake`: what the caller is told instead, if it is one of theirs."""
        if mistake is not None:
            self.failed(str(mistake), quiet=True)
        else:
            cause = first_failure(error)
            self.failed(f"{type(cause).__name__}: {cause}")

    def failed(self, reason: str, *, unsaved: int | None = None, quiet: bool = False) -> None:
        """Record why this rank ends, on whatever rank it is, and where: one bad node is worth knowing.

        Args:
            reason: what happened.
            unsaved: step of a checkpoint for which there was no room at the end, where all ranks end. Otherwise
                the others do not know, and may be killed before they can tell anyone.
            quiet: whether somebody else prints the reason.
        """
        signals.interrupts.yield_to_end()
        only_here = unsaved is None
        reason = f"rank {self.setup.rank} on {socket.gethostname()}: {reason}"
        if not quiet:
            print(f"pretrain_vlm.py: {reason.splitlines()[0]}", file=sys.__stderr__, flush=True)
        if (folder := self.setup.state_folder) is not None:
            state = resume.RunState.read(folder)
            if self._stopped(state):
                # Elsewhere: what fails here is the connection to ranks that are gone, and a launcher is not to go on.
                self.tell("KILLED", False)
                return
            only_here = only_here and state.status != "failed"  # another rank was faster
            state.status, state.reason, state.unsaved = "failed", reason, unsaved
            try:
                state.write(folder)
            except OSError as error:  # the disk is full, for instance
                print(f"{folder / resume.STATE} could not be written: {error}", file=sys.stderr)
        self.tell("FAILED", only_here)

    def interrupted(self) -> None:
        """Record that a person has ended the run at once; in the thread that waits for Ctrl-C."""
        if (folder := self.setup.state_folder) is not None:
            self._record_interrupt(folder)
        self.tell("KILLED", False)

    def _record_interrupt(self, folder: Path) -> None:
        """Rank 0 writes it, or else the first rank of a node; until then no rank goes, which other nodes would see."""
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
        """Whether a rank has been ended by Ctrl-C in this start, by no clock: those of other nodes may differ."""
        return state.status == "stopped" and state.updated != self._before

    def ended(self, *, early: bool, unsaved: Unsaved | None = None) -> int:
        """Record the end of training on every rank; returns the exit code.

        Args:
            early: whether training was told to stop before its last step.
            unsaved: the checkpoint of the last step, if the disk had no room for it.
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
            self.tell("FAILED", False)
        return SAVE_FAILED

    def _record_end(self, early: bool) -> int:
        if self.setup.handles_signals:
            signals.end_children()
        status, told = "finished", "FINISHED"
        if self.stop.interrupted:
            status, told = "stopped", "KILLED"
        elif early and (self.stop.received or self.setup.limited):
            status, told = "preempted", "SCHEDULED"
        elif early:
            status = "stopped"
        self.tell(told, False)
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
        """What a person reads at the end; None where Megatron has said why it stopped."""
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
    """What failed on a rank: torch's CheckpointException holds one error per rank, and prints all with tracebacks."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error
