"""Counts the operations of a micro-batch as a GPU would run them: what one kernel does there counts once.

Linear layers, norms, attention, rotary embedding, SwiGLU and loss of Transformer Engine are stood in for by functions
of one operation each way (two backward for a linear layer, whose bias costs none). Views and allocations count
nothing. Everything else is what torch dispatches, the additions to `main_grad` included.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tests.single import single  # noqa: F401  isort: skip  (sets Megatron up)
import torch
from megatron.core.tensor_parallel import layers
from megatron.core.transformer import attention, mlp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_internvlx.model import norm
from megatron_internvlx.model.attention import GraphSafeAttention, PackedDotProductAttention

NO_KERNEL = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
)


class Operations(TorchDispatchMode):
    """Counts what is dispatched while it is on, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.inside = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        returns = [r.alias_info for r in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in returns)
        if not self.inside and not view and name not in NO_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def one(self, name: str, count: int = 1) -> Iterator[None]:
        """What runs inside counts as `count` of this name."""
        if not self.inside:
            self.counts[name] += count
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def fused(self, name: str, function: Callable[..., Tensor], backward: int = 1) -> Callable[..., Tensor]:
        """`function` as one operation forward and so many backward."""
        outer = self

        class Fused(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs):
                with outer.one(name), torch.enable_grad():
                    own = [
                        x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
                        for x in inputs
                    ]
                    ctx.own, ctx.out = own, function(*own)
                return ctx.out.detach()

            @staticmethod
            def backward(ctx: Any, gradient):
                with outer.one(f"{name}_backward", backward), torch.enable_grad():
                    wanted = [x for x in ctx.own if isinstance(x, Tensor) and x.requires_grad]
                    found = iter(torch.autograd.grad(ctx.out, wanted, gradient))
                    return tuple(
                        next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in ctx.own
                    )

        return Fused.apply


def accumulate(model: nn.Module) -> None:
    """Gradients go to `main_grad` as Megatron's data parallelism has it."""

    def hook(parameter: nn.Parameter) -> None:
        if not parameter.grad_added_to_main_grad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad, parameter.grad_added_to_main_grad = None, False

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.main_grad = torch.zeros_like(parameter)
            parameter.grad_added_to_main_grad = False
            parameter.register_post_accumulate_grad_hook(hook)


def _packed_gradients(
    mode: Operations, function: Callable[..., Tensor], joins: bool
) -> Callable[..., Tensor]:
    """Attention whose gradients are slices of one buffer if its inputs are and it `joins`; else a buffer each.

    Transformer Engine's joins, torch's does not.
    """

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *qkv):
            with mode.one("attention"), torch.enable_grad():
                ctx.own = [x.detach().requires_grad_() for x in qkv]
                ctx.out = function(*ctx.own)
            ctx.packed = joins and len({x.untyped_storage().data_ptr() for x in qkv}) == 1
            return ctx.out.detach()

        @staticmethod
        def backward(ctx: Any, gradient):
            with mode.one("attention_backward"):
                found = torch.autograd.grad(ctx.out, ctx.own, gradient)
                return (
                    torch.stack(found, -2).unbind(-2) if ctx.packed else tuple(x.contiguous() for x in found)
                )

    return Attention.apply


@contextlib.contextmanager
def as_on_a_gpu(fused_accumulation: bool) -> Iterator[Operations]:
    """Within it Megatron's local modules run, and count, as Transformer Engine's do on a GPU.

    Args:
        fused_accumulation: linear layers whose config says so add their weight's gradient to `main_grad`.
    """
    mode = Operations()
    patched: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        patched.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    plain = mode.fused("linear", torch.nn.functional.linear, backward=2)

    class Accumulating(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x, weight, bias):
            ctx.save_for_backward(x, weight)
            ctx.weight, ctx.bias = weight, bias is not None
            with mode.one("linear"):
                return torch.nn.functional.linear(x, weight, bias)

        @staticmethod
        def backward(ctx: Any, gradient):
            x, weight = ctx.saved_tensors
            with mode.one("linear_backward", 2):
                rows = gradient.flatten(0, -2)
                ctx.weight.main_grad.add_(rows.t() @ x.flatten(0, -2))
                ctx.weight.grad_added_to_main_grad = True
                return gradient @ weight, torch.empty_like(weight), rows.sum(0) if ctx.bias else None

    def forward(self, x, weight=None, runtime_gather_output=None):
        weight = self.weight if weight is None else weight
        bias = None if self.skip_bias_add else self.bias
        adds = fused_accumulation and self.config.gradient_accumulation_fusion
        out = (Accumulating.apply if adds else plain)(x, weight, bias)
        return out, self.bias if self.skip_bias_add else None

    attend = PackedDotProductAttention.forward

    def attention_forward(self, query, key, value, mask, packed_seq_params=None, **kwargs):
        def function(q, k, v):
            return attend(self, q, k, v, mask, packed_seq_params=packed_seq_params, **kwargs)

        joins = not isinstance(self, GraphSafeAttention)
        return _packed_gradients(mode, function, joins)(query, key, value)

    def rotary(x, *args, **kwargs):
        return mode.fused("rope", lambda y: rotate(y, *args, **kwargs))(x)

    rotate = attention.apply_rotary_pos_emb
    swiglu = mode.fused("swiglu", lambda x: torch.nn.functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1])
    put(layers.ColumnParallelLinear, "forward", forward)
    put(layers.RowParallelLinear, "forward", forward)
    put(PackedDotProductAttention, "forward", attention_forward)
    put(attention, "apply_rotary_pos_emb", rotary)
    put(mlp, "bias_swiglu_impl", lambda x, *_: swiglu(x))
    for one in (norm.RMSNorm, norm.LayerNorm):
        put(one, "forward", _fused_norm(mode, one.forward))
    with contextlib.suppress(ImportError):
        from megatron_internvlx.platform import kernels

        put(kernels, "implementation", lambda x, find=kernels.implementation: _OneEach(mode, find(x)))
    try:
        yield mode
    finally:
        for owner, name, value in reversed(patched):
            setattr(owner, name, value)


def _fused_norm(mode: Operations, forward: Callable) -> Callable:
    def run(self, x):
        names, values = zip(*self.named_parameters(), strict=True)

        def function(x, *parameters):
            with contextlib.ExitStack() as stack:
                for name, value in zip(names, parameters, strict=True):
                    own = self._parameters[name]
                    self._parameters[name] = value
                    stack.callback(self._parameters.__setitem__, name, own)
                return forward(self, x)

        return mode.fused("norm", function)(x, *values)

    return run


class _OneEach:
    """The fused kernels, each counted as one operation."""

    def __init__(self, mode: Operations, module: Any) -> None:
        self.mode, self.module = mode, module

    def __getattr__(self, name: str) -> Callable:
        function = getattr(self.module, name)

        def run(*args):
            with self.mode.one(name):
                return function(*args)

        return run
