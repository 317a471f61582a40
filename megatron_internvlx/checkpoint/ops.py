"""The arithmetic between a Hugging Face tensor and ours: every class maps both ways, bit for bit.

Shapes: H heads, G key/value groups, D width of a head, x any trailing dimensions (a weight has one,
a bias none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Op(Protocol):
    """How the tensors of one table entry turn into one of ours, and back."""

    keeps_order: ClassVar[bool]
    """Ours begins with theirs, one after the other: their bytes can be copied as they are."""

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """Hugging Face tensors, in the entry's order, to our tensor."""

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """Our tensor to Hugging Face tensors, in the entry's order."""


@dataclass(frozen=True)
class Same:
    """The tensor as it is. InternLM2's wqkv too: per group [its queries ; k ; v], which is Megatron's order."""

    keeps_order: ClassVar[bool] = True

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """One tensor to the same tensor."""
        return parts[0]

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """The reverse."""
        return [ours]


@dataclass(frozen=True)
class Rows:
    """The first `count` rows: a vocabulary without the padding that a layout may have added."""

    keeps_order: ClassVar[bool] = True

    count: int

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """Checkpoints hold no padding; Megatron adds it when it loads."""
        return parts[0]

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """[padded, x] -> [count, x]."""
        return [ours[: self.count]]


@dataclass(frozen=True)
class VisionQKV:
    """InternViT's fused rows `[3][H][D]`, Megatron's `[H][3][D]`."""

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
    """Separate q, k and v, against Megatron's rows per group: [H/G queries ; k ; v], each of D rows."""

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
    """Separate gate and up projections, against one matrix [gate ; up]."""

    keeps_order: ClassVar[bool] = True

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """gate [f, h], up [f, h] -> [2f, h]."""
        return torch.cat(parts)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """The reverse."""
        return list(ours.chunk(2))


def our_shape(shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Shape of our tensor, from the shapes of theirs: every operation only puts rows in another order."""
    first = shapes[0]
    return (sum(shape[0] for shape in shapes), *first[1:]) if first else first
