"""The fused kernels, compiled, at the sizes of the recipes: against torch's operations in fp64."""

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from torch import Tensor  # noqa: E402

from megatron_internvlx.platform import kernels, kernels_torch  # noqa: E402
from megatron_internvlx.platform.kernels import Norm  # noqa: E402

# Relative norms: a last bit of fp32, and bf16's 2**-9 for a rounding, of which the longest path here has three.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 3 * 2**-9}
ROWS, TILES = 1025, 4


def branch_end(residual: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor):
    keep = torch.ones(1, TILES, 1, device="cuda", dtype=residual.dtype)
    keep[0, 1] = 0
    norm = Norm(weight, bias, 1e-6)
    return kernels.add_branch_and_norm(residual, branch, norm, scale=scale, keep=keep, keep_rate=0.9)


def rms(x: Tensor, weight: Tensor):
    return kernels.norm_and_pass(x, Norm(weight, None, 1e-6))


def twins(x: Tensor, a: Tensor, b: Tensor):
    return sum(kernels.twin_norm(x, Norm(a, None, 1e-6), Norm(b, None, 1e-6)), ())


def attention(query: Tensor, key: Tensor, value: Tensor):
    return (kernels.window_attention(query, key, value, 16),)


def gate(x: Tensor, y: Tensor):
    return (kernels.gated_silu(x, y),)


def end_of_layer(residual: Tensor, branch: Tensor, scale: Tensor):
    return (kernels.add_branch(residual, branch, scale=scale),)


class Alone:
    """A tensor parallel group of one rank."""

    @staticmethod
    def rank() -> int:
        return 0

    @staticmethod
    def size() -> int:
        return 1


def loss(logits: Tensor):
    targets = torch.arange(len(logits), device="cuda") * 7919 % logits.shape[-1]
    # Its gradient takes the place of its input, so that gets a copy.
    return (kernels.vocab_parallel_cross_entropy(logits * 1, targets, Alone),)


TILE = (ROWS, TILES)
CASES = {
    "branch end 1024": (branch_end, [(*TILE, 1024)] * 2 + [(1024,)] * 3),
    "end of layer 1024": (end_of_layer, [(*TILE, 1024)] * 2 + [(1024,)]),
    "RMS norm 3200": (rms, [(*TILE, 3200), (3200,)]),
    "RMS norm 16384": (rms, [(256, 16384), (16384,)]),
    "twin norms 2048": (twins, [(512, 4, 2048)] + [(2048,)] * 2),
    "twin norms 8192": (twins, [(128, 4, 8192)] + [(8192,)] * 2),
    "attention to 4 of 128": (attention, [(512, 2048), (512, 4, 2048), (512, 4, 2048)]),
    "attention to 16 of 512": (attention, [(64, 8192), (64, 16, 8192), (64, 16, 8192)]),
    "attention to 4 of 56": (attention, [(512, 896), (512, 4, 896), (512, 4, 896)]),
    "gated SiLU": (gate, [(1000, 8192)] * 2),
    "loss of 92,672": (loss, [(300, 1, 92672)]),
    "loss of 37,919, a shard of an odd width": (loss, [(300, 1, 37919)]),
}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_the_type_allows(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    function, shapes = CASES[name]
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = function(*inputs)
    cotangents = [torch.randn_like(x) for x in found]
    found += torch.autograd.grad(found, inputs, cotangents)
    monkeypatch.setattr(kernels, "implementation", lambda _x: kernels_torch)
    wanted = function(*exact)
    wanted += torch.autograd.grad(wanted, exact, [c.double() for c in cotangents])
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert relative(ours, theirs) < BOUNDS[dtype], number


def test_gradients_are_added_in_fp32() -> None:
    x = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.nn.Parameter(torch.randn(1024, device="cuda").bfloat16()) for _ in range(2))
    cotangent = torch.randn_like(x)
    kernels.norm_and_pass(x, Norm(weight, bias, 1e-6))[0].backward(cotangent)
    wanted = [weight.grad.float(), bias.grad.float()]
    for parameter in (weight, bias):
        parameter.main_grad = torch.ones(1024, device="cuda")
    kernels.norm_and_pass(x, Norm(weight, bias, 1e-6, accumulate=True))[0].backward(cotangent)
    for parameter, gradient in zip((weight, bias), wanted, strict=True):
        assert relative(parameter.main_grad - 1, gradient.double()) < 2**-8
        assert parameter.grad_added_to_main_grad


def test_the_same_bits_again() -> None:
    """Sums over rows are joined in a fixed order."""
    function, shapes = CASES["branch end 1024"]
    inputs = [torch.randn(*shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    runs = []
    for _ in range(2):
        y, out = function(*inputs)
        runs.append(torch.autograd.grad(y.float().square().sum() + out.float().sum(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
