"""Initial values of tensors that an import does not find."""

import torch

from megatron_internvlx.checkpoint.importer import initial_value
from megatron_internvlx.checkpoint.mapping import one

MATRIX, OTHER = (one(f"projector.{name}.weight", name, 4, 16) for name in ("linear_fc1", "linear_fc2"))


def test_another_seed_or_name_gives_other_values_and_the_same_ones_again():
    drawn = [initial_value(entry, "float32", seed) for seed in (1, 2) for entry in (MATRIX, OTHER)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(drawn[0], initial_value(MATRIX, "float32", 1))


def test_matrices_are_uniform_within_one_over_the_root_of_the_columns():
    value = initial_value(one("projector.linear_fc1.weight", "x", 256, 64), "float32", 1)
    assert 0.12 < value.abs().max() <= 0.125
    assert abs(value.mean()) < 2e-3
