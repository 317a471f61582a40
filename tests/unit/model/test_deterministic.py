"""Deterministic mode: nothing in a training step is refused by torch, and two steps give the same bits."""

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.models import batch, build


@pytest.fixture
def deterministic() -> Iterator[None]:
    """What Megatron's --deterministic-mode asks torch for."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def bits() -> list[torch.Tensor]:
    """Losses and gradients of a model with LVTC and a further injection."""
    torch.manual_seed(1)
    model = build("local", torch.float32, deterministic_mode=True).train()
    losses = model(batch(model))
    losses.mean().backward()
    return [losses.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.usefixtures("deterministic")
def test_two_steps_give_the_same_bits() -> None:
    """Merge, expansion, injections and attention of a pack with deterministic algorithms only."""
    first, second = bits(), bits()
    assert len(first) == len(second) > 50
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].abs().sum() > 0
