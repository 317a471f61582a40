"""Lengths, positions and cache slots of the two phases of a decoder with LVTC, for a server that counts deep rows.

A tile has `high` placeholders in the prompt. All of them are rows of the deep layers; the shallow layers run text
rows and the first `low` placeholders of each tile, and have positions and lengths of their own.

Shapes: n rows of a request or of a step, s of them that the shallow layers run, R requests of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

Spans = Sequence[tuple[int, int]]
"""(first row, placeholders) of the images of a request, in order; the placeholders of an image are adjacent."""

MOST_GROUPS = 12
"""With more cache groups, the block tables cost more than the empty rows that they save."""

TEXT = -1
"""Place within a tile of a row that is no placeholder."""


def shallow_length(rows: int, spans: Spans, low: int, high: int) -> int:
    """How many of the first `rows` rows of a request the shallow layers run."""
    kept = rows
    for start, count in spans:
        inside = min(max(rows - start, 0), count)
        tiles, rest = divmod(inside, high)
        kept -= tiles * (high - low) + max(rest - low, 0)
    return kept


def chunk_end(start: int, end: int, spans: Spans) -> int:
    """The last row before `end` at which a prefill from `start` may stop: never inside an image.

    An image is upsampled from all its shallow rows together. The result may be `start`: nothing fits.
    """
    for first, count in spans:
        if first < end < first + count:
            return max(start, first)
    return end


def row_positions(rows: int, spans: Spans, low: int, high: int) -> tuple[torch.Tensor, int]:
    """Three numbers for each row of a prompt, and what the first changes by afterwards.

    A server that hands a model three positions per row, and continues them by adding one delta to a row's number,
    carries the shallow positions in this form. Rows after the prompt get the same number three times, as text does
    here.

    Returns:
        int64 [3, rows]: position in the shallow phase (of the last kept row at a row that is not kept); the same, or
        `TEXT` at a placeholder; the same, or at a placeholder its place within the tile. And the delta, at most 0.
    """
    place = torch.full((rows,), TEXT, dtype=torch.int64)
    for start, count in spans:
        place[start : start + count] = torch.arange(count) % high
    shallow = (place < low).cumsum(dim=0) - 1
    visual = place != TEXT
    positions = torch.stack([shallow, shallow.masked_fill(visual, TEXT), torch.where(visual, place, shallow)])
    return positions, shallow_length(rows, spans, low, high) - rows


def kept_rows(positions: torch.Tensor, low: int) -> torch.Tensor:
    """bool [n]: rows that the shallow layers run, from the [3, n] of `row_positions` and its continuation."""
    return (positions[1] != TEXT) | (positions[2] < low)


class Shallow(NamedTuple):
    """A step's rows in the shallow phase."""

    starts: torch.Tensor
    """int32 [R + 1]: first row of each request among the s rows, and s."""
    lengths: torch.Tensor
    """int32 [R]: rows of each request in the cache after the step."""
    positions: torch.Tensor
    """int64 [s]."""
    request: torch.Tensor
    """int64 [s]: which request a row belongs to."""


def shallow_step(positions: torch.Tensor, starts: torch.Tensor, kept: torch.Tensor | None) -> Shallow:
    """The shallow phase of a step.

    Args:
        positions: int64 [3, n], those of `row_positions` and its continuation.
        starts: int32 [R + 1], first row of each request, and n. A request without rows has length 0.
        kept: bool [n], see `kept_rows`; None: all rows, without asking the device.
    """
    own = positions[0]
    ends = starts[1:].long()
    request = torch.searchsorted(ends, torch.arange(len(own), device=own.device), right=True)
    last = own[(ends - 1).clamp(min=0)] + 1
    lengths = torch.where(starts[1:] > starts[:-1], last, torch.zeros_like(last)).to(starts.dtype)
    if kept is None:
        return Shallow(starts, lengths, own, request)
    counts = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(dim=0)])
    return Shallow(counts[starts.long()].to(starts.dtype), lengths, own[kept], request[kept])


def cache_slots(shallow: Shallow, blocks: torch.Tensor, block_size: int) -> torch.Tensor:
    """Cache slots int64 [s] of a step's shallow rows; `blocks` [R, m] are the block numbers of each request."""
    block = blocks[shallow.request, shallow.positions // block_size].long()
    return block * block_size + shallow.positions % block_size


def layer_parts(shallow: int, deep: int) -> tuple[int, int] | None:
    """How many parts to hand to vLLM the cached layers of each phase in: (of `shallow`, of `deep` layers).

    vLLM makes blocks that are equally wide in layers for all parts, and leaves empty what a narrower part does not
    fill. Each part costs a block table per request. A layer left empty is held for as bad as four more parts. None:
    more than `MOST_GROUPS` groups would be needed, so all layers share one, whose blocks shallow layers do not fill.
    """

    def cost(parts: tuple[int, int]) -> float:
        sizes = part_sizes(shallow, deep, parts)
        width, groups = vllm_groups(sizes)
        return groups * width - sum(sizes) + groups / 4

    widths = range(1, max(shallow, deep) + 1)
    found = {(-(-shallow // width), -(-deep // width)) for width in widths}
    best = min(found, key=lambda parts: (cost(parts), parts))
    return best if vllm_groups(part_sizes(shallow, deep, best))[1] <= MOST_GROUPS else None


def part_sizes(shallow: int, deep: int, parts: tuple[int, int]) -> list[int]:
    """Layers in each part, the shallow ones first."""
    return [
        split_layers(layers, count).count(part)
        for layers, count in zip((shallow, deep), parts, strict=True)
        for part in range(count)
    ]


def vllm_groups(sizes: Sequence[int]) -> tuple[int, int]:
    """(width, number) of the groups that vLLM 0.32 makes of parts with so many layers each."""
    width = max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)
    return width, sum(-(-size // width) for size in sizes)


def split_layers(layers: int, parts: int) -> list[int]:
    """The group of each of `layers` layers, in `parts` groups whose sizes differ by one at most."""
    return [index * parts // layers for index in range(layers)]
