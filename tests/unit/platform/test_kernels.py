"""The fused kernels: gradients against finite differences, and Triton's against torch's in Triton's interpreter.

On a GPU tests/gpu/test_kernels.py compares them again, compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_internvlx.platform import kernels, packed_attention
from megatron_internvlx.platform.kernels import Norm

ROOT = Path(__file__).parents[3]
S, T, C = 5, 3, 6
KEEP = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64).view(1, T, 1)
PARTS = {"keep": KEEP, "keep_rate": 0.7}
# Measured: fp32 3.9e-7, bf16 1.8e-2 (a last bit of 8 in a gradient that both sum in other orders).
WORST = {"torch.float32": 2e-6, "torch.bfloat16": 4e-2}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def rows() -> Tensor:
    return draw(S, T, C)


CASES = {
    "layer norm": (lambda x, w, b: kernels.norm_and_pass(x, Norm(w, b, 1e-5)), (rows(), draw(C), draw(C))),
    "RMS norm": (lambda x, w: kernels.norm_and_pass(x, Norm(w, None, 1e-5)), (rows(), draw(C))),
    "branch": (lambda r, b: kernels.add_branch(r, b), (rows(), rows())),
    "branch, scale, keep": (lambda r, b, s: kernels.add_branch(r, b, scale=s, **PARTS), (rows(), rows(), draw(C))),
    "branch and layer norm": (
        lambda r, b, s, w, c: kernels.add_branch_and_norm(r, b, Norm(w, c, 1e-5), scale=s, **PARTS),
        (rows(), rows(), draw(C), draw(C), draw(C)),
    ),
    "branch and RMS norm": (
        lambda r, b, w: kernels.add_branch_and_norm(r, b, Norm(w, None, 1e-5), **PARTS),
        (rows(), rows(), draw(C)),
    ),
    "gated SiLU": (kernels.gated_silu, (rows(), rows())),
    "window attention": (
        lambda q, k, v: kernels.window_attention(q, k, v, 2), (draw(4, C), draw(4, 3, C), draw(4, 3, C))
    ),
    "twin norm": (
        lambda x, a, b: sum(kernels.twin_norm(x, Norm(a, None, 1e-5), Norm(b, None, 1e-5)), ()),
        (rows(), draw(C), draw(C)),
    ),
    "split": (lambda x: kernels.split_packed(x, -2), (draw(S, C, 3, 2),)),
    "cut": (lambda x: kernels.cut_packed(x, -2), (draw(S, C, 3, 2),)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    function, inputs = CASES[name]
    assert torch.autograd.gradcheck(function, inputs)


def test_frozen_parameters_get_no_gradient() -> None:
    x, branch = rows(), rows()
    scale, weight, bias = (torch.randn(C, dtype=torch.float64) for _ in range(3))
    y, out = kernels.add_branch_and_norm(x, branch, Norm(weight, bias, 1e-5), scale=scale)
    (y.sum() + out.sum()).backward()
    assert x.grad is not None and branch.grad is not None
    assert all(p.grad is None for p in (scale, weight, bias))


def test_gradients_are_added_to_main_grad() -> None:
    """As Transformer Engine does: Megatron's hook finds the mark and adds nothing more."""
    x, branch, scale, weight, bias = rows(), rows(), draw(C), draw(C), draw(C)
    kernels.add_branch_and_norm(x, branch, Norm(weight, bias, 1e-5), scale=scale)[0].square().sum().backward()
    wanted = [p.grad.clone() for p in (scale, weight, bias)]
    for parameter in (scale, weight, bias):
        parameter.grad, parameter.main_grad = None, torch.ones(C)
        parameter.grad_added_to_main_grad = False
    norm = Norm(weight, bias, 1e-5, accumulate=True)
    kernels.add_branch_and_norm(x, branch, norm, scale=scale)[0].square().sum().backward()
    for parameter, gradient in zip((scale, weight, bias), wanted, strict=True):
        torch.testing.assert_close(parameter.main_grad, 1 + gradient.float())
        assert parameter.grad_added_to_main_grad and parameter.grad is not None


def test_packed_gradients_are_joined_without_a_copy() -> None:
    """Slices of one buffer in the order of the packed input are that buffer; anything else is put together."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, together):
            ctx.together, ctx.like = together, q
            return q + k + v

        @staticmethod
        def backward(ctx, g):
            buffer = torch.randn(*g.shape[:-1], 3, g.shape[-1], dtype=g.dtype)
            seen.append(buffer)
            slices = buffer.unbind(-2)
            return (*(slices if ctx.together else (s.clone() for s in slices)), None)

    for together in (True, False):
        seen: list[Tensor] = []
        packed = draw(S, T, 2, 3, 4)
        out = Attention.apply(*kernels.split_packed(packed * 1, -2), together)
        handed = []
        out.grad_fn.next_functions[0][0].register_hook(
            lambda found, _given, handed=handed: handed.extend(found)
        )
        out.sum().backward()
        assert torch.equal(packed.grad, seen[0])
        assert (handed[0].data_ptr() == seen[0].data_ptr()) == together


def test_cut_parts_are_contiguous_and_have_the_same_values() -> None:
    packed = draw(S, T, 2, 3, 4)
    for part, view in zip(kernels.cut_packed(packed, -2), kernels.split_packed(packed, -2), strict=True):
        assert part.is_contiguous() and not view.is_contiguous() and torch.equal(part, view)


def test_attention_of_transformer_engine_is_recognized() -> None:
    class Theirs(torch.nn.Module):
        pass

    assert packed_attention._te_attention(torch.nn.Module()) is None
    Theirs.__module__ = packed_attention._TE_MODULE
    with pytest.raises(ImportError):  # it is one, and on this machine there is none to import
        packed_attention._te_attention(type("Megatrons", (Theirs,), {})())


def test_triton_kernels_agree_with_torch() -> None:
    program = Path(__file__).with_name("triton_check.py")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, check=False,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    worst = json.loads(done.stdout.splitlines()[-1])
    assert len(worst) == 21
    for name, difference in worst.items():
        assert difference < WORST[name.split()[1]], name
