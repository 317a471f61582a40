"""Loss and held-out accuracy of a run by step, over all its starts."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from megatron_internvlx.files import write_atomically

FILE = "curve.json"


@dataclass
class Curve:
    """(step, value) points in rising order of steps; accuracies from 0 to 1."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write the points beside the checkpoints. A failure is printed, and training continues."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / FILE, json.dumps(vars(self)))
        except OSError as error:
            print(f"{folder / FILE} could not be written: {error}", file=sys.stderr, flush=True)

    def load_earlier(self, folder: Path, step: int) -> None:
        """Prepend the points of earlier starts, up to the checkpoint's `step`."""
        path = folder / FILE
        try:
            content = json.loads(path.read_text())
            earlier = {name: [(int(at), float(value)) for at, value in content[name]] for name in vars(self)}
        except FileNotFoundError:
            return  # no earlier start: the curve begins here
        except (OSError, ValueError, TypeError, KeyError) as error:
            print(f"{path} cannot be read, so the curve begins at step {step}: {error!r}", file=sys.stderr)
            return
        for name, points in earlier.items():
            setattr(self, name, [p for p in points if p[0] <= step] + getattr(self, name))
