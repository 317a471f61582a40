"""A training step as one CUDA graph: forward and backward passes of all its micro-batches.

Megatron records its forward-backward function after a few steps and replays it. A graph repeats addresses, so
each step's micro-batches are copied into buffers that stay; it repeats no Python, so micro-batches are counted when
they are copied, and what the step is divided by is summed on the device (`gradients.WeightSum`). The optimizer,
and evaluation, run without a graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import megatron.training.training as training
from megatron.core.full_cuda_graph import FullCudaGraphWrapper

from megatron_internvlx.parallel.batch import MicroBatch
from megatron_internvlx.platform.cpu import set_attributes
from megatron_internvlx.training.step import ForwardStep


class BadNumbers(RuntimeError):
    """A step whose loss or gradient is not finite."""


class KeptBatches:
    """Buffers that the micro-batches of every step are copied into, in their order."""

    def __init__(self) -> None:
        self.batches: list[MicroBatch] = []

    def fill(self, iterator: Iterator[MicroBatch], step: ForwardStep, count: int) -> list[MicroBatch]:
        """The next `count` micro-batches, counted by `step`; the same objects in every call."""
        for number in range(count):
            batch = step.next_batch(iterator, counted=True)
            if number < len(self.batches):
                self.batches[number].overwrite(batch)
            else:
                self.batches.append(batch.kept())
        return self.batches[:count]


class StepGraph(FullCudaGraphWrapper):
    """Megatron's recording of the forward-backward function, given our micro-batches; evaluation runs as it is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept = KeptBatches()
        self._step: ForwardStep | None = None

    def data_read(
        self, data_iterator: Any, model: Any, training: bool, num_microbatches: int
    ) -> list[Iterator[MicroBatch]]:
        """Fill the buffers, and give the schedule an iterator over them."""
        iterator = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
        assert self._step is not None
        return [iter(self.kept.fill(iterator, self._step, num_microbatches))]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step's passes, recorded or replayed; reports as the schedule's, in tensors that the next step reuses."""
        if kwargs["forward_only"]:
            return self.forward_backward_func(*args, **kwargs)
        self._step = kwargs["forward_step_func"]
        return super().__call__(*args, **kwargs)


def stop_at_bad_numbers(train_step: Callable[..., tuple]) -> Callable[..., tuple]:
    """Megatron's train_step, which raises BadNumbers after a step whose loss or gradient norm is not finite.

    Megatron's own check reads every micro-batch's loss in the middle of the step, which no graph can. This one comes
    after the optimizer's step: the weights are spoilt by then, but no checkpoint is written of them. The norm is
    that of all ranks, so they stop together.
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
                f"step {step}: {', '.join(bad)}; nothing of this step is saved. Go on from the last checkpoint with a "
                "lower --lr or --clip-grad, or with --restart-data if the data is to blame"
            )
        return result

    return checked


def record_steps() -> None:
    """Let Megatron's loop use our graph and stop at bad numbers; for --cuda-graph-impl full_iteration."""
    if training.FullCudaGraphWrapper is not StepGraph:
        set_attributes(
            training, FullCudaGraphWrapper=StepGraph, train_step=stop_at_bad_numbers(training.train_step)
        )
