"""A run that survives faults: resuming, saving, stopping, and what it leaves behind for its launcher."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_internvlx.arguments import settings_from
from megatron_internvlx.config import RunSettings
from megatron_internvlx.training import resume, signals

SAVE_FAILED = 74


class Run:
    """Resumes before the model is built, guards checkpoints, and records how the run ended.

    Args:
        args: Megatron's parsed arguments; `load` and what belongs to it are set when a checkpoint is found.
        tell: called on every rank with FAILED or SCHEDULED (will go on) when the run ends early.
    """

    def __init__(self, args: argparse.Namespace, tell: Callable[[str], None] = lambda status: None) -> None:
        import megatron.training.global_vars as global_vars
        import megatron.training.training as training

        self.args = args
        self.settings = settings_from(args, RunSettings)
        self.save = Path(args.save) if args.save else None
        self.state = resume.RunState()
        self.stop = signals.StopSignals(self.settings.stall_minutes * 60)
        self.tell = tell
        risk = resume.launcher_risk(os.environ)
        if risk and os.environ.get("RANK", "0") == "0":
            print(f"pretrain_vlm.py: {risk}", file=sys.stderr, flush=True)
        if args.exit_signal_handler:
            # Instead of Megatron's, which handles one signal and waits for the device at every step.
            global_vars._GLOBAL_SIGNAL_HANDLER = self.stop
            signals.also_other_threads()
        else:
            signals.let_go()
            self.stop.stall_seconds = 0  # nobody would restart its clock
        # A second run of the same process (tests) wraps the original again.
        original = getattr(training.save_checkpoint, "__wrapped__", training.save_checkpoint)
        training.save_checkpoint = self._guarded(original)

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
            return model_provider(*args, **kwargs)

        return provide

    def _resume(self) -> None:
        self.stop.watch()
        if self.save is None or not self.settings.auto_resume:
            return
        answer: list[Any] = [None]
        if dist.get_rank() == 0:
            answer = [self._choose(self.save)]
        dist.broadcast_object_list(answer, src=0)
        found = answer[0]
        if found == resume.STOP:
            sys.exit(resume.STOP)
        if isinstance(found, tuple):
            self._load(*found)

    def _choose(self, save: Path) -> tuple[int] | int | None:
        """On rank 0: (iteration,) to go on from, None to start, or STOP."""
        self.state = resume.RunState.read(save)
        found, broken = resume.newest_complete(save)
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
        resume.write_atomically(save / resume.TRACKER, str(found))
        return (found,)

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
            try:
                save_checkpoint(iteration, *args, **kwargs)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # torch's CheckpointException is no Exception
                self._save_failed(iteration, error)

        save.__wrapped__ = save_checkpoint  # type: ignore[attr-defined]
        return save

    def _room(self, iteration: int) -> bool:
        """Whether the disk holds another checkpoint as large as the last; all ranks agree."""
        if self.save is None:
            return True
        verdict = [True]
        if dist.get_rank() == 0:
            last = next((resume.directory(self.save, i) for i in resume.iterations(self.save)), None)
            needed = sum(f.stat().st_size for f in last.iterdir()) if last else 0
            free = shutil.disk_usage(self.save).free if last else 1
            verdict = [free > needed * 1.05]
            if not verdict[0]:
                print(
                    f"step {iteration}: no checkpoint: {self.save} has {free / 1e9:.2f} GB left, one takes "
                    f"{needed / 1e9:.2f} GB; training goes on, make room",
                    file=sys.stderr,
                    flush=True,
                )
        dist.broadcast_object_list(verdict, src=0)
        return verdict[0]

    def _save_failed(self, iteration: int, error: BaseException) -> None:
        """Say so and end this process at once: the other ranks wait in the save, and torchrun ends them."""
        # The writer of torch's files hides the reason, which is most often this one.
        left = f"{shutil.disk_usage(self.save).free / 1e9:.2f} GB left on the disk" if self.save else ""
        self.failed(
            f"saving at step {iteration} failed, {left}: {root_cause(error)!r}; earlier checkpoints are intact"
        )
        os._exit(SAVE_FAILED)

    def failed(self, reason: str) -> None:
        """Record why this rank ends, on whatever rank it is, and where: one bad node is worth knowing."""
        reason = f"rank {self.args.rank} on {socket.gethostname()}: {reason}"
        print(f"pretrain_vlm.py: {reason.splitlines()[0]}", file=sys.__stderr__, flush=True)
        self.tell("FAILED")
        if self.save is not None and self.settings.auto_resume:
            state = resume.RunState.read(self.save)
            state.status, state.reason = "failed", reason
            try:
                state.write(self.save)
            except OSError as error:  # the disk is full, for instance
                print(f"{self.save / resume.STATE} could not be written: {error}", file=sys.stderr)

    def ended(self, *, early: bool) -> None:
        """Record the end of training: complete, or (`early`) told to stop."""
        self.stop.release()
        if self.args.exit_signal_handler:
            signals.end_children()
        status = "finished"
        if early:
            out_of_time = self.args.exit_duration_in_mins is not None
            status = "preempted" if self.stop.received or out_of_time else "stopped"
            self.tell("SCHEDULED" if status == "preempted" else "FINISHED")
        if dist.get_rank() == 0:
            if self.stop.received:
                print("stopped by a signal, after a checkpoint", flush=True)
            if self.save is not None and self.settings.auto_resume:
                self.state = resume.RunState.read(self.save)
                self.state.status = status
                self.state.write(self.save)


def root_cause(error: BaseException) -> BaseException:
    """The exception at the start of the chain: Megatron wraps a full disk several times."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return error
