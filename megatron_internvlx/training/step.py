"""One forward step: micro-batch -> stage output, and the loss with its weights.

The gradient of a global batch is sum(weight * loss) / sum(weight), over all micro-batches and data-parallel
ranks. Whatever number of supervised tokens n a sample has, it weighs

    token   n      sample   1      square   sqrt(n)

in all, and each of its tokens an n-th of that. With `average` "micro-batch" every micro-batch weighs 1 instead,
shared out in the same proportions: the mean of the means of micro-batches, as InternVL's trainer has it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_internvlx.data.plan import FILLER, SequencePlan
from megatron_internvlx.parallel.batch import MicroBatch
from megatron_internvlx.planning.metrics import StepMeter
from megatron_internvlx.platform.transfer import to_device
from megatron_internvlx.training.gradients import WeightSum


@dataclass
class Counters:
    """What a rank has seen of training micro-batches since the last log line."""

    rows: int = 0
    """Deep rows, padding included."""
    padding: int = 0
    tiles: int = 0
    data_wait: float = 0.0
    """Seconds spent waiting for micro-batches."""


def sample_weight(answer_tokens: np.ndarray, weighting: str) -> np.ndarray:
    """Weight of a sample with so many supervised tokens: float64, same shape."""
    if weighting == "token":
        return answer_tokens.astype(np.float64)
    if weighting == "sample":
        return np.ones(answer_tokens.shape)
    if weighting == "square":
        return np.sqrt(answer_tokens)
    raise ValueError(f"unknown loss weighting {weighting!r}: token, sample or square")


def loss_weights(plan: SequencePlan, weighting: str, average: str = "global") -> tuple[np.ndarray, float]:
    """Weight of each supervised row [n] (fp32), and their sum before rounding."""
    if not len(plan.sample_of_loss_row):
        return np.zeros(0, np.float32), 0.0
    samples, counts = np.unique(plan.sample_of_loss_row, return_counts=True)
    totals = sample_weight(counts, weighting)
    totals[plan.sample_ids[samples] == FILLER] = 0
    total = float(totals.sum())
    if average == "micro-batch" and total:
        totals, total = totals / total, 1.0
    per_token = (totals / counts).astype(np.float32)
    return per_token[np.searchsorted(samples, plan.sample_of_loss_row)], total


def answers_right(plan: SequencePlan, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Per answer span, whether every token was predicted, and whether it counts (a filler's does not).

    Both 0 or 1, fp32 [answers]; an answer that does not count is not right.
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
        weighting: token, sample or square.
        average: global or micro-batch.
        on_answers: called on the last stage in evaluation with (plan, predicted ids [n]).
    """

    def __init__(self, weighting: str, average: str = "global", on_answers=None) -> None:
        self.weighting, self.average, self.on_answers = weighting, average, on_answers
        self.weights = WeightSum()
        """Of the training micro-batches since the last optimizer step; for `gradients.finalize_hook`."""
        self.counters = Counters()
        self.meter: StepMeter | None = None
        """Counts the floating-point work of training micro-batches, if set."""
        self.passes = 0
        """Forward passes begun."""
        self.doing = "starting"
        """What this rank does, for those who wait for it."""
        self._first_chunk: object = None

    def take(self) -> Counters:
        """Counters since the last call, which start anew."""
        taken, self.counters = self.counters, Counters()
        return taken

    def __call__(self, data_iterator: Iterator[MicroBatch], model):
        """Run one stage on the next micro-batch: (output, loss function)."""
        start = time.perf_counter()
        self.passes += 1
        self.doing = "waiting for data"
        batch = next(data_iterator)
        self.doing = "computing or exchanging tensors"
        wait = time.perf_counter() - start
        # With virtual pipeline stages, every chunk of this rank sees each micro-batch once.
        self._first_chunk = self._first_chunk or model
        if model.training and model is self._first_chunk:
            self._count(batch.plan.host, wait)
        return model(batch), partial(self.loss, batch.plan.host, model.training)

    def _count(self, plan: SequencePlan, wait: float) -> None:
        counters = self.counters
        counters.rows += plan.deep.length
        counters.padding += plan.deep.length - sum(plan.deep.segment_lengths[: len(plan.sample_ids)])
        counters.tiles += plan.num_tiles
        counters.data_wait += wait
        if self.meter is not None:
            self.meter.add(plan)

    def loss(self, plan: SequencePlan, training: bool, output: Tensor):
        """Weighted loss sum, how many tokens it is of, and what to report (each [sum, weight]).

        Megatron adds up the second in an integer. The gradients are divided by `weights` instead.
        """
        weights, total = loss_weights(plan, self.weighting, self.average)
        losses = output if training else output[0]
        weighted = (losses.float() * to_device(torch.from_numpy(weights))).sum()
        tokens = torch.tensor(len(weights), dtype=torch.int, device=losses.device)
        weight = torch.tensor(total, dtype=weighted.dtype, device=losses.device)
        report = {"loss": torch.stack([weighted.detach(), weight])}
        if training:
            self.weights.add(total)
        else:
            predicted = output[1].to(torch.int32)
            right, asked = answers_right(plan, predicted)
            report["accuracy"] = torch.stack([right.sum(), asked.sum()])
            if self.on_answers is not None:
                self.on_answers(plan, predicted)
        return weighted, tokens, report
