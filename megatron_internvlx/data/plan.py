"""SequencePlan: position of every row of a micro-batch, in both phases of the decoder.

The plan is host data (Python ints and numpy arrays), built with the samples. Every pipeline stage gets the same plan,
so lengths and index maps are never read back from a device.

Rows of a phase: the samples of the micro-batch one after another, then padding rows. A sample
holds text rows and, per tile, g*g visual rows (g = shallow or deep grid side).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
IGNORE = -100
FILLER = -1
"""Number of a sample that only fills a micro-batch: its tokens weigh nothing and nothing is reported of it."""


@dataclass(frozen=True)
class PlanSettings:
    """Sizes of the model and of the layout that a plan depends on."""

    low_grid: int
    """Token grid side per tile in the shallow phase; equal to high_grid when LVTC is off."""
    high_grid: int
    """Token grid side per tile in the deep phase."""
    lvtc: bool = True
    """Whether there is a shallow phase."""
    alignment: int = 1
    """Both phase lengths are padded to a multiple of this many rows."""
    tile_multiple: int = 1
    """Tiles per micro-batch are padded to a multiple of this with blank tiles."""
    shallow_length: int | None = None
    """Static mode: rows of the shallow phase, in tokens."""
    deep_length: int | None = None
    """Static mode: rows of the deep phase, in tokens."""
    tile_budget: int | None = None
    """Static mode: tiles per micro-batch."""
    sample_budget: int | None = None
    """Static mode: samples per micro-batch; needed where every tensor must have the same shape."""
    supervised_budget: int | None = None
    """Static mode: supervised tokens per micro-batch. None: as many as rows that enter layer 0."""


@dataclass(frozen=True)
class PhasePlan:
    """Rows of the decoder in one phase."""

    length: int
    """Rows, padding included."""
    segment_lengths: tuple[int, ...]
    """Rows per sample; the padding rows, if any, are a last segment of their own."""
    position_ids: Int32
    """[length] 0-based position inside the segment."""
    visual_rows: Int32
    """[tiles*g*g] row of every visual token, tile by tile, row-major inside a tile."""
    segment_capacity: int | None = None
    """Static mode: segments that `cu_seqlens` has room for, the padding's among them."""

    @property
    def cu_seqlens(self) -> Int32:
        """[segments+1] cumulative segment lengths, starting at 0; unused segments repeat the last one."""
        ends = np.concatenate([[0], np.cumsum(self.segment_lengths)]).astype(np.int32)
        return (
            ends if self.segment_capacity is None else _padded(ends, self.segment_capacity + 1, self.length)
        )

    @property
    def max_seqlen(self) -> int:
        """Longest segment, in rows; in static mode the longest that there can be."""
        return max(self.segment_lengths) if self.segment_capacity is None else self.length


@dataclass(frozen=True)
class SequencePlan:
    """Index maps of one micro-batch. All row numbers count from 0 in their own phase."""

    num_tiles: int
    """Tiles that some row refers to."""
    tile_capacity: int
    """Tiles the encoder runs on: num_tiles and blank ones. At least 1, so that a text-only
    micro-batch still gives every vision parameter its (zero) gradient."""
    shallow: PhasePlan
    deep: PhasePlan
    merge_index: Int32
    """[entry length] rows that enter layer 0, taken from [entry text rows ; visual rows]."""
    expand_index: Int32 | None
    """[deep.length] rows after expansion, taken from [shallow rows ; upsampled visual rows];
    None when LVTC is off."""
    tokens: Int32
    """[entry length] text token ids of the rows that enter layer 0 (0 at visual rows)."""
    loss_rows: Int32
    """[n] deep rows whose next token is supervised."""
    targets: Int32
    """[n] that next token."""
    answer_ids: Int32
    """[n] which supervised span (numbered through the micro-batch) the target belongs to."""
    sample_of_loss_row: Int32
    """[n] which sample of the micro-batch the target belongs to."""
    sample_ids: Int32
    """[samples] number of each sample in its data set, for messages and predictions; FILLER for none."""
    encoded_tiles: int
    """Tiles that go through projectors: the real ones, or one blank tile; in static mode the budget's."""
    low_cells: int
    """Visual rows per tile in the shallow phase; those of the deep phase without LVTC."""
    high_cells: int
    """Visual rows per tile in the deep phase."""
    supervised_budget: int | None = None
    """Static mode: supervised tokens to which the micro-batch is padded. None: the rows that enter layer 0."""

    @property
    def entry(self) -> PhasePlan:
        """The phase of layer 0."""
        return self.shallow if self.expand_index is not None else self.deep

    @property
    def fixed(self) -> bool:
        """Whether every tensor made of this plan has the shape that all plans of these settings have."""
        return self.deep.segment_capacity is not None

    @property
    def supervised_capacity(self) -> int:
        """Rows that reach the output layer: the supervised ones; in static mode as many as there can be.

        Without a budget of their own those are the rows that enter layer 0, for supervised tokens are text.
        """
        if not self.fixed:
            return len(self.loss_rows)
        return self.entry.length if self.supervised_budget is None else self.supervised_budget


