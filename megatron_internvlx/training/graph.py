"""A training step as one CUDA graph: forward and backward passes of all its micro-batches.

Megatron records its forward-backward function after a few steps and replays it. A graph reads the same addresses
each time, so each step's micro-batches are copied into fixed buffers. It runs no Python, so micro-batches are counted
when they are copied, and the divisor of the gradients is summed on the device (`gradients.WeightSum`). The optimizer
and the evaluation run without a graph. The first replay is compared with the step without the graph (`replay.py`).
"""

from __future__ import annotations

import atexit
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.training.utils import print_rank_0

from megatron_internvlx import platform
from megatron_internvlx.megatron_settings import Execution
from megatron_internvlx.parallel.batch import MicroBatch
from megatron_internvlx.platform.cuda import replace_step
from megatron_internvlx.precision import Precision
from megatron_internvlx.training.replay import REMEDY, FirstReplay, GraphDiffers, compared, gather_again
from megatron_internvlx.training.step import ForwardStep


class BadNumbers(RuntimeError):
    """Loss or gradient of a step that is not finite."""


class BatchBuffers:
    """Fixed buffers into which the micro-batches of every step are copied, in their order."""

    def __init__(self) -> None:
        self.batches: list[MicroBatch] = []

    def fill(self, incoming: Iterable[MicroBatch]) -> None:
        """Copy a step's micro-batches into the buffers, always the same objects."""
        for number, batch in enumerate(incoming):
            if number < len(self.batches):
                self.batches[number].overwrite(batch)
            else:
                self.batches.append(batch.clone())


class StepGraph(FullCudaGraphWrapper):
    """Megatron's recorder of the forward-backward function, for our micro-batches; evaluation is not recorded."""

    first_replay = FirstReplay()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.buffers = BatchBuffers()
        self.difference: float | None = None
        """Largest relative difference of the first replay from the step without a graph."""

    def data_read(
        self, data_iterator: Any, model: Any, training: bool, num_microbatches: int
    ) -> list[Iterator[MicroBatch]]:
        """Return the schedule's iterator over the buffers, which `__call__` has filled."""
        return [iter(self.buffers.batches)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record or replay one step; returns the schedule's reports, in tensors that the next step overwrites."""
        if kwargs["forward_only"]:
            return self.forward_backward_func(*args, **kwargs)
        incoming = _taken(kwargs["data_iterator"], kwargs["forward_step_func"], kwargs["num_microbatches"])
        if self.curr_iter("training") == self.cuda_graph_warmup_steps:
            return self._record([batch.clone() for batch in incoming], kwargs)
        self.buffers.fill(incoming)
        return super().__call__(*args, **kwargs)

    def _record(self, incoming: list[MicroBatch], kwargs: dict[str, Any]) -> Any:
        """Record the graph and replay it on these micro-batches; returns the replay's reports."""
        run = functools.partial(super().__call__, **kwargs)
        gather_again(kwargs["model"])
        try:
            if self.first_replay.skipped is None:
                reports, self.difference = self._compared(incoming, kwargs, run)
            else:
                self.buffers.fill(incoming)
                reports = run()
                platform.synchronize()  # errors of kernels are raised late
        except GraphDiffers:
            raise
        except Exception as error:
            error.add_note(f"while a CUDA graph of the step was recorded and replayed; {REMEDY}")
            raise
        result = self.first_replay.describe(self.difference)
        print_rank_0(f"CUDA graph of {len(incoming)} micro-batches recorded; {result}")
        return reports

    def _compared(
        self, incoming: list[MicroBatch], kwargs: dict[str, Any], run: Callable[[], Any]
    ) -> tuple[Any, float]:
        """Record from the step before, whose micro-batches are in the buffers, and replay with these."""

        def plain() -> Any:
            return self.forward_backward_func(**kwargs | {"data_iterator": [iter(incoming)]})

        def replay() -> Any:
            self.buffers.fill(incoming)
            reports = run()
            kwargs["forward_step_func"].doing = f"waiting for the first replay of a CUDA graph; {REMEDY}"
            return reports

        return compared(self.first_replay, kwargs["model"], plain, run, replay)


def _taken(data_iterator: Any, step: ForwardStep, count: int) -> Iterator[MicroBatch]:
    """Take the next `count` micro-batches, which `step` counts."""
    iterator = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
    for _ in range(count):
        yield step.next_batch(iterator, counted=True)


def stop_at_bad_numbers(train_step: Callable[..., tuple]) -> Callable[..., tuple]:
    """Wrap Megatron's train_step: BadNumbers is raised after a step whose loss or gradient norm is not finite.

    Megatron's own check reads every micro-batch's loss in the middle of the step, which a graph cannot do. This one
    runs after the optimizer's step: the weights are invalid by then, but no checkpoint of them is written. The norm
    is the one of all ranks, so they stop together.
    """

    @functools.wraps(train_step)
    def checked(*args: Any, **kwargs: Any) -> tuple:
        result = train_step(*args, **kwargs)
        losses, norm = result[0], result[5]
        values = {name: float(value) for name, value in losses.items()} | {"gradient norm": norm}
        bad = [
            f"{name} {value}"
            for name, value in values.items()
            if value is not None and not math.isfinite(value)
        ]
        if bad:
            step = kwargs["iteration"] + 1
            raise BadNumbers(
                f"step {step}: {', '.join(bad)}; nothing of this step is saved. Resume from the last checkpoint with a "
                "lower --lr or --clip-grad, or with --restart-data if the data are the cause"
            )
        return result

    return checked


def record_steps(execution: Execution, precision: Precision) -> None:
    """Make Megatron's loop use our graph and stop at bad numbers, where steps are to be recorded."""
    if execution.cuda_graph_impl == "none":
        return
    StepGraph.first_replay = FirstReplay.of(execution, precision)
    # Buffers that NCCL registers for a graph end in illegal accesses with expandable segments (Megatron refuses the
    # pair for its other graphs), and have hung several nodes without. NCCL reads it when its first group is made.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    atexit.unregister(release_graph)
    atexit.register(release_graph)
    replace_step(StepGraph, stop_at_bad_numbers)


def release_graph() -> None:
    """Destroy the recorded graph: NCCL waits at the end of a process for every graph that holds its kernels."""
    graphs = FullCudaGraphWrapper.cuda_graph
    recorded, graphs["training"] = graphs["training"], None
    if recorded is not None:
        with suppress(RuntimeError):  # after an error of CUDA nothing can be destroyed
            recorded.reset()
