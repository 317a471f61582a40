"""The loss over a split vocabulary: against torch's cross entropy in fp64 and, bit for bit, Megatron's."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_internvlx.platform.kernels import vocab_parallel_cross_entropy

ROWS, VOCAB = 12, 40
# Measured, relative to the largest number: fp64 1e-16, fp32 8e-8 (losses) and 1.2e-7, bf16 2**-9 for a rounding.
# A maximum of one shard used for all gives 0.9 and more.
BOUNDS = {torch.float64: 1e-15, torch.float32: 5e-7, torch.bfloat16: 2**-8}


class Alone:
    """A group of one rank."""

    @staticmethod
    def rank() -> int:
        return 0

    @staticmethod
    def size() -> int:
        return 1


def draw(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, V], targets [n] in every shard and a cotangent [n]; maxima differ much between shards and rows."""
    torch.manual_seed(0)
    logits = (torch.randn(ROWS, VOCAB) * 4 + torch.linspace(-30, 30, VOCAB)).to(dtype)
    logits[::2] = logits[::2].flip(-1)
    logits[:, -3:] = torch.finfo(dtype).min  # padding columns
    return logits, torch.arange(ROWS) * 3 % (VOCAB - 3), torch.randn(ROWS)


def of_torch(logits: Tensor, targets: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none")
    losses.backward(cotangent.double())
    return losses.detach(), exact.grad


def ours(logits: Tensor, targets: Tensor, cotangent: Tensor, group) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    losses = vocab_parallel_cross_entropy((leaf * 1)[:, None], targets, group)
    return losses.detach(), torch.autograd.grad(losses, leaf, cotangent.to(losses.dtype))[0]


def of_megatron(logits: Tensor, targets: Tensor, cotangent: Tensor, group) -> tuple[Tensor, Tensor]:
    from megatron.core import tensor_parallel

    leaf = logits.clone().requires_grad_()
    losses = tensor_parallel.vocab_parallel_cross_entropy(
        (leaf * 1)[:, None], targets[:, None], tp_group=group
    )
    return losses.detach()[:, 0], torch.autograd.grad(losses, leaf, cotangent[:, None])[0]


def away(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_values_and_gradients(dtype: torch.dtype) -> None:
    inputs = draw(dtype)
    losses, gradient = ours(*inputs, Alone)
    wanted_losses, wanted_gradient = of_torch(*inputs)
    assert gradient.dtype == dtype and losses.dtype == torch.promote_types(dtype, torch.float32)
    assert away(losses, wanted_losses) < min(BOUNDS[dtype], BOUNDS[torch.float32])
    assert away(gradient, wanted_gradient) < BOUNDS[dtype]
    assert not gradient[:, -3:].any(), "padding columns get exactly nothing"


def on_shards(dtype: torch.dtype) -> list[tuple[float, float, bool]]:
    """Of this rank: how far losses and gradients are from torch's, and whether they are Megatron's bits."""
    group = torch.distributed.group.WORLD
    logits, targets, cotangent = draw(dtype)
    wanted_losses, wanted_gradient = of_torch(logits, targets, cotangent)
    own = slice(group.rank() * VOCAB // group.size(), (group.rank() + 1) * VOCAB // group.size())
    found = ours(logits[:, own], targets, cotangent, group)
    megatrons = of_megatron(logits[:, own], targets, cotangent, group)
    same = all(torch.equal(a, b) for a, b in zip(found, megatrons, strict=True))
    off = (found[1].double() - wanted_gradient[:, own]).abs().max() / wanted_gradient.abs().max()
    none = ours(logits[:0, own], targets[:0], cotangent[:0], group)
    assert none[0].shape == (0,) and none[1].shape == (0, VOCAB // group.size())
    return away(found[0], wanted_losses), float(off), same


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_of_the_vocabulary(pool, ranks: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for losses, gradients, same in pool.run(ranks, on_shards, dtype):
            assert losses < BOUNDS[torch.float32] and gradients < BOUNDS[dtype]
            assert same or ranks > 1


def test_only_the_logits_are_kept() -> None:
    logits, targets, cotangent = draw(torch.bfloat16)
    kept: list[Tensor] = []
    x = logits.requires_grad_() * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        losses = vocab_parallel_cross_entropy(x, targets, Alone)
    assert [t.data_ptr() for t in kept if t.numel() > ROWS] == [x.data_ptr()]
    (gradient,) = torch.autograd.grad(losses, x, cotangent)
    assert gradient.data_ptr() == x.data_ptr(), "the gradient takes the place of the logits"


def test_second_backward_pass_is_an_error() -> None:
    """The logits are gone after the first."""
    logits, targets, cotangent = draw(torch.float32)
    losses = vocab_parallel_cross_entropy(logits.requires_grad_() * 1, targets, Alone)
    losses.backward(cotangent, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.backward(cotangent)
