"""Random numbers on CPU: exact under recompute and resume, equal over a tensor parallel group.

Seen on megatron-core 0.19.2 / torch 2.13.0.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.data.dataloader as dataloader


class _Generators:
    """Stand-in for `torch.cuda.default_generators`: any index gives the CPU's default generator."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def one_generator() -> None:
    """The "CUDA" random state is that of the CPU's default generator: one generator under both names.

    Dropout on CPU draws from the default generator, so Megatron's `CudaRNGStatesTracker.fork` (which sets
    and restores the CUDA state) changes what dropout draws only if it reaches that generator. Recompute and
    checkpoints save and restore both names at one moment, so both hold the same state and stay exact.
    What draws from the CPU's generator beside the model is the data loader; see `loaders_apart`.
    """
    generator = torch.default_generator
    functions: dict[str, Callable[..., Any]] = {
        "get_rng_state": lambda device="cuda": generator.get_state(),
        "set_rng_state": lambda new_state, device="cuda": generator.set_state(new_state),
        "manual_seed": lambda seed: generator.manual_seed(int(seed)),
        # torch.manual_seed calls this and then seeds the default generator itself.
        "manual_seed_all": lambda seed: _loader_stream.reset(),
        "initial_seed": lambda: generator.initial_seed(),
    }
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
        setattr(torch.cuda.random, name, function)
    torch.cuda.default_generators = _Generators()  # type: ignore[assignment]


class _LoaderStream:
    """The random stream of data loaders, kept apart from the model's."""

    def __init__(self) -> None:
        self.state: torch.Tensor | None = None
        self.active = False

    def reset(self) -> None:
        """Start again from torch's seed at the next use."""
        self.state = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Swap the default generator's state for the loaders' while a loader works."""
        # Other threads share the generator with a running step: swapping it there would change the model's.
        if self.active or threading.current_thread() is not threading.main_thread():
            yield
            return
        generator = torch.default_generator
        model_state = generator.get_state()
        state = self.state
        if state is None:
            state = torch.Generator().manual_seed(generator.initial_seed()).get_state()
        generator.set_state(state)
        self.active = True
        try:
            yield
        finally:
            self.active = False
            self.state = generator.get_state()
            generator.set_state(model_state)


_loader_stream = _LoaderStream()


def loaders_apart() -> None:
    """Data loaders draw from a random stream of their own.

    A loader draws a seed when it is opened, from the CPU's generator. On CUDA that is not the model's; here
    it is, so a resumed run (which opens its loader after the state was loaded), or the ranks of a tensor
    parallel group (only the first opens a loader), would draw other dropout masks.
    """
    base = dataloader._BaseDataLoaderIter
    for name in ("__init__", "__next__"):
        setattr(base, name, _in_loader_stream(getattr(base, name)))
    for cls in (dataloader._SingleProcessDataLoaderIter, dataloader._MultiProcessingDataLoaderIter):
        cls.__init__ = _in_loader_stream(cls.__init__)  # type: ignore[method-assign]


def _in_loader_stream(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _loader_stream():
            return function(*args, **kwargs)

    return call
