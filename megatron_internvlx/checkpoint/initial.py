"""Initial values of tensors that are made anew, the same for a seed and a tensor's name in every layout."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def named_generator(seed: int, name: str) -> torch.Generator:
    """Generator of the random numbers of one tensor."""
    # torch's generator looks at 32 bits of a seed only.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def initial_matrix(shape: Sequence[int], seed: int, name: str) -> Tensor:
    """Matrix, or several, uniform within 1/sqrt(columns), as `torch.nn.Linear` draws it."""
    bound = shape[-1] ** -0.5
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=named_generator(seed, name))
