"""Conversions between Hugging Face tensors and ours, bit for bit; every class has both directions.

Shapes: H heads, G key/value groups, D width of a head, x any trailing dimensions (a weight has one,
a bias none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Op(Protocol):
    """Conversion of the tensors of one table entry to one of ours, and back."""

    keeps_order: ClassVar[bool]
    """Whether our tensor begins with theirs one after the other, so that bytes can be copied."""

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """Convert Hugging Face tensors, in the entry's order, to our tensor."""

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """Convert our tensor to Hugging Face tensors, in the entry's order."""


@dataclass(frozen=True)
class Same:
    """Identity, also for InternLM2's wqkv: [queries ; k ; v] per group is Megatron's order."""

    keeps_order: ClassVar[bool] = True

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """Return the single tensor unchanged."""
        return parts[0]

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """The reverse."""
        return [ours]


@dataclass(frozen=True)
class Rows:
    """The first `count` rows: a vocabulary without the padding of the training layout."""

    keeps_order: ClassVar[bool] = True

    count: int

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """Return the tensor unchanged; Megatron adds the padding when it loads."""
        return parts[0]

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """[padded, x] -> [count, x]."""
        return [ours[: self.count]]


@dataclass(frozen=True)
class VisionQKV:
    """InternViT's fused rows `[3][H][D]` and Megatron's `[H][3][D]`."""

    keeps_order: ClassVar[bool] = False

    heads: int

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """[3*H*D, x] in released order -> [3*H*D, x] in ours."""
        return parts[0].unflatten(0, (3, self.heads, -1)).transpose(0, 1).reshape(parts[0].shape)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """The reverse."""
        return [ours.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).reshape(ours.shape)]


@dataclass(frozen=True)
class SplitQKV:
    """Separate q, k and v, and Megatron's rows per group: [H/G queries ; k ; v], each of D rows."""

    keeps_order: ClassVar[bool] = False

    heads: int
    groups: int

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """q [H*D, x], k and v [G*D, x] -> [(H+2G)*D, x]."""
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """The reverse."""
        per_group = self.heads // self.groups
        grouped = ours.unflatten(0, (self.groups, per_group + 2, -1))
        q, k, v = grouped.split([per_group, 1, 1], dim=1)
        return [part.flatten(0, 2) for part in (q, k, v)]


@dataclass(frozen=True)
class GateUp:
    """Separate gate and up projections, and one matrix [gate ; up]."""

    keeps_order: ClassVar[bool] = True

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """gate [f, h], up [f, h] -> [2f, h]."""
        return torch.cat(parts)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """The reverse."""
        return list(ours.chunk(2))


def our_shape(shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Shape of our tensor, from the shapes of theirs: every conversion only reorders rows."""
    first = shapes[0]
    return (sum(shape[0] for shape in shapes), *first[1:]) if first else first
