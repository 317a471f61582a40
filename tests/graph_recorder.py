"""Records what a step does, and says what of it no CUDA graph could repeat for other values.

On the CPU the device is the host: what only a GPU run would show as a wait or a copy is refused by the words with
which it is asked for. Not seen are copies from or to tensors of the host that were not made by one of
`HostTensors.FACTORIES` while those were noted.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result the host waits for, or whose shape depends on values.
READS = re.compile(
    r"aten\.(_local_scalar_dense|nonzero|masked_select|_unique2|unique_dim|unique_consecutive|bincount|equal)\b"
    r"|aten\.is_nonzero\b|aten\.repeat_interleave\.Tensor(?!.*'output_size' \d)"
    # A number written by a mask, `x[mask] = 0` as Megatron's embedding has it, is a masked fill, backward too.
    r"|masked aten\.index(?!_put_?\.default .* torch\.\w+\[\]\[\]$)"
)

# Megatron compares states of the host's generator, which on CPU are tensors of the device.
HOST_STATE = f"aten.all.default torch.bool[{len(torch.get_rng_state())}]"


class HostTensors:
    """Tensors that a GPU run would have on the host: made without a device, or for "cpu".

    On the CPU their device says nothing, so that they are noted when they are made, and kept, so that no other gets
    their address. A `torch.device` is taken for the run's own, which on the CPU is the same. A tensor that is moved
    later stays one of the host's here, as on the CPU its storage does.
    """

    FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn")

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []
        self.addresses: set[int] = set()

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self.addresses

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within it they are noted."""

        def noting(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def made(*args: Any, **kwargs: Any) -> torch.Tensor:
                result = make(*args, **kwargs)
                if kwargs.get("device") in (None, "cpu") and result.numel():
                    self.kept.append(result)
                    self.addresses.add(result.untyped_storage().data_ptr())
                return result

            return made

        makers = {name: noting(getattr(torch, name)) for name in self.FACTORIES}
        with mock.patch.multiple(torch, **makers):
            yield


class Recorder(TorchDispatchMode):
    """Notes every operation: its name, the shapes and types of its tensors, its other arguments."""

    def __init__(self, host: HostTensors | None = None) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.host = host or HostTensors()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            ends = [value for value in args[:2] if value in self.host]
            assert not ends, f"a copy from or to the host within a step: {describe(args)}"
        shown = [describe(value) for value in (*args, *(kwargs or {}).items())]
        masked = "masked " if any(map(holds_mask, args)) else ""
        self.seen.append(f"{masked}{function} {' '.join(shown)}")
        return function(*args, **(kwargs or {}))


def holds_mask(value: Any) -> bool:
    """Whether these are indices with a mask among them, whose count the host must know."""
    masks = (torch.bool, torch.uint8)
    return isinstance(value, list | tuple) and any(
        isinstance(part, torch.Tensor) and part.dtype in masks for part in value
    )


def describe(value: Any) -> str:
    """A tensor by its shape, type and strides; anything else by what it is."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}{list(value.stride())}"
    if isinstance(value, list | tuple):
        return f"[{' '.join(describe(part) for part in value)}]"
    if isinstance(value, torch.Generator):
        return "generator"
    # Process groups and their options come as objects, which have addresses.
    return (
        repr(value)
        if isinstance(value, int | float | str | bool | torch.dtype | None)
        else type(value).__name__
    )


@contextmanager
def nothing_from_the_host(*, warm: bool = False) -> Iterator[None]:
    """Fails where a tensor is made of numbers of the host, for the device: a graph cannot copy from ordinary memory.

    On the CPU the device is the host, and no operation tells. Nor does one for a read by `.cpu()` or `.to()`: in a
    step no tensor has to change its device, so that whoever names one reads, or copies from the host.

    Args:
        warm: the step comes before those that a graph repeats, and may move tables to the device.
    """
    make, move = torch.tensor, torch.Tensor.to

    def tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
        assert kwargs.get("device") is None, f"torch.tensor{args} is copied to the device within a step"
        return make(*args, **kwargs)

    def refused(*args: Any, **_: Any) -> torch.Tensor:
        raise AssertionError(f"an array of the host becomes a tensor within a step: {args}")

    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("the host reads a tensor within a step")

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kinds = (str, torch.device, torch.Tensor)
        named = [value for value in (*args, *kwargs.values()) if isinstance(value, kinds)]
        assert warm or not named, f"a tensor is moved from or to the host within a step: .to({named[0]})"
        return move(self, *args, **kwargs)

    # Of a tensor on the CPU these are no operations, which a recording would show.
    reads = {"tolist": read, "numpy": read, "cpu": read, "pin_memory": read, "to": to}
    with (
        mock.patch.multiple(torch, tensor=tensor, as_tensor=refused, from_numpy=refused),
        mock.patch.multiple(torch.Tensor, **reads),
    ):
        yield


def unsafe(seen: dict[str, list[str]]) -> str:
    """What a graph of one pack would do wrong for another, or cannot do at all; "" if nothing."""
    first, *others = seen.values()
    for before, name in pairwise(["", *first]):
        if READS.search(name) and not before.startswith(HOST_STATE):
            return f"the host reads the device: {name}"
    for other in others:
        for ours, theirs in zip(first, other, strict=False):
            if ours != theirs:
                return f"{ours} | {theirs}"
        if len(first) != len(other):
            return f"{len(first)} operations | {len(other)}"
    return ""
