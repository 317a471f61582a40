"""Plans of a few samples, for tests."""

import numpy as np

from megatron_internvlx.data.plan import PlanSettings, build_plan
from megatron_internvlx.parallel.boundary import Budget
from megatron_internvlx.parallel.device_plan import DevicePlan, device_plan


def plan(tiles: tuple[int, ...], budget: Budget | None = None) -> DevicePlan:
    """Samples of two text rows, so many tiles of 1 shallow and 4 deep rows, and three text rows."""
    fixed = (
        {
            "shallow_length": budget.shallow,
            "deep_length": budget.deep,
            "tile_budget": budget.tiles,
            "sample_budget": 3,
        }
        if budget
        else {}
    )
    visual = [np.array([False] * 2 + [True] * 4 * n + [False] * 3) for n in tiles]
    ids = [np.where(mask, 0, 5) for mask in visual]
    labels = [np.where(np.arange(len(mask)) == len(mask) - 1, 5, -100) for mask in visual]
    return device_plan(build_plan(ids, labels, visual, PlanSettings(1, 2, **fixed)))
