"""Static boundaries give the numbers of variable ones, and of one process, in every layout of the layout tests.

Each case of `layout_cases.py` that lacks `static` is run with it, adapters and experts included, and compared with
the same reference as without it: one process with variable boundaries. So static = variable = one process; `make test`
has the cases that are static there. No setting is refused with static boundaries, and none is left out.
"""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests import layouts  # isort: skip  (sets Megatron up)
from megatron_internvlx.model import pvtc
from megatron_internvlx.parallel.batch import HostBatch
from tests.distributed import Pool
from tests.layout_cases import ADAPTER_CASES, CASES, SETTINGS, STATIC, Case, Runner, compare, expand

KNOWN = [*CASES, *ADAPTER_CASES]
ADDED = [
    case
    for old in KNOWN
    if "static" not in old.layout.split()
    and (case := Case(old.ranks, old.setting, f"{old.layout} static")) not in KNOWN
]
KEEP = ("grads", "weights")


@pytest.fixture(scope="module")
def runner(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(pool, tmp_path_factory.mktemp("layouts"))


def train_fixed(changes: list[str], **options: Any) -> dict[str, Any]:
    """`layouts.train`, whose every micro-batch must have the sizes of the budgets."""
    make = layouts.micro_batch

    def fixed(*args: Any) -> HostBatch:
        batch = make(*args)
        sizes = (batch.plan.deep.length, batch.plan.encoded_tiles)
        assert batch.plan.fixed and sizes == (160, 8), sizes
        return batch

    with mock.patch.object(layouts, "micro_batch", fixed):
        return layouts.train(changes, **options)


# Measured, of 51 layouts: loss and norm 1e-7, gradients 3e-6 and elements 4e-6 (experts; else 1e-6 and 2e-6), weights
# 2e-7, replicas bit-equal; of bf16 2e-4, 1e-3, 2e-2, 8e-2 and 1e-3. So the limits of variable boundaries hold.
@pytest.mark.parametrize("case", ADDED, ids=lambda case: case.name)
def test_one_step(runner: Runner, case: Case) -> None:
    """Loss, every gradient and its norm, every weight after the optimizer's step; TP ranks agree.

    Drop path draws a number per window, those of blank tiles included, so that other windows are dropped than with
    variable boundaries: these cases are compared with one process that has static ones; the next test compares it.
    """
    drawn = STATIC if "--projector-drop-path" in SETTINGS[case.setting].arguments else ""
    assert not runner.difference(case, drawn, function=train_fixed).exceeded()


def train_drawn(changes: list[str], **options: Any) -> dict[str, Any]:
    """`layouts.train` in one process, with draws of drop path that the number of windows does not change."""
    calls = 0

    def draw(branch: torch.Tensor, keep_rate: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        kept = np.random.default_rng(calls).random(len(branch)) < keep_rate
        return torch.from_numpy(kept).to(branch.dtype).view(-1, *(1,) * (branch.dim() - 1))

    with mock.patch.object(pvtc, "draw_kept_entries", draw):
        return {**layouts.train(changes, **options), "calls": calls}


def test_drop_path_drops_the_same_of_the_same_draws(runner: Runner) -> None:
    """With static boundaries as with variable ones, where both draw the same for the windows of real tiles."""
    variable, static, steady = (
        runner.run(1, setting, extra.split(), function=function, keep=KEEP)
        for setting, extra, function in (
            ("drop", "", train_drawn),
            ("drop", STATIC, train_drawn),
            ("lvtc", STATIC, train_fixed),
        )
    )
    assert static["calls"] == variable["calls"] == 3 * 4 * layouts.MICRO_BATCHES
    # Measured: as in the other layouts.
    assert not compare(static, variable).exceeded()
    assert compare(static, steady).gradient > 0.1


def test_no_layout_is_left_out() -> None:
    """Every layout of every setting is static once, here or in `make test`."""
    static = {(case.ranks, case.setting, *sorted(expand(case.layout))) for case in [*KNOWN, *ADDED]}
    for case in KNOWN:
        words = [*case.layout.split(), *(["static"] if "static" not in case.layout.split() else [])]
        assert (case.ranks, case.setting, *sorted(expand(" ".join(words)))) in static, case.name
    assert {case.setting for case in KNOWN} == SETTINGS.keys()
