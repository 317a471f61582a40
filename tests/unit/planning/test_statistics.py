"""The budget of supervised tokens that the statistics of a data set propose."""

import numpy as np

from megatron_internvlx.data.packing import Budget, fill, pack
from megatron_internvlx.planning.statistics import PolicyStats, propose_supervised, supervised_line
from tests.unit.data.test_packing import long_tailed

BUDGET = Budget(4096, 8192, 24)


def test_a_proposed_budget_costs_few_packs_and_few_samples() -> None:
    costs = long_tailed(1000, 3, BUDGET)
    found = propose_supervised(costs, BUDGET)
    assert found is not None
    packs = len(pack(costs, BUDGET))
    # What packs hold in the mean has to fit, and a longest answer; both leave much of the shallow budget over.
    assert costs[:, 3].sum() / packs <= found.most <= 3072 and found.most % 128 == 0
    costs[:, 3] = np.minimum(costs[:, 3], found.most)
    limited = len(pack(costs, Budget(4096, 8192, 24, supervised=found.most)))
    assert limited / packs - 1 == found.more <= 0.01
    assert found.over <= 0.001


def test_texts_that_are_all_answer_leave_nothing_to_save() -> None:
    assert propose_supervised(np.array([[1000, 1000, 0, 990]] * 40), BUDGET) is None


def test_the_line_names_the_setting_and_both_sizes() -> None:
    costs = np.array([[500, 1100, 3, 20]] * 200)
    policy = PolicyStats("edge", costs, fill(costs, pack(costs, BUDGET), BUDGET))
    line = supervised_line(policy, BUDGET)
    # Seven samples of 1,100 deep tokens a pack, or 200 in 29 packs.
    assert line.startswith("supervised tokens (edge): 20 per sample, the longest 20, 138 per pack; ")
    assert "--max-supervised-tokens-per-pack 256 pads to 256 rows instead of 4,096" in line
    assert line.endswith("takes 0.0% more packs and cuts or refuses 0.00% of the samples")
    given = supervised_line(policy, Budget(4096, 8192, 24, supervised=16))
    assert given.endswith(
        "of 16 per pack 110 are used, and 100.00% of the samples are over it by themselves: cut or refused"
    )
    long = PolicyStats("edge", costs * [1, 1, 1, 24], policy.fill)
    assert supervised_line(long, BUDGET).endswith("would be almost as large as the shallow one")
