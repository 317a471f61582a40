"""What the recording of `test_graph_safe.py` sees of calls that make the host wait for the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.graph_recorder import HostTensors, Recorder, nothing_from_the_host, unsafe

TO_THE_HOST: dict[str, Callable[[torch.Tensor], Any]] = {
    "tolist": torch.Tensor.tolist,
    "numpy": torch.Tensor.numpy,
    "cpu": torch.Tensor.cpu,
    "pin_memory": lambda x: x.pin_memory(),
    "to a word": lambda x: x.to("cpu"),
    "to a device": lambda x: x.to(torch.device("cpu")),
    "to device=": lambda x: x.to(device="cpu"),
    "to device, type": lambda x: x.to("cpu", torch.float64),
    "to another's": lambda x: x.to(torch.zeros(1)),
}


@pytest.mark.parametrize("name", TO_THE_HOST)
def test_a_tensor_that_leaves_the_device_is_seen(name: str) -> None:
    read = TO_THE_HOST[name].__name__ if name in ("tolist", "numpy", "cpu") else None
    leave = (lambda x: getattr(x, read)()) if read else TO_THE_HOST[name]
    x = torch.ones(1)
    leave(x)
    with nothing_from_the_host():
        x.to(torch.float64)
        with pytest.raises(AssertionError, match="within a step"):
            leave(x)


NUMBERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "bool": bool,
    "int": int,
    "float": float,
    "index": lambda x: "ab"[x],
    "slice": lambda x: x.view(1)[:x],
    "if": lambda x: 1 if x else 2,
    "item": torch.Tensor.item,
    "equal": lambda x: torch.equal(x, x + 1),
    "mask": lambda x: x.view(1)[x.view(1) > 0],
    "write by mask": lambda x: x.view(1).index_put((x.view(1) > 0,), x.view(1)),
    "repeat": lambda x: x.view(1).repeat_interleave(x.view(1)),
    "unique": lambda x: x.view(1).unique(),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_a_tensor_is_seen(name: str) -> None:
    """By the operation that the host waits for, also if it is the first of a step."""
    x = torch.ones((), dtype=torch.int64)
    with Recorder() as recorder:
        NUMBERS[name](x)
    assert unsafe({"a": recorder.seen, "b": recorder.seen}).startswith("the host reads the device")


def test_other_indices_and_counts_are_no_reads() -> None:
    rows, mask = torch.tensor([1, 0]), torch.tensor([True, False])
    with Recorder() as recorder:
        mask[rows].masked_fill(mask, False)
        rows.index_put((rows,), rows).repeat_interleave(rows, output_size=1)
        rows[mask] = 0
    assert unsafe({"a": recorder.seen, "b": recorder.seen}) == ""


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_copy_of_the_host_is_seen(device: str | None) -> None:
    """In both directions; between tensors of the device it is none."""
    host, x, y = HostTensors(), torch.ones(2), torch.ones(2)
    with host.noted():
        kept, made = torch.ones(2, device=device), torch.ones(2, device=x.device)
    with Recorder(host):
        x.copy_(y)
        made.copy_(x)
        for to, what in ((kept, x), (x, kept), (kept[:1], x[:1])):
            with pytest.raises(AssertionError, match="a copy from or to the host"):
                to.copy_(what)
