"""What is sent lives until it has been sent, and a little of it only."""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from tests.single import single  # isort: skip  (sets Megatron up)
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_internvlx.parallel.boundary import attach_carried
from megatron_internvlx.parallel.communicator import BoundaryCommunicator


class Backend:
    """Stands for a backend that reads a message after the call, and keeps no reference to it as NCCL does not."""

    def __init__(self) -> None:
        self.messages: list[weakref.ref[torch.Tensor]] = []

    def communicate(self, **call: Any) -> tuple[None, None, list]:
        self.messages.append(weakref.ref(call["tensor_send_next"]))
        return None, None, []

    def alive(self) -> list[bool]:
        gc.collect()
        return [message() is not None for message in self.messages]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    fake = Backend()
    monkeypatch.setattr(P2PCommunicator, "_communicate", lambda _, **call: fake.communicate(**call))
    return fake


def sender() -> BoundaryCommunicator:
    """A communicator of a first stage, as far as sending asks for it; not connected to anybody."""
    single()
    communicator = BoundaryCommunicator(lambda _: 4, lambda *_: pytest.fail("nothing is received"))
    communicator.stages[0] = SimpleNamespace(training=True)
    communicator._output_chunks = iter([0] * 8)
    return communicator


def send(communicator: BoundaryCommunicator, wait: bool) -> None:
    """Rows and carried features of a frozen encoder, which nobody here keeps."""
    rows = attach_carried(torch.ones(3, 1, 4, requires_grad=True) * 1, torch.ones(2, 1, 4))
    communicator._communicate(
        tensor_send_next=rows,
        tensor_send_prev=None,
        recv_prev=False,
        recv_next=False,
        tensor_shape=None,
        wait_on_reqs=wait,
    )


def test_the_last_two_messages_stay_alive_while_nobody_waits(backend: Backend) -> None:
    """The message with carried features is a tensor of its own: nobody but the communicator holds it."""
    communicator = sender()
    for alive in ([True], [True, True], [False, True, True], [False, False, True, True]):
        send(communicator, wait=False)
        assert backend.alive() == alive


def test_a_message_that_was_waited_for_is_let_go(backend: Backend) -> None:
    send(sender(), wait=True)
    assert backend.alive() == [False]
