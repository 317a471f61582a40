"""What torch.compile compiles in each step of a short training on the CPU, with the functions that a GPU run compiles.

`python -m tests.compilations` prints the number of compilations after each step for every case, as JSON in the last
line of its errors. Its own process may compile, which the others switch off, with a backend that only traces;
TORCH_COMPILE_DISABLE must not be set.
"""

import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch

from megatron_internvlx.platform import cpu

COMPILE = torch.compile


def trace_only(model: Callable | None = None, **options: Any) -> Any:
    """`torch.compile` whose graphs run as they are traced."""
    return COMPILE(model, dynamic=options.get("dynamic"), backend="eager")


# Before anything of Megatron is imported: its functions are wrapped when they are defined.
cpu.set_attributes(cpu, _disable_compilation=lambda: cpu.set_attributes(torch, compile=trace_only))
for name in ("bias_swiglu_fusion", "bias_dropout_fusion"):
    del cpu.ARGS_DEFAULTS[name]

from tests import layouts  # noqa: E402  # isort: skip  (sets Megatron up)
import megatron.training.training as training  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from megatron_internvlx.training.step import ForwardStep  # noqa: E402
from tests.layout_cases import STATIC  # noqa: E402

# One micro-batch a step, so that every step may have lengths of its own.
SETTINGS = ["--global-batch-size", "1", "--hidden-dropout", "0.1", "--num-layers", "3", "--expand-layer", "1"]
SETTINGS += ["no=--inject-layers"]
LOSS = ForwardStep.loss


def one_length_each() -> AbstractContextManager:
    """Planted: a compiled function that is good for one number of rows."""
    total = trace_only(lambda x: x.sum() / len(x), dynamic=False)

    def loss(self: ForwardStep, plan: Any, training: bool, output: torch.Tensor) -> Any:
        rows = output.new_ones(sum(plan.host.deep.segment_lengths))
        return LOSS(self, plan, training, output * total(rows))

    return mock.patch.object(ForwardStep, "loss", loss)


CASES: dict[str, tuple[list[str], int, Callable[[], AbstractContextManager]]] = {
    "variable": ([], 5, nullcontext),
    "static": (STATIC.split(), 3, nullcontext),
    "mistake": ([], 5, one_length_each),
}


def compilations(case: str) -> list[int]:
    """Functions compiled so far, after each step."""
    changes, steps, plant = CASES[case]
    seen: list[int] = []
    step = training.train_step

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        seen.append(counters["frames"]["ok"])
        return result

    with plant(), mock.patch.object(training, "train_step", counted):
        layouts.train([*SETTINGS, *changes, "--train-iters", str(steps)])
    return seen


def run(case: str) -> list[int]:
    """`compilations` with a process group of one rank."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return compilations(case)


def main() -> None:
    """Every case in a fork of its own: Megatron trains once per process."""
    context = multiprocessing.get_context("fork")
    found = {}
    for case in CASES:
        with ProcessPoolExecutor(1, mp_context=context) as process:
            found[case] = process.submit(run, case).result()
    print(json.dumps(found), file=sys.stderr)


if __name__ == "__main__":
    main()
