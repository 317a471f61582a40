"""A run's directory, ranks and handling of faults, taken from the parsed arguments."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_internvlx.config import RunSettings, settings_from
from megatron_internvlx.megatron_settings import Batches, CheckpointFiles, Loop, Parallelism


@dataclass(frozen=True)
class RunSetup:
    """The part of the arguments that the life of a run depends on."""

    save: Path | None
    """`--save`; None if it is not given, or is a URL of a storage client."""
    saves: bool
    """Whether checkpoints are written, to a directory or to a URL."""
    rank: int
    world_size: int
    steps: int
    """`--train-iters`."""
    handles_signals: bool
    """`--exit-signal-handler`."""
    limited: bool
    """`--exit-duration-in-mins`: the run ends after some time, to be continued by another start."""
    settings: RunSettings

    @property
    def state_folder(self) -> Path | None:
        """Directory of the run's state, which its launcher reads; None without `--auto-resume`."""
        return self.save if self.settings.auto_resume else None


def setup_from(args: argparse.Namespace) -> RunSetup:
    """The setup that parsed arguments describe."""
    checkpoints, ranks = settings_from(args, CheckpointFiles), settings_from(args, Parallelism)
    loop = settings_from(args, Loop)
    return RunSetup(
        save=checkpoints.save_folder,
        saves=bool(checkpoints.save),
        rank=ranks.rank,
        world_size=ranks.world_size,
        steps=settings_from(args, Batches).train_iters or 0,
        handles_signals=bool(loop.exit_signal_handler),
        limited=loop.exit_duration_in_mins is not None,
        settings=settings_from(args, RunSettings),
    )
