"""Finds operations that make the host wait for a GPU, while running on a CPU.

On a GPU each of these copies a value to the host and so waits for all work before it. Here they are
noticed by name: in Python (`Tensor.item`, `.tolist`, `if tensor`, ...) and where PyTorch dispatches them
(indexing with a boolean mask, `nonzero`, ...), backward included.
"""

import traceback
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = {
    "item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "equal", "allclose", "argwhere",
    "__bool__", "__int__", "__float__", "__index__", "__contains__", "is_nonzero", "unique_consecutive",
}  # fmt: skip
OPERATIONS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "equal", "is_nonzero", "bincount", "repeat_interleave",
}  # fmt: skip


def _where() -> str:
    """The lines of ours and of Megatron's that led here."""
    frames = [f for f in traceback.extract_stack() if "megatron" in f.filename and "waits" not in f.filename]
    return " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in reversed(frames[-3:]))


def _note(found: list[str], name: str) -> None:
    where = _where()
    # States of random generators are on the host, those of a GPU's generators too.
    if not where.startswith(("random.py", "rng.py")):
        found.append(f"{name} at {where}")


class _Calls(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in METHODS:
            _note(self.found, name)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in OPERATIONS or (name.startswith("index") and self._by_mask(name, args)):
            _note(self.found, name)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _by_mask(name: str, args: tuple[Any, ...]) -> bool:
        if len(args) < 2 or not isinstance(args[1], list | tuple):
            return False
        masks = [x for x in args[1] if isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)]
        # Writing one value under a mask becomes masked_fill, which does not wait.
        one_value = name.startswith("index_put") and args[2].numel() == 1
        return bool(masks) and not one_value


class Waits(ExitStack):
    """A context that notes waits in `found`, with the lines that caused them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operations = 0

    def __enter__(self) -> "Waits":
        super().__enter__()
        self.enter_context(_Operations(self.found))
        self.enter_context(_Calls(self.found))
        return self
