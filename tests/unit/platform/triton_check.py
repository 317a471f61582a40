"""Run as a program with TRITON_INTERPRET=1: every Triton kernel against torch's operations, on CPU tensors.

Prints one line of JSON: the worst difference of each kernel, relative to the largest number of its result.
"""

import itertools
import json
from unittest import mock

import torch
from torch import Tensor

from megatron_internvlx.platform import kernels, kernels_torch, kernels_triton
from megatron_internvlx.platform.kernels import Norm

S, T, C = 7, 3, 24


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def compare(name: str, call, worst: dict[str, float]) -> None:
    """`call(module)` gives tensors; both modules' must be alike in shape, type and numbers."""
    for found, wanted in zip(call(kernels_triton), call(kernels_torch), strict=True):
        assert found.numel() == wanted.numel() and (found.dtype == wanted.dtype or not found.numel()), name
        if found.numel():
            found, wanted = found.double().flatten(), wanted.double().flatten()
            away = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3))
            worst[name] = max(worst.get(name, 0.0), away)


def sums_of(wanted: list[bool], dtype: torch.dtype, add: bool) -> list[Tensor | None]:
    return [
        torch.full((C,), float(add), dtype=torch.float32 if add else dtype) if w else None for w in wanted
    ]


def add_norms(dtype: torch.dtype, worst: dict[str, float]) -> None:
    """Every combination of parts."""
    keep = torch.tensor([1.0, 0.0, 1.0], dtype=dtype).view(1, T, 1)
    for number, parts in enumerate(itertools.product((True, False), repeat=6)):
        branched, scaled, kept, normed, rms, passed = parts
        if not (branched or normed) or (not branched and (scaled or kept)) or (rms and not normed):
            continue
        x, branch, g_y, g_out = (draw(S, T, C, dtype=dtype) for _ in range(4))
        scale = draw(C, dtype=dtype) if scaled else None
        weight = draw(C, dtype=dtype) if normed else None
        bias = draw(C, dtype=dtype) if normed and not rms else None
        mask = keep if kept else None
        parts = (branch if branched else None, scale, mask, 0.75, weight, bias)

        def forward(module, x=x, parts=parts, rms=rms):
            return module.add_norm(x, *parts, 1e-6, rms)

        compare(f"add_norm {dtype}", lambda module, forward=forward: forward(module)[:2], worst)
        if not passed and not normed:
            continue
        grads = (g_y if normed else None, g_out if passed or not normed else None)

        def backward(
            module,
            grads=grads,
            x=x,
            parts=parts,
            forward=forward,
            number=number,
            add=number % 3 == 0,
            rms=rms,
        ):
            branch, scale, mask, rate, weight, bias = parts
            wanted = [part is not None and number % 2 == 0 for part in (scale, weight, bias)]  # else frozen
            sums = sums_of(wanted, dtype, add)
            branch_dtype = None if branch is None else branch.dtype
            statistics = forward(module)[2:]
            found = module.add_norm_backward(
                *grads, x, branch, scale, mask, rate, weight, bias, *statistics, rms, branch_dtype, sums, add
            )
            return [*found, *(s for s in sums if s is not None)]

        compare(f"add_norm_backward {dtype}", backward, worst)


# Of residual, branch, scale, weight and bias those that want a gradient; the others are frozen.
WANTED = ("branch", "residual", "residual branch", "branch scale", "branch weight bias", "scale weight")
# Of weight, bias and scale those that there are.
PARTS = ("weight bias scale", "weight scale", "weight bias", "scale")


