"""Choice of the checkpoint that a start resumes from: by rank 0, for all ranks, before the model is built."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_internvlx import files
from megatron_internvlx.config import DataSettings, settings_from
from megatron_internvlx.lifecycle import resume
from megatron_internvlx.lifecycle.base import share_base
from megatron_internvlx.lifecycle.lock import SaveLock
from megatron_internvlx.lifecycle.setup import RunSetup
from megatron_internvlx.lifecycle.signals import StopSignals
from megatron_internvlx.lora_settings import LoraSettings
from megatron_internvlx.megatron_settings import Batches, CheckpointFiles, Parallelism
from megatron_internvlx.ranks import is_first_rank
from megatron_internvlx.reporting.phases import START


def report_phases() -> None:
    """Have the phases of the checkpoint and of the first step begin when Megatron loads one and enters its loop."""
    import megatron.training.training as training

    for phase, name in (("checkpoint", "load_checkpoint"), ("first_step", "train")):
        function = getattr(training, name)
        setattr(training, name, START.before(phase, getattr(function, "__wrapped__", function)))


class Continuation:
    """Finds the newest complete checkpoint of `--save`, and has Megatron load it.

    Args:
        args: Megatron's namespace. Here, and nowhere else, it is told which checkpoint to load: that is not known
            earlier, because the ranks must agree on it.
        setup: the run's directory and ranks.
        stop: signal handler, whose clock starts when communication is ready.
        lock: lock of `--save`, on the rank that holds it.
    """

    def __init__(
        self, args: argparse.Namespace, setup: RunSetup, stop: StopSignals, lock: SaveLock | None = None
    ) -> None:
        self.args, self.setup, self.stop, self.lock = args, setup, stop, lock
        self.ranks, self.data = settings_from(args, Parallelism), settings_from(args, DataSettings)
        risk = resume.launcher_risk(os.environ)
        if risk and is_first_rank():
            print(f"pretrain_vlm.py: {risk}", file=sys.stderr, flush=True)

    def precede(self, model_provider: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the model provider, so that its first call chooses the checkpoint.

        It is the only function that Megatron calls on all ranks with communication ready and nothing loaded.
        """
        chosen = False

        def provide(*args: Any, **kwargs: Any) -> Any:
            nonlocal chosen
            if not chosen:
                chosen = True
                self.choose()
                START.enter("model")
                report_phases()
            return model_provider(*args, **kwargs)

        return provide

    def choose(self) -> None:
        """Choose the checkpoint to load, the same on all ranks. Exits if another start would get no further."""
        if self.stop.clock is not None:
            self.stop.clock.restart()
        self.check_layout()
        self.check_length()
        share_base(self.args)
        folder = self.setup.state_folder
        if folder is None:
            return
        answer: list[Any] = [None]
        if dist.get_rank() == 0:
            answer = [self._choice(folder)]
        dist.broadcast_object_list(answer, src=0)
        found = answer[0]
        if found == resume.STOP:
            self.stop.release()
            if self.lock is not None:
                self.lock.release()
            sys.exit(resume.STOP)
        if isinstance(found, tuple):
            self._load(*found)

    def check_layout(self) -> None:
        """Check that all ranks read the same layout: on a slow file system one may see an older checkpoint.

        Raises RuntimeError on a rank whose layout differs from that of rank 0.
        """
        mine = self.ranks.pipeline_model_parallel_layout
        if mine is None:  # then it is None on every rank: the number of layers decides
            return
        first = [mine]
        dist.broadcast_object_list(first, src=0)
        if first[0] != mine:
            checkpoints = settings_from(self.args, CheckpointFiles)
            raise RuntimeError(
                f"this rank's --pipeline-model-parallel-layout is {mine!r} and that of rank 0 {first[0]!r}: they found "
                f"different checkpoints in {checkpoints.save or checkpoints.load}; start again, or give the layout"
            )

    def check_length(self) -> None:
        """Check that all ranks counted the same epoch: with other numbers of steps they would wait for each other.

        Raises RuntimeError on a rank whose number differs from that of rank 0.
        """
        if self.data.epochs is None:
            return
        mine = settings_from(self.args, Batches).train_iters
        first = [mine]
        dist.broadcast_object_list(first, src=0)
        if first[0] != mine:
            raise RuntimeError(
                f"--epochs {self.data.epochs:g} are {mine} steps on this rank and {first[0]} on rank 0: was "
                f"{self.data.data} written to while the run started, or does it differ between nodes? Start again "
                "once it is the same everywhere"
            )

    def _choice(self, save: Path) -> tuple[int] | int | None:
        """Choose on rank 0: (iteration,) to resume from, None to start anew, or STOP."""
        state = resume.RunState.read(save)
        if reason := state.stopped_by_disk(save):
            print(f"pretrain_vlm.py: {reason}; make room, then start again", file=sys.stderr, flush=True)
            state.write(save)  # its time tells the launcher that this start has ended
            return resume.STOP
        found, broken = resume.newest_complete(save, self._position_fault)
        if found is None and (whole := resume.newest_complete(save)[0]) is not None:
            # Setting them aside would discard weights only because the position of the data is missing. With this
            # status a launcher does not start the run again.
            state.status = "stuck"
            state.reason = (
                f"{dict(broken)[whole]}, and no checkpoint in {save} has a complete one: restore the file, or "
                "start the data anew with --restart-data"
            )
            state.write(save)
            print(f"pretrain_vlm.py: {state.reason}", file=sys.stderr, flush=True)
            return resume.STOP
        for line in resume.messages(save, found, broken):
            print(line, flush=True)
        may_train = state.begin(found, self.setup.settings.max_tries)
        state.write(save)
        if not may_train:
            print(f"pretrain_vlm.py: {state.reason}: giving up", file=sys.stderr, flush=True)
            return resume.STOP
        resume.set_aside(save, broken)
        if found is None:
            return None
        # A run killed while it wrote this file leaves it empty, and Megatron would stop.
        files.write_atomically(save / files.TRACKER, str(found))
        return (found,)

    def _position_fault(self, iteration: int) -> str | None:
        """Fault of the data position saved with a checkpoint in `--save`; None if there is none."""
        if self.data.loader != "energon" or self.data.restart_data:
            return None
        from megatron_internvlx.training.loader_state import position_fault  # Energon takes seconds to import

        return position_fault(settings_from(self.args, CheckpointFiles), self.data, iteration)

    def _load(self, iteration: int) -> None:
        args = self.args
        args.load, args.ckpt_step = args.save, iteration
        # These select the weights of the first start, and the base of adapters at every start.
        if settings_from(args, LoraSettings).lora_rank is None:
            args.pretrained_checkpoint = None
        args.finetune = args.no_load_optim = args.no_load_rng = False
