"""Weight of each supervised token in the loss, from the plan of its micro-batch.

A sample with n supervised tokens has the total weight

    token   n      sample   1      square   sqrt(n)

and each of its tokens has an n-th of that. With `average` "micro-batch" every micro-batch has the total weight 1
instead, divided in the same proportions: the mean of the means of micro-batches, as in InternVL's trainer.
"""

from __future__ import annotations

import numpy as np

from megatron_internvlx.data.plan import FILLER, SequencePlan


def sample_weight(answer_tokens: np.ndarray, weighting: str) -> np.ndarray:
    """Weight of samples from their numbers of supervised tokens: float64, same shape."""
    if weighting == "token":
        return answer_tokens.astype(np.float64)
    if weighting == "sample":
        return np.ones(answer_tokens.shape)
    if weighting == "square":
        return np.sqrt(answer_tokens)
    raise ValueError(f"unknown loss weighting {weighting!r}: must be token, sample or square")


def loss_weights(
    plan: SequencePlan, weighting: str = "token", average: str = "global"
) -> tuple[np.ndarray, float]:
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
