"""Memory over many steps: it must not grow.

    python -m benchmarks.memory            # quick: 60 steps
    python -m benchmarks.memory --full     # 500 steps

A small model on CPU with packed micro-batches of changing lengths (the allocator meets new sizes all the
time). Read from the operating system after each step; the figure is the slope of a straight line over the
second half, after caches and the optimizer have what they need.
"""

from __future__ import annotations

import argparse
import gc
import os

import numpy as np
import psutil
import torch

from benchmarks.common import ROOT, table, write
from benchmarks.step_time import QUICK, argv

TOKENIZER = ROOT / "tests" / "golden" / "data" / "tokenizers" / "qwen2_fast"
MIB = 1 << 20


def lengths(count: int) -> list[list[tuple[int, int]]]:
    """Micro-batches of two samples with 0 to 3 tiles and 20 to 200 text tokens."""
    rng = np.random.default_rng(3)
    draw = lambda: (int(rng.integers(0, 4)), int(rng.integers(20, 200)))  # noqa: E731
    return [[draw(), draw()] for _ in range(count)]


def main() -> None:
    """Run, fit and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="500 steps")
    full = parser.parse_args().full
    steps = 500 if full else 60
    torch.set_num_threads(1)
    from benchmarks.trainer import Trainer

    trainer = Trainer(argv(QUICK, "pvtc", 2, TOKENIZER), lengths(37))
    process = psutil.Process(os.getpid())
    resident, objects = [], []
    for step in range(steps):
        trainer.step()
        resident.append(process.memory_info().rss / MIB)
        if step % 20 == 19:
            gc.collect()
            objects.append(len(gc.get_objects()))
    half = np.arange(steps // 2, steps)
    slope, _ = np.polyfit(half, np.array(resident)[half], 1)
    rows = [["step", "resident MiB"]]
    rows += [[str(s + 1), f"{resident[s]:.1f}"] for s in np.linspace(0, steps - 1, 6).astype(int)]
    later = objects[len(objects) // 2 :]
    lines = [
        *table(rows),
        "",
        f"Second half: {slope * 1024:+.1f} KiB per step, "
        f"{max(resident) - resident[steps // 2]:+.1f} MiB over what was held at its start; Python objects "
        f"{later[0]:,} -> {later[-1]:,}.",
    ]
    name = "memory" if full else "memory-quick"
    write(
        name, f"Memory over {steps} steps", f"python -m benchmarks.memory{' --full' if full else ''}", lines
    )


if __name__ == "__main__":
    main()
