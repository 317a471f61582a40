"""Why `fp8_delayed` begins with a learning rate of 0: delayed scaling emulated with torch's FP8 types, on a CPU.

Scales come from the maxima of earlier steps, so in the first step they are 1, and gradients below the smallest number
of E5M2 are 0. What is behind them does not learn in that step, while all else makes Adam's first update, which has
full size. Transformer Engine's own kernels need a GPU; this shows the rule, not their numbers.
"""

import pytest
import torch
from torch import Tensor, nn

STEPS = 6
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


class Scaled:
    """A tensor's cast with the scale of the maxima seen in earlier steps; in the first step the scale is 1."""

    def __init__(self, kind: torch.dtype) -> None:
        self.kind, self.largest = kind, 0.0

    def __call__(self, tensor: Tensor) -> Tensor:
        scale = LARGEST[self.kind] / self.largest if self.largest else 1.0
        self.largest = max(self.largest, float(tensor.abs().max()))
        limit = LARGEST[self.kind]
        return (tensor * scale).clamp(-limit, limit).to(self.kind).to(tensor.dtype) / scale


class Product(torch.autograd.Function):
    """x @ w^T with x and w in E4M3 and the gradient in E5M2."""

    @staticmethod
    def forward(ctx, x, w, casts):
        ctx.cast = casts[2]
        x, w = casts[0](x), casts[1](w)
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        gradient = ctx.cast(gradient)
        return gradient @ w, gradient.T @ x, None


def losses(fp8: bool, rates: list[float]) -> list[float]:
    """Losses of a block with a norm between two products, whose gradients are as small as those of many tokens."""
    torch.manual_seed(0)
    x, target = torch.randn(64, 32), torch.randn(64, 32)
    first, norm, second = nn.Linear(32, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 32, bias=False)
    casts = [
        [Scaled(torch.float8_e4m3fn), Scaled(torch.float8_e4m3fn), Scaled(torch.float8_e5m2)] for _ in "12"
    ]
    weights = [*first.parameters(), *norm.parameters(), *second.parameters()]
    adam = torch.optim.Adam(weights, eps=1e-15)
    found = []
    for rate in rates:
        adam.param_groups[0]["lr"] = rate
        hidden = Product.apply(x, first.weight, casts[0]) if fp8 else first(x)
        hidden = torch.relu(norm(hidden))
        out = Product.apply(hidden, second.weight, casts[1]) if fp8 else second(hidden)
        loss = (out - target).square().mean()
        adam.zero_grad()
        (loss * 1e-3).backward()
        adam.step()
        found.append(float(loss.detach()))
    return found


def drift(rates: list[float]) -> float:
    exact, cast = losses(False, rates), losses(True, rates)
    # The forward pass of the first step is not the trouble.
    assert cast[0] == pytest.approx(exact[0], rel=5e-3)
    return abs(cast[-1] / exact[-1] - 1)


@pytest.mark.parametrize(
    ("rate", "full", "zero"), [(3e-3, 0.081, 0.041), (1e-2, 0.171, 0.051), (3e-2, 0.132, 0.026)]
)
def test_a_first_step_with_a_rate_makes_most_of_the_drift(rate: float, full: float, zero: float) -> None:
    """Measured: `full` with this rate in every step, `zero` with none in the first, each against exact training."""
    found = drift([rate] * STEPS), drift([0.0] + [rate] * (STEPS - 1))
    assert found == (pytest.approx(full, rel=0.2), pytest.approx(zero, rel=0.2))
    assert found[0] > 1.8 * found[1]


def test_gradients_behind_a_product_vanish_in_the_first_step() -> None:
    cast = Scaled(torch.float8_e5m2)
    gradient = torch.full((4,), 5e-6)
    assert cast(gradient).tolist() == [0.0] * 4
    assert torch.allclose(cast(gradient), gradient, rtol=0.1)
