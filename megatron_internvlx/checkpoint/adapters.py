"""Adapters (LoRA) as tensors: what they add to a weight, and the same adapter in Hugging Face names.

Shapes: rows and `in` the sides of our weight, n Hugging Face projections that it fuses (queries, keys and values 3,
gate and up 2, else 1), r rank. An adapter is lora_a [n, r, in] and lora_b [rows, r], with rows in Megatron's order:
row j of projection i gets scale * lora_b[j] . (lora_a[i] x).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.initial import initial_matrix
from megatron_internvlx.checkpoint.mapping import Entry
from megatron_internvlx.checkpoint.ops import GateUp, Op, Same, SplitQKV
from megatron_internvlx.lora_settings import target_of
from megatron_internvlx.model.sizes import ModelSizes

Pair = tuple[Tensor, Tensor]
"""A [r, in] and B [rows, r] of one Hugging Face module."""


def target_of_weight(ours: str) -> str | None:
    """Name in --lora-targets of the adapters on one of our weights; None for tensors that have none."""
    return target_of(ours.removesuffix(".weight")) if ours.endswith(".weight") else None


@dataclass(frozen=True)
class AdaptedWeight:
    """One of our weights that has an adapter."""

    entry: Entry
    widths: tuple[int, ...]
    """Rows of each of the n projections."""
    order: Op
    """Conversion of the projections, one after the other, to the order of our rows."""

    @property
    def module(self) -> str:
        """Full name of the linear layer."""
        return self.entry.ours.removesuffix(".weight")

    @property
    def names(self) -> tuple[str, str]:
        """Full names of lora_a and lora_b."""
        return f"{self.module}.adapter.lora_a", f"{self.module}.adapter.lora_b"

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of lora_a and lora_b."""
        return (len(self.widths), rank, self.entry.shapes[0][1]), (sum(self.widths), rank)

    def projections(self) -> Tensor:
        """[rows] Number of the projection of each of our rows."""
        return self.order.to_ours([torch.full((width,), i) for i, width in enumerate(self.widths)])

    def blocks(self, lora_b: Tensor) -> Tensor:
        """[rows, r] -> [rows, n*r]: each row in the columns of its projection, zeros elsewhere."""
        count = len(self.widths)
        if count == 1:
            return lora_b
        spread = lora_b.new_zeros(len(lora_b), count, lora_b.shape[1])
        spread[torch.arange(len(lora_b)), self.projections()] = lora_b
        return spread.flatten(1)

    def change(self, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
        """[rows, in] Change of the weight by the adapter, in fp32."""
        return scale * (self.blocks(lora_b.float()) @ lora_a.float().flatten(0, 1))

    def to_theirs(self, lora_a: Tensor, lora_b: Tensor) -> list[Pair]:
        """Adapters of the Hugging Face modules, in the entry's order.

        A module that fuses n projections, such as InternLM2's wqkv, gets one of rank n*r.
        """
        if len(self.entry.theirs) == len(self.widths):
            return list(zip(lora_a, self.entry.op.to_theirs(lora_b), strict=True))
        (b,) = self.entry.op.to_theirs(self.blocks(lora_b))
        return [(lora_a.flatten(0, 1), b)]

    def from_theirs(self, pairs: Sequence[Pair | None], rank: int, seed: int) -> Pair:
        """Create (lora_a, lora_b) from adapters of the Hugging Face modules, in the entry's order; None: it has none.

        A projection without an adapter gets one that adds zero, with an A drawn from the seed and the name, so that
        training starts from there. A module that fuses n projections may have rank r, which all of them then share,
        or n*r with zeros wherever a row meets another projection's A. The result is in fp32. Raises ConversionError for
        other ranks.
        """
        (count, _, width), (rows, _) = self.shapes(rank)
        if len(pairs) == count:
            drawn = self._initial_a(rank, seed)
            a = torch.stack([drawn[i] if pair is None else pair[0].float() for i, pair in enumerate(pairs)])
            parts = [
                torch.zeros(w, rank) if pair is None else pair[1].float()
                for w, pair in zip(self.widths, pairs, strict=True)
            ]
            return a, self.entry.op.to_ours(parts)
        (pair,) = pairs
        if pair is None:
            return self._initial_a(rank, seed), torch.zeros(rows, rank)
        b = self.entry.op.to_ours([pair[1].float()])
        if b.shape[1] == rank:
            return pair[0].float().expand(count, rank, width).contiguous(), b
        return pair[0].float().view(count, rank, width), self._from_blocks(b, rank)

    def _from_blocks(self, spread: Tensor, rank: int) -> Tensor:
        """[rows, n*r] -> [rows, r]. Raises ConversionError if a row is not zero outside its own columns."""
        own = spread.view(len(spread), len(self.widths), rank)[torch.arange(len(spread)), self.projections()]
        if not torch.equal(self.blocks(own), spread):
            raise ConversionError(
                f"{self.entry.theirs[0]}: its adapter has rank {spread.shape[1]}, the others {rank}, and is not one of "
                f"{len(self.widths)} projections of rank {rank} each; use the same rank on all modules"
            )
        return own

    def _initial_a(self, rank: int, seed: int) -> Tensor:
        return initial_matrix(self.shapes(rank)[0], seed, self.names[0])


def adapted_weights(
    sizes: ModelSizes, entries: Iterable[Entry], targets: Iterable[str]
) -> list[AdaptedWeight]:
    """Weights of a table that have an adapter under these --lora-targets, in its order."""
    chosen = set(targets)
    return [_adapted(sizes, entry) for entry in entries if target_of_weight(entry.ours) in chosen]


def _adapted(sizes: ModelSizes, entry: Entry) -> AdaptedWeight:
    rows = sum(shape[0] for shape in entry.shapes)
    decoder = entry.ours.startswith("language_model.") and not entry.is_projector
    if entry.ours.endswith(".linear_qkv.weight"):
        if decoder:
            widths: tuple[int, ...] = (sizes.query_width, sizes.key_width, sizes.key_width)
            return AdaptedWeight(entry, widths, SplitQKV(sizes.heads, sizes.kv_groups))
        heads = sizes.vision.num_heads
        return AdaptedWeight(entry, (rows // 3,) * 3, SplitQKV(heads, heads))
    if decoder and sizes.gated and entry.ours.endswith(".linear_fc1.weight"):
        return AdaptedWeight(entry, (rows // 2,) * 2, GateUp())
    return AdaptedWeight(entry, (rows,), Same())
