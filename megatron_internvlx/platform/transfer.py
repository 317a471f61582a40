"""Copies that do not wait, and how to wait for them later."""

import torch

from megatron_internvlx.platform import backend, device


def to_device(host: torch.Tensor) -> torch.Tensor:
    """Copy a host tensor to this rank's device; through pinned memory, so asynchronously, on a GPU."""
    if backend() == "gloo":
        return host
    return host.pin_memory().to(device(), non_blocking=True)


class Marker:
    """A point in the current queue of the device, to wait for later; nothing without a GPU."""

    def __init__(self) -> None:
        self._event = None if backend() == "gloo" else torch.cuda.Event()
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Until the device has done what it was given before the mark."""
        if self._event is not None:
            self._event.synchronize()
