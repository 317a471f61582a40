"""A micro-batch's plan on its rank's device.

Every value of a plan that a stage reads is a tensor here, or the same for all plans of a run with static boundaries.
With static boundaries only the contents of tensors therefore depend on the samples, from the receipt of a micro-batch
to the end of its backward pass, and one CUDA graph is valid for all of them. Every index map is then padded to its
budget; padding rows and tiles are computed with weight 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_internvlx.data.loss_weights import loss_weights
from megatron_internvlx.data.plan import PhasePlan, SequencePlan
from megatron_internvlx.platform.transfer import to_device

Weigh = Callable[[SequencePlan], tuple[np.ndarray, float]]
"""Plan -> weight of each supervised row [n] (fp32), and their sum before rounding."""


@dataclass(frozen=True)
class DevicePhase:
    """One phase of the plan: index maps on the device."""

    length: int
    max_seqlen: int
    segment_lengths: tuple[int, ...] | None
    """Rows of each segment, on the host, for attention without kernels for packs; None in static mode."""
    used: Tensor
    """[1] number of rows of samples; the others are padding."""
    whole: Tensor
    """[2] 0 and `length`: the phase as one segment."""
    cu_seqlens: Tensor
    position_ids: Tensor
    visual_rows: Tensor
    """[encoded tiles * g*g] row of every visual token; those of blank tiles are spread over the phase."""


@dataclass(frozen=True)
class DevicePlan:
    """A SequencePlan whose index maps are device tensors; see data/plan.py for the fields."""

    tile_capacity: int
    encoded_tiles: int
    lvtc: bool
    total_weight: Tensor
    """[1] fp64 sum of the loss weights, by which gradients are divided in the end."""
    supervised: Tensor
    """[1] int32 number of supervised rows."""
    real_tiles: Tensor
    """[encoded tiles] 1 for a tile of an image, 0 for a blank one, fp32."""
    merge_index: Tensor
    tokens: Tensor
    loss_rows: Tensor
    """[n] deep rows that reach the output layer; padding is spread over the phase."""
    targets: Tensor
    """[n] 0 for padding."""
    loss_weights: Tensor
    """[n] fp32, 0 for padding."""
    shallow: DevicePhase
    deep: DevicePhase
    expand_index: Tensor | None
    flat: Tensor
    """Memory of all these tensors, int32."""
    host: SequencePlan | None
    """Plan on the host, for counts and reports; None in a graph, which is valid for any plan."""

    @property
    def entry(self) -> DevicePhase:
        """Phase of layer 0."""
        return self.shallow if self.lvtc else self.deep

    def clone(self) -> DevicePlan:
        """Copy the tensors into a new buffer, which other plans may overwrite."""
        assert self.host is not None and self.host.fixed, "plans of a run without static boundaries differ"
        return replace(_Views(self.flat.clone()).plan(self.host), host=None)


def device_plan(plan: SequencePlan, weigh: Weigh = loss_weights) -> DevicePlan:
    """Move a plan's index maps and the weights of its loss rows to the device in one copy."""
    return _Views(to_device(torch.from_numpy(_flatten(plan, weigh)))).plan(plan)


def _flatten(plan: SequencePlan, weigh: Weigh) -> np.ndarray:
    """Concatenate the arrays that `_Views.plan` cuts out again: int32 [words]."""
    weights, total = weigh(plan)
    rows, tiles = plan.supervised_capacity, plan.encoded_tiles
    real = (np.arange(tiles) < plan.num_tiles).astype(np.float32)
    arrays = [
        np.asarray([total], np.float64).view(np.int32),
        np.asarray([len(plan.loss_rows)], np.int32),
        real.view(np.int32),
        plan.merge_index,
        plan.tokens,
        _spread(plan.loss_rows, rows, plan.deep.length),
        _zeros_after(plan.targets, rows),
        _zeros_after(weights.astype(np.float32).view(np.int32), rows),
    ]
    for phase in _phases(plan):
        used = sum(phase.segment_lengths[: len(plan.sample_ids)])
        arrays += [np.asarray([used, 0, phase.length], np.int32), phase.cu_seqlens, phase.position_ids]
        arrays.append(_spread(phase.visual_rows, tiles * _cells(plan, phase), phase.length))
    if plan.expand_index is not None:
        arrays.append(plan.expand_index)
    return np.concatenate(arrays)


class _Views:
    """Tensors cut from the flat buffer, in the order of `_flatten`."""

    def __init__(self, flat: Tensor) -> None:
        self.flat, self.at = flat, 0

    def _next(self, words: int, dtype: torch.dtype = torch.int32) -> Tensor:
        self.at += words
        return self.flat[self.at - words : self.at].view(dtype)

    def plan(self, plan: SequencePlan) -> DevicePlan:
        """Cut out the tensors of a plan with these sizes."""
        rows, tiles = plan.supervised_capacity, plan.encoded_tiles
        total, supervised = self._next(2, torch.float64), self._next(1)
        real = self._next(tiles, torch.float32)
        merge, tokens = self._next(len(plan.merge_index)), self._next(len(plan.tokens))
        loss_rows, targets = self._next(rows), self._next(rows)
        weights = self._next(rows, torch.float32)
        phases = [self._phase(plan, phase) for phase in _phases(plan)]
        expand = None if plan.expand_index is None else self._next(len(plan.expand_index))
        assert self.at == len(self.flat), f"a plan of {self.at} words in a buffer of {len(self.flat)}"
        return DevicePlan(
            tile_capacity=plan.tile_capacity,
            encoded_tiles=tiles,
            lvtc=expand is not None,
            total_weight=total,
            supervised=supervised,
            real_tiles=real,
            merge_index=merge,
            tokens=tokens,
            loss_rows=loss_rows,
            targets=targets,
            loss_weights=weights,
            shallow=phases[0],
            deep=phases[-1],
            expand_index=expand,
            flat=self.flat,
            host=plan,
        )

    def _phase(self, plan: SequencePlan, phase: PhasePlan) -> DevicePhase:
        return DevicePhase(
            phase.length,
            phase.max_seqlen,
            None if plan.fixed else phase.segment_lengths,
            self._next(1),
            self._next(2),
            self._next(len(phase.cu_seqlens)),
            self._next(phase.length),
            self._next(plan.encoded_tiles * _cells(plan, phase)),
        )


def _phases(plan: SequencePlan) -> tuple[PhasePlan, ...]:
    return (plan.shallow, plan.deep) if plan.expand_index is not None else (plan.deep,)


def _cells(plan: SequencePlan, phase: PhasePlan) -> int:
    """Visual rows per tile."""
    return plan.low_cells if phase is plan.shallow else plan.high_cells


def _spread(rows: np.ndarray, size: int, length: int) -> np.ndarray:
    """Row numbers, then others: spread over the phase, because many additions to one row would wait for each other."""
    return np.concatenate([rows, np.arange(size - len(rows), dtype=np.int32) % length])


def _zeros_after(values: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([values, np.zeros(size - len(values), np.int32)])