def _padded(values: Int32, size: int, filler: int) -> Int32:
    """[size] values, then fillers."""
    return np.concatenate([values, np.full(size - len(values), filler, np.int32)]).astype(np.int32)


def _aligned(rows: int, fixed: int | None, alignment: int, name: str) -> int:
    if fixed is None:
        return -(-rows // alignment) * alignment
    if rows > fixed:
        raise ValueError(f"a micro-batch has {rows} {name} rows, over the static budget of {fixed}")
    return fixed


def _phase(lengths: Sequence[int], visual: NDArray[np.bool_], settings: PlanSettings, name: str) -> PhasePlan:
    rows, most = int(sum(lengths)), settings.sample_budget
    if most is not None and len(lengths) > most:
        raise ValueError(f"a micro-batch has {len(lengths)} samples, over the static budget of {most}")
    fixed = settings.shallow_length if name == "shallow" else settings.deep_length
    total = _aligned(max(rows, 1), fixed, settings.alignment, name)
    segments = tuple(int(n) for n in lengths) + ((total - rows,) if total > rows else ())
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in segments])
    capacity = None if most is None else most + 1
    return PhasePlan(total, segments, positions, np.flatnonzero(visual).astype(np.int32), capacity)


def _tile_capacity(tiles: int, settings: PlanSettings) -> int:
    if settings.tile_budget is None:
        wanted = max(tiles, 1)
    elif tiles > settings.tile_budget:
        raise ValueError(f"a micro-batch has {tiles} tiles, over the static budget of {settings.tile_budget}")
    else:
        wanted = settings.tile_budget
    return -(-wanted // settings.tile_multiple) * settings.tile_multiple


def supervised_tokens(labels: NDArray) -> int:
    """Number of a sample's tokens that count in the loss, of labels [n]; nothing predicts the first token."""
    return int((labels[1:] != IGNORE).sum())


def _supervision(
    labels: Sequence[NDArray], starts: NDArray, most: int | None
) -> tuple[Int32, Int32, Int32, Int32]:
    """Rows that predict a supervised token, the tokens, and which answer and sample each is of."""
    rows, targets, answers, samples = [], [], [], []
    spans = 0
    for index, label in enumerate(labels):
        at = np.flatnonzero(label[1:] != IGNORE)
        if not len(at):
            continue
        rows.append(at + starts[index])
        targets.append(label[1:][at])
        new_span = np.concatenate([[True], np.diff(at) > 1])
        answers.append(spans + np.cumsum(new_span) - 1)
        spans += int(new_span.sum())
        samples.append(np.full(len(at), index))
    count = sum(map(len, rows))
    if most is not None and count > most:
        raise ValueError(f"a micro-batch has {count} supervised tokens, over the static budget of {most}")
    if not rows:
        empty = np.zeros(0, np.int32)
        return empty, empty, empty, empty
    return tuple(np.concatenate(x).astype(np.int32) for x in (rows, targets, answers, samples))  # type: ignore[return-value]


def build_plan(
    token_ids: Sequence[NDArray],
    labels: Sequence[NDArray],
    is_visual: Sequence[NDArray[np.bool_]],
    settings: PlanSettings,
    sample_ids: Sequence[int] | None = None,
) -> SequencePlan:
    """Plan one micro-batch of samples given in the deep layout.

    Args:
        token_ids: per sample [n] ids; any value at visual rows.
        labels: per sample [n], -100 where nothing is supervised; not shifted.
        is_visual: per sample [n], true at visual rows, high_grid**2 rows per tile.
        settings: grids, alignment and budgets.
        sample_ids: number of each sample in its data set; 0, 1, ... if not given.

    Raises:
        ValueError: a sample's visual rows are not whole tiles, or a static budget is exceeded.
    """
    per_tile = settings.high_grid**2
    keep_per_tile = settings.low_grid**2 if settings.lvtc else per_tile
    for number, mask in enumerate(is_visual):
        if mask.sum() % per_tile:
            raise ValueError(
                f"sample {number} of the micro-batch has {int(mask.sum())} visual rows, "
                f"which is not a whole number of tiles of {per_tile}"
            )
    visual = np.concatenate(list(is_visual)) if is_visual else np.zeros(0, bool)
    lengths = [len(x) for x in token_ids]
    num_tiles = int(visual.sum()) // per_tile
    rank_in_tile = (np.cumsum(visual) - 1) % per_tile
    kept = ~visual | (rank_in_tile < keep_per_tile)

    deep = _phase(lengths, visual, settings, "deep")
    if settings.lvtc:
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        kept_lengths = [int(kept[a:b].sum()) for a, b in pairwise(bounds)]
        shallow = _phase(kept_lengths, visual[kept], settings, "shallow")
        expand_index = _expand_index(visual, kept, shallow, deep)
    else:
        shallow, expand_index = deep, None
    entry = shallow
    merge = np.arange(entry.length, dtype=np.int32)
    merge[entry.visual_rows] = entry.length + np.arange(len(entry.visual_rows), dtype=np.int32)
    tokens = np.zeros(entry.length, np.int32)
    flat = np.concatenate([np.asarray(x) for x in token_ids]) if token_ids else np.zeros(0, np.int64)
    tokens[: int(kept.sum())] = np.where(visual, 0, flat)[kept]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return SequencePlan(
        num_tiles,
        _tile_capacity(num_tiles, settings),
        shallow,
        deep,
        merge,
        expand_index,
        tokens,
        *_supervision(labels, starts, settings.supervised_budget),
        np.asarray(range(len(lengths)) if sample_ids is None else sample_ids, np.int32),
        max(num_tiles, 1) if settings.tile_budget is None else settings.tile_budget,
        keep_per_tile,
        per_tile,
        settings.supervised_budget,
    )


def _expand_index(visual: NDArray, kept: NDArray, shallow: PhasePlan, deep: PhasePlan) -> Int32:
    """Source of every deep row in [shallow rows ; upsampled visual rows]."""
    index = np.zeros(deep.length, np.int32)
    rows = len(visual)
    shallow_row = np.cumsum(kept) - 1
    index[:rows] = np.where(visual, 0, shallow_row)
    index[deep.visual_rows] = shallow.length + np.arange(len(deep.visual_rows), dtype=np.int32)
    # Padding rows repeat a padding row where the shallow phase has one, so that no text row's
    # gradient can ever come from them; their own gradient is zero either way.
    padding = shallow.length - 1 if shallow.length > int(kept.sum()) else 0
    index[rows:] = padding
    return index


_HEADER = 8


def pack_plan(plan: SequencePlan) -> Int32:
    """Flatten a plan into one int32 array, for a single broadcast. `unpack_plan` reverses it."""
    phases = (plan.shallow, plan.deep) if plan.expand_index is not None else (plan.deep,)
    arrays = [plan.merge_index, plan.tokens, plan.loss_rows, plan.targets, plan.answer_ids]
    arrays += [plan.sample_of_loss_row, plan.sample_ids]
    if plan.expand_index is not None:
        arrays.append(plan.expand_index)
    for phase in phases:
        arrays += [np.asarray(phase.segment_lengths, np.int32), phase.position_ids, phase.visual_rows]
    sizes = np.asarray([len(x) for x in arrays], np.int32)
    header = np.zeros(_HEADER, np.int32)
    header[:3] = plan.num_tiles, plan.tile_capacity, int(plan.expand_index is not None)
    header[3:5] = plan.encoded_tiles, plan.deep.segment_capacity or 0
    header[5:8] = plan.low_cells, plan.high_cells, plan.supervised_budget or 0
    return np.concatenate([header, sizes, *arrays]).astype(np.int32)


def unpack_plan(flat: Int32) -> SequencePlan:
    """Rebuild the plan that `pack_plan` flattened; a longer buffer is allowed."""
    header = (int(x) for x in flat[:_HEADER])
    num_tiles, capacity, lvtc, encoded, segment_capacity, low, high, supervised = header
    count = 14 if lvtc else 10
    sizes = flat[_HEADER : _HEADER + count]
    ends = _HEADER + count + np.cumsum(sizes)
    arrays = [flat[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    merge, tokens, loss_rows, targets, answers, samples, ids = arrays[:7]
    expand = arrays[7] if lvtc else None

    def phase(first: int) -> PhasePlan:
        segments, positions, visual_rows = arrays[first : first + 3]
        lengths = tuple(int(n) for n in segments)
        return PhasePlan(len(positions), lengths, positions, visual_rows, segment_capacity or None)

    deep = phase(11 if lvtc else 7)
    shallow = phase(8) if lvtc else deep
    return SequencePlan(
        num_tiles,
        capacity,
        shallow,
        deep,
        merge,
        expand,
        tokens,
        loss_rows,
        targets,
        answers,
        samples,
        ids,
        encoded,
        low,
        high,
        supervised or None,
    )