def frozen_parts(dtype: torch.dtype, worst: dict[str, float]) -> None:
    """Through autograd, which hands the kernels only the tensors that it kept for the gradients that are wanted."""
    made = {name: draw(S, T, C, dtype=dtype) for name in ("residual", "branch")}
    made |= {name: draw(C, dtype=dtype) for name in ("scale", "weight", "bias")}
    for wanted, parts in itertools.product(WANTED, PARTS):

        def gradients(module, wanted=wanted, parts=parts):
            inputs = {name: x.clone().requires_grad_(name in wanted.split()) for name, x in made.items()}
            given = {
                name: inputs[name] if name in parts.split() else None for name in ("scale", "weight", "bias")
            }
            rows, scale = (inputs["residual"], inputs["branch"]), given["scale"]
            with mock.patch.object(kernels, "implementation", lambda _: module):
                if given["weight"] is None:
                    outputs = (kernels.add_branch(*rows, scale=scale),)
                else:
                    norm = Norm(given["weight"], given["bias"], 1e-6)
                    outputs = kernels.add_branch_and_norm(*rows, norm, scale=scale)
                if outputs[0].requires_grad:
                    sum(out.float().square().sum() for out in outputs).backward()
            return [x.grad for x in inputs.values() if x.grad is not None]

        compare(f"frozen_parts {dtype}", gradients, worst)


def others(dtype: torch.dtype, worst: dict[str, float]) -> None:
    gate, up, g = (draw(5, 300, dtype=dtype) for _ in range(3))
    compare(f"gated_silu {dtype}", lambda m: [m.gated_silu(gate, up)], worst)
    compare(f"gated_silu_backward {dtype}", lambda m: m.gated_silu_backward(g, gate, up), worst)
    for keys, heads in ((4, 2), (3, 2), (16, 4)):
        q, g = (draw(5, C, dtype=dtype) for _ in range(2))
        k, v = (draw(5, keys, C, dtype=dtype) for _ in range(2))
        pack = (q, k, v, heads)
        compare(f"window_attention {dtype}", lambda m, pack=pack: [m.window_attention(*pack)], worst)
        compare(
            f"window_attention_backward {dtype}",
            lambda m, g=g, pack=pack: m.window_attention_backward(g, *pack),
            worst,
        )
    x, *grads = (draw(9, C, dtype=dtype) for _ in range(5))
    weights = (draw(C, dtype=dtype), draw(C, dtype=dtype))
    compare(f"twin_norm {dtype}", lambda m: m.twin_norm(x, *weights, 1e-6)[:2], worst)
    for add in (True, False):

        def backward(module, add=add):
            sums = sums_of([True, True], dtype, add)
            rstd = module.twin_norm(x, *weights, 1e-6)[2]
            return [module.twin_norm_backward(*grads, x, *weights, rstd, sums, add), *sums]

        compare(f"twin_norm_backward {dtype}", backward, worst)


def losses(dtype: torch.dtype, worst: dict[str, float]) -> None:
    """Rows of one block and of several, whose maximum is in the last, and a shard with some of the targets."""
    for width, first, targets in ((40, 0, [0, 35, 39]), (40, 30, [29, 30, 69, 70]), (9000, 0, [8999, 7])):
        targets = torch.tensor(targets)
        logits = (draw(len(targets), width) * 3 + torch.linspace(-20, 20, width)).to(dtype)
        g = draw(len(targets))
        compare(
            f"cross_entropy {dtype}", lambda m, x=logits, t=targets, f=first: m.cross_entropy(x, t, f), worst
        )

        def backward(module, x=logits, t=targets, f=first, g=g):
            _, maximum, total, _ = module.cross_entropy(x, t, f)
            gradient = x.clone()
            module.cross_entropy_backward(g, gradient, t, f, maximum, total)
            return [gradient]

        compare(f"cross_entropy_backward {dtype}", backward, worst)
    none = draw(0, 40, dtype=dtype)
    compare(f"cross_entropy {dtype}", lambda m: m.cross_entropy(none, targets[:0], 0), worst)


if __name__ == "__main__":
    torch.manual_seed(0)
    found: dict[str, float] = {}
    frozen_parts(torch.float32, found)
    for kind in (torch.float32, torch.bfloat16):
        add_norms(kind, found)
        others(kind, found)
        losses(kind, found)
    print(json.dumps(found))
