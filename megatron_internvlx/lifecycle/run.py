"""A run that survives faults: resuming, saving, stopping, and what it leaves behind for its launcher."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_internvlx import files
from megatron_internvlx.config import DataSettings, RunSettings, settings_from
from megatron_internvlx.lifecycle import origin, resume, signals, stall
from megatron_internvlx.lifecycle.interrupt import INTERRUPTED, newest_checkpoint
from megatron_internvlx.lifecycle.lock import SaveLock
from megatron_internvlx.lifecycle.resume import SAVE_FAILED
from megatron_internvlx.lifecycle.stall import Position, StallClock
from megatron_internvlx.platform.schedule import OtherGroups
from megatron_internvlx.ranks import is_first_rank, local_rank
from megatron_internvlx.training.step import ForwardStep


class Run:
    """Resumes before the model is built, guards checkpoints, and records how the run ended.

    Args:
        args: Megatron's parsed arguments; `load` and what belongs to it are set when a checkpoint is found.
        step: knows what this rank does, for those who wait for it.
        tell: called with FINISHED, FAILED, KILLED (by Ctrl-C) or SCHEDULED (will go on) when the run ends, and
            whether this rank alone knows; otherwise every rank calls it.
        saved: called on every rank after a checkpoint was saved.
        lock: of --save, on the rank that holds it.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        step: ForwardStep,
        tell: Callable[[str, bool], None] = lambda status, alone: None,
        saved: Callable[[], None] = lambda: None,
        lock: SaveLock | None = None,
    ) -> None:
        import megatron.training.global_vars as global_vars
        import megatron.training.training as training

        self.args = args
        self.settings = settings_from(args, RunSettings)
        self.save = Path(args.save) if args.save else None
        self.state = resume.RunState()
        self.unsaved: tuple[int, str] | None = None
        """The last step to be saved and why it was not, if the disk had no room for it."""
        self.stop = signals.StopSignals()
        self.step, self.tell, self.saved, self.lock = step, tell, saved, lock
        self.saving = False
        risk = resume.launcher_risk(os.environ)
        if risk and is_first_rank():
            print(f"pretrain_vlm.py: {risk}", file=sys.stderr, flush=True)
        if args.exit_signal_handler:
            # Instead of Megatron's, which handles one signal and waits for the device at every step.
            global_vars._GLOBAL_SIGNAL_HANDLER = self.stop
            signals.also_other_threads()
            self.stop.clock = self._clock()
        else:
            signals.let_go()
        local = None if args.save and "://" in args.save else self.save
        self._before = resume.RunState.read(local).updated if local else 0.0
        signals.interrupts.newest = lambda: newest_checkpoint(local)
        signals.interrupts.last_acts.append(self._interrupted)
        # A second run of the same process (tests) wraps the original again.
        original = getattr(training.save_checkpoint, "__wrapped__", training.save_checkpoint)
        training.save_checkpoint = self._guarded(original)

    def _clock(self) -> StallClock:
        args = self.args
        folder = self.save / stall.FOLDER if self.save and "://" not in args.save else None
        seconds = self.settings.stall_minutes * 60
        return StallClock(seconds, folder, args.rank, args.world_size, self._position, self.failed)

    def _position(self) -> Position:
        """Where this rank is, for those who wait for it."""
        doing = (
            "at the end of the step, where it waits for the others" if self.stop.waiting else self.step.doing
        )
        doing = "saving a checkpoint" if self.saving else doing
        # Megatron sets the first when training begins, the second when a checkpoint was loaded.
        done = getattr(self.args, "curr_iteration", getattr(self.args, "iteration", 0))
        return Position(done + 1, self.step.passes, doing)

    def before(self, model_provider: Callable[..., Any]) -> Callable[..., Any]:
        """The model provider, preceded by the choice of a checkpoint.

        It is the one place that Megatron calls on all ranks with communication ready and nothing loaded.
        """
        chosen = False

        def provide(*args: Any, **kwargs: Any) -> Any:
            nonlocal chosen
            if not chosen:
                chosen = True
                self._resume()
                signals.say("building the model")
            return model_provider(*args, **kwargs)

        return provide

    def _resume(self) -> None:
        if self.stop.clock is not None:
            self.stop.clock.restart()
        self._check_layout()
        if self.save is None or not self.settings.auto_resume:
            return
        answer: list[Any] = [None]
        if dist.get_rank() == 0:
            answer = [self._choose(self.save)]
        dist.broadcast_object_list(answer, src=0)
        found = answer[0]
        if found == resume.STOP:
            self.stop.release()
            if self.lock is not None:
                self.lock.release()
            sys.exit(resume.STOP)
        if isinstance(found, tuple):
            self._load(*found)

    def _check_layout(self) -> None:
        """Every rank reads the layout to keep for itself, and a slow file system may show one an older checkpoint."""
        mine = self.args.pipeline_model_parallel_layout
        if mine is None:  # of none or of all: the number of layers decides
            return
        first = [mine]
        dist.broadcast_object_list(first, src=0)
        if first[0] != mine:
            raise RuntimeError(
                f"this rank's --pipeline-model-parallel-layout is {mine!r} and that of rank 0 {first[0]!r}: they found "
                f"different checkpoints in {self.args.save or self.args.load}; start again, or give the layout"
            )

    def _choose(self, save: Path) -> tuple[int] | int | None:
        """On rank 0: (iteration,) to go on from, None to start, or STOP."""
        self.state = resume.RunState.read(save)
        if reason := self.state.stopped_by_disk(save):
            print(f"pretrain_vlm.py: {reason}; make room, then start again", file=sys.stderr, flush=True)
            self.state.write(save)  # its time tells the launcher that this start has ended
            return resume.STOP
        found, broken = resume.newest_complete(save, self._position_fault)
        if found is None and (whole := resume.newest_complete(save)[0]) is not None:
            # Setting them aside would throw away weights for want of a file that says where the data was.
            return self._stuck(
                f"{dict(broken)[whole]}, and no checkpoint in {save} has a complete one: bring it back, or "
                "start the data anew with --restart-data"
            )
        for line in resume.messages(save, found, broken):
            print(line, flush=True)
        going_on = self.state.begin(found, self.settings.max_tries)
        self.state.write(save)
        if not going_on:
            print(f"pretrain_vlm.py: {self.state.reason}: giving up", file=sys.stderr, flush=True)
            return resume.STOP
        resume.set_aside(save, broken)
        if found is None:
            return None
        # A run killed while it wrote this file leaves it empty, and Megatron would stop.
        files.write_atomically(save / files.TRACKER, str(found))
        return (found,)

    def _stuck(self, reason: str) -> int:
        """A launcher that asks why this start ended is told not to try again."""
        self.state.status, self.state.reason = "stuck", reason
        self.state.write(Path(self.args.save))
        print(f"pretrain_vlm.py: {reason}", file=sys.stderr, flush=True)
        return resume.STOP

    def _position_fault(self, iteration: int) -> str | None:
        """What is wrong with the position of the data saved with a checkpoint in --save."""
        data = settings_from(self.args, DataSettings)
        if data.loader != "energon" or data.restart_data:
            return None
        from megatron_internvlx.training.loader_state import position_fault  # Energon takes seconds to import

        return position_fault(self.args, iteration)

    def _load(self, iteration: int) -> None:
        args = self.args
        args.load, args.ckpt_step = args.save, iteration
        # These are about the weights that the first start took over.
        args.pretrained_checkpoint = None
        args.finetune = args.no_load_optim = args.no_load_rng = False

    def _guarded(self, save_checkpoint: Callable[..., None]) -> Callable[..., None]:
        def save(iteration: int, *args: Any, **kwargs: Any) -> None:
            if not self._room(iteration):
                return
            self.saving = True
            try:
                save_checkpoint(iteration, *args, **kwargs)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # torch's CheckpointException is no Exception
                self._save_failed(iteration, error)
            self.saving = False
            self.saved()

        save.__wrapped__ = save_checkpoint  # type: ignore[attr-defined]
        return save

    def _room(self, iteration: int) -> bool:
        """Whether the disk holds another checkpoint as large as the last; all ranks agree."""
        if self.save is None:
            return True
        lack: list[str | None] = [None]
        if dist.get_rank() == 0:
            lack = [resume.shortage(self.save)]
            if lack[0]:
                print(
                    f"step {iteration}: no checkpoint: {lack[0]}; training goes on, make room",
                    file=sys.stderr,
                    flush=True,
                )
        dist.broadcast_object_list(lack, src=0)
        # Megatron saves at the last step of a run, so what is left here when it ends is the end itself.
        self.unsaved = (iteration, lack[0]) if lack[0] else None
        return self.unsaved is None

    def _save_failed(self, iteration: int, error: BaseException) -> None:
        """Say so and end this process at once: the other ranks wait in the save, and torchrun ends them."""
        # The writer of torch's files hides the reason, which is most often this one.
        left = f"{shutil.disk_usage(self.save).free / 1e9:.2f} GB left on the disk" if self.save else ""
        self.failed(
            f"saving at step {iteration} failed, {left}: {root_cause(error)!r}; earlier checkpoints are intact"
        )
        os._exit(SAVE_FAILED)

    def crashed(self, error: BaseException) -> ValueError | None:
        """Record an error that ended training; returns what to tell the caller if it is a mistake of theirs.

        That is a checkpoint that does not fit, or optimizer state of other groups.
        """
        mistake = error if isinstance(error, OtherGroups) else origin.misfit(self.args, error)
        if mistake is not None:
            self.failed(str(mistake), say=False)
        else:
            cause = first_failure(error)
            self.failed(f"{type(cause).__name__}: {cause}")
        return mistake

    def failed(self, reason: str, *, unsaved: int | None = None, say: bool = True) -> None:
        """Record why this rank ends, on whatever rank it is, and where: one bad node is worth knowing.

        `unsaved`: the step of a checkpoint for which there was no room at the end, where all ranks end.
        Otherwise the others do not know, and may be killed before they can tell anyone. `say`: print it too.
        """
        signals.interrupts.yield_to_end()
        alone = unsaved is None
        reason = f"rank {self.args.rank} on {socket.gethostname()}: {reason}"
        if say:
            print(f"pretrain_vlm.py: {reason.splitlines()[0]}", file=sys.__stderr__, flush=True)
        if self.save is not None and self.settings.auto_resume:
            state = resume.RunState.read(self.save)
            if self._stopped(state):
                # Elsewhere: what fails here is the connection to ranks that are gone, and a launcher is not to go on.
                self.tell("KILLED", False)
                return
            alone = alone and state.status != "failed"  # another rank was faster
            state.status, state.reason, state.unsaved = "failed", reason, unsaved
            try:
                state.write(self.save)
            except OSError as error:  # the disk is full, for instance
                print(f"{self.save / resume.STATE} could not be written: {error}", file=sys.stderr)
        self.tell("FAILED", alone)

    def _interrupted(self) -> None:
        """Record that a person has ended the run at once; in the thread that waits for Ctrl-C."""
        if self.save is not None and self.settings.auto_resume:
            self._record_stop(self.save)
        self.tell("KILLED", False)

    def _record_stop(self, save: Path) -> None:
        """Rank 0 writes it, or else the first rank of a node; until then no rank goes, which other nodes would see."""
        first = local_rank() == 0
        end = time.monotonic() + (0.0 if self.args.rank == 0 else 1.0 if first else 2.0)
        while not self._stopped(state := resume.RunState.read(save)):
            if time.monotonic() >= end:
                if first:
                    state.status, state.reason = "stopped", "by Ctrl-C"
                    state.write(save)
                return
            time.sleep(0.05)

    def _stopped(self, state: resume.RunState) -> bool:
        """Whether a rank has been ended by Ctrl-C in this start, by no clock: those of other nodes may differ."""
        return state.status == "stopped" and state.updated != self._before

    def ended(self, *, early: bool) -> int:
        """Record the end of training: complete, or (`early`) told to stop; returns the exit code."""
        self.stop.release()
        code = self._record_end(early)
        signals.interrupts.last_acts.clear()
        if self.lock is not None:
            self.lock.release()
        return code

    def _record_end(self, early: bool) -> int:
        if self.args.exit_signal_handler:
            signals.end_children()
        if self.unsaved is not None:
            iteration, lack = self.unsaved
            if dist.get_rank() == 0:
                reason = f"it ended at step {iteration}, which was not saved: {lack}"
                self.failed(f"{reason}; make room and start it again", unsaved=iteration)
            else:
                self.tell("FAILED", False)
            return SAVE_FAILED
        status, outcome = "finished", "FINISHED"
        if early:
            told = self.stop.received and not self.stop.interrupted
            status = "preempted" if told or self.args.exit_duration_in_mins is not None else "stopped"
            outcome = "SCHEDULED" if status == "preempted" else "FINISHED"
        if self.stop.interrupted:
            status, outcome = "stopped", "KILLED"
        self.tell(outcome, False)
        if dist.get_rank() == 0:
            if self.stop.received:
                saved = "after a checkpoint" if self.save else "without --save, so without a checkpoint"
                saved = signals.interrupts.newest() if self.stop.interrupted else saved
                print(f"stopped by {'Ctrl-C' if self.stop.interrupted else 'a signal'}, {saved}", flush=True)
            elif not early:
                print(f"finished: step {self.args.train_iters}{self._saved_at()}", flush=True)
            if self.save is not None and self.settings.auto_resume:
                self.state = resume.RunState.read(self.save)
                self.state.status = status
                self.state.reason = "by Ctrl-C" if self.stop.interrupted else self.state.reason
                self.state.write(self.save)
        return INTERRUPTED if self.stop.interrupted else 0

    def _saved_at(self) -> str:
        if self.save is None or "://" in self.args.save or not (held := files.iterations(self.save)):
            return ""
        return f", checkpoint {files.checkpoint_directory(self.save, held[0])}"


def root_cause(error: BaseException) -> BaseException:
    """The exception at the start of the chain: Megatron wraps a full disk several times."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return error


def first_failure(error: BaseException) -> BaseException:
    """What failed on a rank: torch's CheckpointException holds one error per rank, and prints all with tracebacks."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error
