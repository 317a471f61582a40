"""Memory over many steps, which must not grow, and its peak beside what the dry run predicts.

    python -m benchmarks.memory            # quick: 60 steps
    python -m benchmarks.memory --full     # 500 steps; exits with 1 if memory grew

Growth: a small model on CPU with packed micro-batches of changing lengths (the allocator meets new sizes all the
time), resident memory after each step; the last fifth may hold at most 1 % more than the fifth before.
Peak: the model of `benchmarks.step_time --full`, its process's high-water mark over what it held before the model
was built; the dry run's figures are weights, gradients, optimizer and what autograd keeps, without workspaces.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.common import ROOT, table, write
from benchmarks.step_time import EQUAL, FULL, QUICK, argv

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # resident memory of processes on CPU, also where there is a GPU
TOKENIZER = ROOT / "tests" / "golden" / "data" / "tokenizers" / "qwen2_fast"
MIB = 1 << 20


def lengths(count: int) -> list[list[tuple[int, int]]]:
    """Micro-batches of two samples with 0 to 3 tiles and 20 to 200 text tokens."""
    rng = np.random.default_rng(3)
    draw = lambda: (int(rng.integers(0, 4)), int(rng.integers(20, 200)))  # noqa: E731
    return [[draw(), draw()] for _ in range(count)]


def peak() -> tuple[float, dict[str, float]]:
    """In a process of its own: (measured, predicted by part) MiB of three steps of the larger model."""
    torch.set_num_threads(1)
    from benchmarks.trainer import Trainer, plan_settings, tokens_of
    from megatron_internvlx.data.plan import build_plan
    from megatron_internvlx.planning import dryrun
    from megatron_internvlx.planning.activations import rank_activations
    from megatron_internvlx.planning.flops import PlanStats

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = psutil.Process().memory_info().rss / MIB
    trainer = Trainer(argv(FULL, "pvtc", len(EQUAL[0]), TOKENIZER), EQUAL)
    for _ in range(3):
        trainer.step()
    highest = _high_water() - before
    args, checked = trainer.args, dryrun.check(trainer.args)
    settings = plan_settings(args)
    plan = build_plan(*tokens_of(EQUAL[0], settings.high_grid**2, args.vocab_size), settings)
    one = checked.model.layout.schedule(1)
    parts, working, _ = rank_activations(checked.model, 0, PlanStats.of(plan, padded=True), one)
    state = checked.stages[0].state
    predicted = {
        "weights": state.weights,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "activations": sum(parts.values()) + working,
    }
    return highest, {name: size / MIB for name, size in predicted.items()}


def _high_water() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Run, compare and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="500 steps")
    full = parser.parse_args().full
    steps = 500 if full else 60
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        highest, predicted = pool.submit(peak).result()
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
    fifth = steps // 5
    last, before = np.mean(resident[-fifth:]), np.mean(resident[-2 * fifth : -fifth])
    rows = [["step", "resident MiB"]]
    rows += [[str(s + 1), f"{resident[s]:.1f}"] for s in np.linspace(0, steps - 1, 6).astype(int)]
    later = objects[len(objects) // 2 :]
    lines = [
        *table(rows),
        "",
        f"Mean of the last {fifth} steps {last:.1f} MiB, of the {fifth} before {before:.1f}: "
        f"{last / before - 1:+.2%}. Python objects in the second half {later[0]:,} -> {later[-1]:,}.",
        "",
        "Peak of the larger model, MiB: measured "
        f"{highest:.0f}, predicted {sum(predicted.values()):.0f} ("
        + ", ".join(f"{name} {size:.0f}" for name, size in predicted.items())
        + f"); measured / predicted {highest / sum(predicted.values()):.2f}.",
    ]
    name = "memory" if full else "memory-quick"
    write(
        name, f"Memory over {steps} steps", f"python -m benchmarks.memory{' --full' if full else ''}", lines
    )
    if full and last > 1.01 * before:
        sys.exit(f"memory grew by {last / before - 1:.2%} within the last {2 * fifth} steps")


if __name__ == "__main__":
    main()
