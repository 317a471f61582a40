"""A training step as one CUDA graph: forward and backward passes of all its micro-batches.

Megatron records its forward-backward function after a few steps and replays it. A graph reads the same addresses
each time, so each step's micro-batches are copied into fixed buffers. It runs no Python, so micro-batches are counted
when they are copied, and the divisor of the gradients is summed on the device (`gradients.WeightSum`). The optimizer
and the evaluation run without a graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.full_cuda_graph import FullCudaGraphWrapper

from megatron_internvlx.parallel.batch import MicroBatch
from megatron_internvlx.platform.cuda import replace_step
from megatron_internvlx.training.step import ForwardStep


class BadNumbers(RuntimeError):
    """Loss or gradient of a step that is not finite."""


class BatchBuffers:
    """Fixed buffers into which the micro-batches of every step are copied, in their order."""

    def __init__(self) -> None:
        self.batches: list[MicroBatch] = []

    def fill(self, iterator: Iterator[MicroBatch], step: ForwardStep, count: int) -> list[MicroBatch]:
        """Copy the next `count` micro-batches, which `step` counts, into the buffers, always the same objects."""
        for number in range(count):
            batch = step.next_batch(iterator, counted=True)
            if number < len(self.batches):
                self.batches[number].overwrite(batch)
            else:
                self.batches.append(batch.clone())
        return self.batches[:count]


class StepGraph(FullCudaGraphWrapper):
    """Megatron's recorder of the forward-backward function, for our micro-batches; evaluation is not recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.buffers = BatchBuffers()
        self._step: ForwardStep | None = None

    def data_read(
        self, data_iterator: Any, model: Any, training: bool, num_microbatches: int
    ) -> list[Iterator[MicroBatch]]:
        """Fill the buffers, and return the schedule's iterator over them."""
        iterator = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
        assert self._step is not None
        return [iter(self.buffers.fill(iterator, self._step, num_microbatches))]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record or replay one step; returns the schedule's reports, in tensors that the next step overwrites."""
        if kwargs["forward_only"]:
            return self.forward_backward_func(*args, **kwargs)
        self._step = kwargs["forward_step_func"]
        return super().__call__(*args, **kwargs)


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


def record_steps() -> None:
    """Make Megatron's loop use our graph and stop at bad numbers; for --cuda-graph-impl full_iteration."""
    replace_step(StepGraph, stop_at_bad_numbers)
