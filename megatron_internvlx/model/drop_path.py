"""Stochastic depth that stays the same on every tensor-parallel rank."""

from __future__ import annotations

from contextlib import nullcontext

from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from torch import Tensor


def draw_kept_entries(branch: Tensor, keep_rate: float) -> Tensor:
    """Draw 1 with probability `keep_rate`, else 0, for every entry of dim 0 of `branch`: `[N, 1, ...]`.

    The generator is Megatron's data-parallel one: the branch is replicated over the tensor-parallel group, and
    inside a sequence-parallel decoder the default generator is not.
    """
    tracker = get_cuda_rng_tracker()
    name = get_data_parallel_rng_tracker_name()
    with tracker.fork(name) if name in tracker.get_states() else nullcontext():
        return branch.new_empty((branch.shape[0],) + (1,) * (branch.dim() - 1)).bernoulli_(keep_rate)
