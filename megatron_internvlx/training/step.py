"""One forward step: from a micro-batch to the stage's output, and the loss with its weights.

The gradient of a global batch is sum(weight * loss) / sum(weight), over all micro-batches and data-parallel
ranks; the weights come with the micro-batches (`data/loss_weights.py`). In training, after a micro-batch is received,
nothing here reads its numbers on the host, so that one CUDA graph of the step is valid for all micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_internvlx.data.plan import FILLER, SequencePlan
from megatron_internvlx.parallel.batch import MicroBatch
from megatron_internvlx.parallel.device_plan import DevicePlan
from megatron_internvlx.planning.metrics import StepMeter
from megatron_internvlx.platform.transfer import to_device
from megatron_internvlx.training.gradients import WeightSum


@dataclass
class Counters:
    """Counts of a rank's training micro-batches since the last log line."""

    rows: int = 0
    """Deep rows, padding included."""
    padding: int = 0
    """Deep rows that belong to no sample."""
    tiles: int = 0
    """Tiles of images."""
    data_wait: float = 0.0
    """Seconds spent waiting for micro-batches."""


def correct_answers(plan: SequencePlan, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Whether every token of an answer was predicted, and whether the answer counts (that of a filler does not).

    Both fp32 [answers], 0 or 1; an answer that does not count is not correct.
    """
    wrong = (predicted != to_device(torch.from_numpy(plan.targets))).to(torch.float32)
    answers = int(plan.answer_ids[-1]) + 1 if len(plan.answer_ids) else 0
    misses = torch.zeros(answers, device=wrong.device)
    misses.index_add_(0, to_device(torch.from_numpy(plan.answer_ids)), wrong)
    real = np.zeros(answers, np.float32)
    real[plan.answer_ids] = plan.sample_ids[plan.sample_of_loss_row] != FILLER
    asked = to_device(torch.from_numpy(real))
    return (misses == 0) * asked, asked


class ForwardStep:
    """Megatron's `forward_step_func`.

    Args:
        on_answers: function that is called on the last stage in evaluation with (plan, predicted ids [n]).
    """

    def __init__(self, on_answers: Callable[[SequencePlan, Tensor], None] | None = None) -> None:
        self.on_answers = on_answers
        self.weights = WeightSum()
        """Loss weights of the micro-batches since the last optimizer step; for `gradients.finalize_hook`."""
        self.counters = Counters()
        self.meter: StepMeter | None = None
        """Meter of the floating-point operations of training micro-batches, if set."""
        self.passes = 0
        """Number of forward passes that have begun."""
        self.doing = "starting"
        """Present activity of this rank, for the report of a hung run."""
        self._first_chunk: object = None

    def take(self) -> Counters:
        """Return the counters since the last call, and reset them."""
        taken, self.counters = self.counters, Counters()
        return taken

    def __call__(self, data_iterator: Iterator[MicroBatch], model):
        """Run one stage on the next micro-batch, and return (output, loss function)."""
        # With virtual pipeline stages, every chunk of this rank sees each micro-batch once.
        self._first_chunk = self._first_chunk or model
        batch = self.next_batch(data_iterator, counted=model.training and model is self._first_chunk)
        return model(batch), partial(self.loss, batch.plan, model.training)

    def next_batch(self, data_iterator: Iterator[MicroBatch], *, counted: bool) -> MicroBatch:
        """Wait for the next micro-batch, and count it and the wait if it is `counted`."""
        start = time.perf_counter()
        self.passes += 1
        self.doing = "waiting for data"
        batch = next(data_iterator)
        self.doing = "computing or exchanging tensors"
        # The batches that a graph is recorded from were counted when their contents came.
        if counted and batch.plan.host is not None:
            self._count(batch.plan.host, time.perf_counter() - start)
        return batch

    def _count(self, plan: SequencePlan, wait: float) -> None:
        counters = self.counters
        counters.rows += plan.deep.length
        counters.padding += plan.deep.length - sum(plan.deep.segment_lengths[: len(plan.sample_ids)])
        counters.tiles += plan.num_tiles
        counters.data_wait += wait
        if self.meter is not None:
            self.meter.add(plan)

    def loss(self, plan: DevicePlan, training: bool, output: Tensor):
        """Weighted loss sum, number of its tokens, and values to report (each [sum, weight]).

        Megatron sums the second in an integer. The gradients are divided by `weights` instead.
        """
        losses = output if training else output[0]
        weighted = (losses.float() * plan.loss_weights).sum()
        report = {"loss": torch.stack([weighted.detach(), plan.total_weight[0].to(weighted.dtype)])}
        if training:
            self.weights.add(plan.total_weight)
        else:
            assert plan.host is not None, "evaluation is not recorded in a graph"
            predicted = output[1, : len(plan.host.targets)].to(torch.int32)
            correct, asked = correct_answers(plan.host, predicted)
            report["accuracy"] = torch.stack([correct.sum(), asked.sum()])
            if self.on_answers is not None:
                self.on_answers(plan.host, predicted)
        return weighted, plan.supervised[0], report
