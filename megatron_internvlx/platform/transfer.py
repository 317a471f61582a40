"""Host to device copies that do not wait."""

from contextlib import AbstractContextManager, nullcontext

import torch

from megatron_internvlx.platform import backend, device


def to_device(host: torch.Tensor) -> torch.Tensor:
    """Copy a host tensor to this rank's device; through pinned memory, so asynchronously, on a GPU."""
    if backend() == "gloo":
        return host
    return host.pin_memory().to(device(), non_blocking=True)


def side_stream() -> AbstractContextManager:
    """A queue of the device beside that of training, for the thread that enters it."""
    return nullcontext() if backend() == "gloo" else torch.cuda.stream(torch.cuda.Stream())
