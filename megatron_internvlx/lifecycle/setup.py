"""What the command line says of a run's directory, its ranks and its faults."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_internvlx.config import RunSettings, settings_from


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
    """`--exit-duration-in-mins`: the run ends after some time and is to go on later."""
    settings: RunSettings

    @property
    def state_folder(self) -> Path | None:
        """Directory of the run's state, which its launcher reads; None without `--auto-resume`."""
        return self.save if self.settings.auto_resume else None


def setup_from(args: argparse.Namespace) -> RunSetup:
    """The setup that parsed arguments describe."""
    return RunSetup(
        save=Path(args.save) if args.save and "://" not in args.save else None,
        saves=bool(args.save),
        rank=args.rank,
        world_size=args.world_size,
        steps=args.train_iters or 0,
        handles_signals=bool(args.exit_signal_handler),
        limited=args.exit_duration_in_mins is not None,
        settings=settings_from(args, RunSettings),
    )
