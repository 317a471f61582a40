"""Rows of the output layer on the device: as many as the budget, padding without weight."""

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.parallel.plans import plan  # isort: skip  (sets Megatron up)
from megatron_internvlx.parallel.boundary import Budget
from megatron_internvlx.parallel.device_plan import device_plan

BUDGET = Budget(20, 40, 3)


@pytest.mark.parametrize("most", [3, 7])
@pytest.mark.parametrize("tiles", [(0,), (3,), (1, 1, 1)])
def test_padding_to_the_budget_of_supervised_tokens(tiles: tuple[int, ...], most: int) -> None:
    """One token of each sample is supervised; the rows that fill the budget are rows of the phase."""
    host = replace(plan(tiles, BUDGET).host, supervised_budget=most)
    made = device_plan(host)
    real = len(tiles)
    for rows in (made.loss_rows, made.targets, made.loss_weights):
        assert len(rows) == most
    assert made.loss_rows[:real].tolist() == host.loss_rows.tolist()
    assert made.targets.tolist() == [*host.targets.tolist(), *[0] * (most - real)]
    assert made.loss_weights.tolist() == [1] * real + [0] * (most - real)
    assert (made.total_weight.item(), made.supervised.item()) == (real, real)
    assert int(made.loss_rows.min()) >= 0 and int(made.loss_rows.max()) < 40
    # What follows in the buffer is where the copy that a graph reads has it.
    copy = made.clone()
    for name in ("loss_rows", "loss_weights", "expand_index"):
        assert np.array_equal(getattr(copy, name), getattr(made, name))
