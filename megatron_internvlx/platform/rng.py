"""Random numbers on CPU: reproducible under recomputation and resuming, equal in a tensor-parallel group.

`keep_random_state` serves on GPUs as well. Seen on megatron-core 0.19.2 / torch 2.13.0.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.data.dataloader as dataloader


def keep_random_state() -> Callable[[], None]:
    """Copy the state of every generator that a training step draws from; returns a function that sets them back.

    Megatron's tracker has states of bytes, or generators when steps are recorded as CUDA graphs. The functions with
    which it copies itself for recomputation keep those generators, whose positions move on.
    """
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    positions = {
        name: state.get_state() for name, state in states.items() if isinstance(state, torch.Generator)
    }
    of_cpu, of_device = torch.get_rng_state(), torch.cuda.get_rng_state()

    def set_back() -> None:
        torch.set_rng_state(of_cpu)
        torch.cuda.set_rng_state(of_device)
        for name, position in positions.items():
            states[name].set_state(position)
        tracker.set_states(dict(states))

    return set_back


class _Generators:
    """Replacement of `torch.cuda.default_generators`: every index returns the CPU's default generator."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def share_one_generator() -> None:
    """Use the CPU's default generator for the "CUDA" random state: one generator under both names.

    Dropout on CPU draws from the default generator, so Megatron's `CudaRNGStatesTracker.fork`, which sets and
    restores the CUDA state, must set this generator to have an effect on dropout. Recomputation and checkpoints
    save and restore both states at the same moment, so both are equal and random numbers stay reproducible.
    Only the data loader draws from the CPU's generator besides the model; see `separate_loader_stream`.
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
    """Random state of the data loaders, separate from the model's."""

    def __init__(self) -> None:
        self.state: torch.Tensor | None = None
        self.active = False

    def reset(self) -> None:
        """Restart from torch's seed at the next use."""
        self.state = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Context in which the default generator has the loaders' state."""
        # A thread shares the generator with the running step: swapping its state there would affect the model.
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


def separate_loader_stream() -> None:
    """Give data loaders a random state of their own.

    A loader draws a seed from the CPU's generator when it is opened. On CUDA the model uses another generator;
    here it is the same one. Without this patch dropout masks would differ after a resume (which opens the loader
    after the state was loaded) and within a tensor-parallel group (only the first rank opens a loader).
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
