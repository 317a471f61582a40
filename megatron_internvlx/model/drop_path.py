"""Stochastic depth that stays the same on every tensor-parallel rank."""

from __future__ import annotations

from contextlib import nullcontext

from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from torch import Tensor


def drop_path(branch: Tensor, rate: float) -> Tensor:
    """Zero whole entries of dim 0 with probability `rate`; scale the kept ones by 1/(1-rate).

    The mask is drawn from Megatron's data-parallel generator: the branch is replicated over the
    tensor-parallel group, and inside a sequence-parallel decoder the default generator is not.
    """
    if rate == 0.0:
        return branch
    keep = 1.0 - rate
    tracker = get_cuda_rng_tracker()
    name = get_data_parallel_rng_tracker_name()
    with tracker.fork(name) if name in tracker.get_states() else nullcontext():
        mask = branch.new_empty((branch.shape[0],) + (1,) * (branch.dim() - 1)).bernoulli_(keep)
    return branch * mask.div_(keep)
