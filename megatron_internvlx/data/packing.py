"""Dual-length packing: combine samples into packs within the budgets.

A sample costs shallow tokens, deep tokens, tiles and supervised tokens; the sums of a pack must be within all budgets.
The limiting budget depends on the data: long texts fill the deep tokens, large images the tiles, long answers the
supervised tokens. The packs depend only on the costs, so that they are the same on every rank and after a resume.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
NAMES = ("shallow tokens", "deep tokens", "tiles", "supervised tokens")
_UNLIMITED = np.iinfo(np.int64).max
# Number of attempts with a growing number of packs before falling back to the tightest packing, and the growth.
_GROWTH, _TRIES = 0.008, 6


class Cost(NamedTuple):
    """Cost of a sample: tokens in both decoder phases, tiles, and tokens with a loss."""

    shallow: int
    deep: int
    tiles: int
    supervised: int = 0


@dataclass(frozen=True)
class Budget:
    """Limits of a pack: tokens in both phases, tiles, samples and tokens with a loss; None: no limit on these."""

    shallow: int
    deep: int
    tiles: int | None = None
    samples: int | None = None
    supervised: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                what = "supervised tokens" if name == "supervised" else name
                raise ValueError(f"the packing budget of {what} is {value}; it must be at least 1")

    def share(self, samples: int) -> "Budget":
        """Equal share of the budget for each of `samples`. Raises ValueError if the share is 0."""
        return Budget(*(None if value is None else value // samples for value in vars(self).values()))  # type: ignore[arg-type]

    def limits(self) -> Int64:
        """Limits as int64 [4], in the order of `Cost`."""
        values = (self.shallow, self.deep, self.tiles, self.supervised)
        return np.asarray([_UNLIMITED if value is None else value for value in values], np.int64)

    def fits(self, cost: Cost) -> bool:
        """Whether the cost is within the budget."""
        return (
            cost.shallow <= self.shallow
            and cost.deep <= self.deep
            and cost.tiles <= (self.tiles or cost.tiles)
            and cost.supervised <= (self.supervised or cost.supervised)
        )


def as_costs(costs: Sequence[Cost] | Int64) -> Int64:
    """Convert costs to int64 [n, 4]. Raises ValueError for a table of other columns."""
    table = np.asarray(costs, np.int64)
    if table.size and table.shape[1:] != (len(NAMES),):
        raise ValueError(f"costs have the shape {table.shape}, must be [n, {len(NAMES)}]: {', '.join(NAMES)}")
    return table.reshape(-1, len(NAMES))


def pack(costs: Sequence[Cost] | Int64, budget: Budget) -> list[Int64]:
    """Assign every sample to exactly one pack; returns the sample indices of each pack.

    Packs are sorted by decreasing tiles, so that ranks with similar samples have similar numbers of tiles in the
    same step. Samples of a pack keep their order.

    Raises ValueError for a sample that exceeds a budget by itself; `sample.py` prevents such samples.
    """
    table, limits = as_costs(costs), budget.limits()
    if not len(table):
        return []
    over = np.argwhere(table > limits)
    if len(over):
        number, which = (int(i) for i in over[0])
        raise ValueError(
            f"sample {number} has {table[number, which]} {NAMES[which]}, must be at most {limits[which]}: raise the "
            "packing budget"
        )
    owner = _assign_packs(table, limits)
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner))
    # Packs of more samples than allowed are rare (many short texts), so they are simply cut.
    size = budget.samples or len(table)
    packs = [
        order[at : min(at + size, end)]
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
        for at in range(start, end, size)
    ]
    totals = np.asarray([table[rows].sum(0) for rows in packs])
    keys = (np.asarray([rows[0] for rows in packs]), -totals[:, 1], -totals[:, 2])
    return [packs[i] for i in np.lexsort(keys)]


def lower_bound(costs: Int64, limits: Int64) -> int:
    """Minimum number of packs, given by the most used budget."""
    return max(1, int(np.max(-(-costs.sum(0) // limits))))


def _assign_packs(costs: Int64, limits: Int64) -> Int64:
    """Pack number of each sample."""
    shares = costs / limits
    order = np.argsort(-shares.max(1), kind="stable")
    least = lower_bound(costs, limits)
    tight = _assign_greedily(costs, shares, order, limits, least, spread=False)
    most = int(tight.max()) + 1
    for attempt in range(_TRIES):
        count = least + int(np.ceil(attempt * _GROWTH * least))
        if count >= most and attempt:
            break
        even = _assign_greedily(costs, shares, order, limits, count, spread=True)
        if int(even.max()) < count:
            return even
    return tight


def _assign_greedily(
    costs: Int64, shares: NDArray, order: Int64, limits: Int64, count: int, *, spread: bool
) -> Int64:
    """Assign samples to packs greedily, the largest samples first; returns the pack number of each sample.

    With `spread`, a sample goes to the pack (of `count`) where it increases the sum of squared loads least, which
    balances all sums. Otherwise it goes to the fullest pack with room for it, which needs the fewest packs.
    If no pack has room, a new one is opened.
    """
    owner = np.zeros(len(costs), np.int64)
    free = np.repeat(limits[:, None], len(costs) + 1, axis=1)
    loads = np.zeros((len(NAMES), len(costs) + 1))
    open_packs = count if spread else 1
    for i in order:
        (a, b, c, d), (x, y, z, w) = costs[i], shares[i]
        fits = (free[0, :open_packs] >= a) & (free[1, :open_packs] >= b) & (free[2, :open_packs] >= c)
        fits &= free[3, :open_packs] >= d
        if spread:
            added = x * loads[0, :open_packs] + y * loads[1, :open_packs] + z * loads[2, :open_packs]
            score = np.where(fits, added + w * loads[3, :open_packs], np.inf)
            best = int(score.argmin())
        else:
            score = np.where(fits, loads[:, :open_packs].max(0), -np.inf)
            best = int(score.argmax())
        if not fits[best]:
            best = open_packs
            open_packs += 1
        owner[i] = best
        free[:, best] -= costs[i]
        loads[:, best] += shares[i]
    return owner


@dataclass(frozen=True)
class Fill:
    """Fill of packs: used share of each budget over all packs."""

    packs: int
    shallow: float
    deep: float
    tiles: float
    supervised: float = 0.0

    @property
    def binding(self) -> str:
        """Name of the most used budget."""
        return NAMES[int(np.argmax([self.shallow, self.deep, self.tiles, self.supervised]))]

    @property
    def best(self) -> float:
        """Used share of the most used budget."""
        return max(self.shallow, self.deep, self.tiles, self.supervised)


def fill(costs: Sequence[Cost] | Int64, packs: Sequence[Int64], budget: Budget) -> Fill:
    """Compute the used share of every budget; 0 for one without a limit."""
    used = as_costs(costs).sum(0) / np.maximum(len(packs), 1) / budget.limits()
    return Fill(len(packs), *(float(share) for share in used))


def tile_spread(tiles_per_rank: Sequence[Sequence[int]]) -> float:
    """Imbalance of tiles over ranks: mean over steps of (maximum over ranks / mean over ranks) - 1."""
    steps = min(len(tiles) for tiles in tiles_per_rank)
    table = np.asarray([tiles[:steps] for tiles in tiles_per_rank], float)
    mean = table.mean(0)
    return float((table.max(0)[mean > 0] / mean[mean > 0]).mean() - 1) if (mean > 0).any() else 0.0
