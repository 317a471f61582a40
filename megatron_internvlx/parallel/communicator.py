"""Megatron's pipeline communication, with message lengths that the receiver computes.

Megatron exchanges the shape of every variable-length message first, which makes the host wait for
the device. Here the receiver computes it: in variable mode from the micro-batch's plan, which is on
the host of every stage before the sender has finished, and in static mode from the budgets alone. No
shape message is ever sent.

For a frozen vision encoder the carried features have no gradient. They then travel in the same message
but outside of autograd: Megatron's schedule sees a tensor of decoder rows, whose gradient has those rows
only, and nothing is padded or sent back for the features. See `boundary.attach_carried`.

The receiver reads the plan before the message comes. That cannot block the pipeline: the loading rank
sends a micro-batch's plan when it starts its forward pass, before any other rank can send an output of that
micro-batch.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_internvlx.parallel.boundary import BoundaryFormat, attach_carried, take_carried
from megatron_internvlx.parallel.device_plan import DevicePlan
from megatron_internvlx.parallel.layout import BoundaryContent
from megatron_internvlx.parallel.schedule import MessageOrder, message_order, repeat_runs

FORWARD, BACKWARD = "forward", "backward"


class PipelineStage(Protocol):
    """Attributes that a model chunk of this rank must have; see `model.internvlx.InternVLX`."""

    pg_collection: ProcessGroupCollection
    config: TransformerConfig
    vp_stage: int | None
    training: bool
    boundary: BoundaryFormat
    content_in: BoundaryContent


@dataclass
class Traffic:
    """Messages received over one boundary in one direction."""

    messages: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Incoming:
    """Chunk and sizes of the next message; `rows` decoder rows and `carried` rows on this rank."""

    chunk: int
    rows: int
    carried: int


class BoundaryCommunicator(P2PCommunicator):
    """Communicator for the `p2p_communicator` of Megatron's `pretrain`.

    It is created before Megatron's groups exist: the first added stage provides the group and the config.

    Args:
        micro_batches: function that gives the number of micro-batches of one run of the schedule, in training (True)
            or evaluation (False).
        upcoming: function of (chunk, training, least) that gives the number and the plan of the next micro-batch that
            the chunk has not consumed and whose number is at least `least`. Not called in static mode.
    """

    def __init__(
        self,
        micro_batches: Callable[[bool], int],
        upcoming: Callable[[int, bool, int], tuple[int, DevicePlan]],
    ) -> None:
        self.micro_batches, self.upcoming = micro_batches, upcoming
        self.stages: dict[int, PipelineStage] = {}
        self.traffic: dict[tuple[int, str], Traffic] = defaultdict(Traffic)
        """Received, by (boundary, direction); boundary b follows virtual stage b of the model."""
        # Rows of the outputs sent, by chunk, for the gradients that will come back for them.
        self._awaited: dict[int, deque[int]] = defaultdict(deque)
        # Number of the latest micro-batch whose input was asked for, by chunk and mode.
        self._asked: dict[tuple[int, bool], int] = {}
        self._incoming: Incoming | None = None
        # With overlapped communication no one waits for a send at once: the last two must stay in memory.
        self._sending: deque[Tensor] = deque(maxlen=2)

    def add(self, stage: PipelineStage) -> None:
        """Add a model chunk of this rank, after it is built."""
        if not self.stages:
            super().__init__(stage.pg_collection.pp, stage.config)
            self._input_chunks = self._chunks(lambda order: order.receive_forward)
            self._output_chunks = self._chunks(lambda order: order.send_forward)
            self._gradient_chunks = self._chunks(lambda order: order.receive_backward)
        self.stages[stage.vp_stage or 0] = stage

    @property
    def training(self) -> bool:
        """Whether the present run of the schedule is training."""
        return self.stages[0].training

    def _chunks(self, direction: Callable[[MessageOrder], list[int]]) -> Iterator[int]:
        if self.virtual_pipeline_model_parallel_size is None:
            return repeat(0)
        return repeat_runs(lambda: direction(self._order()))

    def _order(self) -> MessageOrder:
        return message_order(
            self.current_stage,
            self.total_stages,
            len(self.stages),
            self.micro_batches(self.training),
            self.config.microbatch_group_size_per_vp_stage,
        )

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: object,
        wait_on_reqs: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, object]:
        """Exchange one message per neighbour and direction, carried rows included."""
        message = self._outgoing(tensor_send_next) if tensor_send_next is not None else None
        if message is not None and not wait_on_reqs:
            self._sending.append(message)
        from_prev, from_next, requests = super()._communicate(
            tensor_send_next=message,
            tensor_send_prev=tensor_send_prev,
            recv_prev=recv_prev,
            recv_next=recv_next,
            tensor_shape=tensor_shape,
            wait_on_reqs=wait_on_reqs,
        )
        return self._split(from_prev), from_next, requests

    def _communicate_shapes(self, tensor_send_next, tensor_send_prev, recv_prev, recv_next):
        """Compute the shapes of the messages from the previous and the next rank, without communication."""
        hidden = self.config.hidden_size
        from_prev, from_next = [0, 0, 0], [0, 0, 0]
        if recv_prev:
            self._incoming = self._next_input()
            from_prev = [self._incoming.rows + self._incoming.carried, 1, hidden]
            self._count(self._incoming.chunk, FORWARD, from_prev[0])
        if recv_next:
            chunk = next(self._gradient_chunks)
            from_next = [self._awaited[chunk].popleft(), 1, hidden]
            self._count(chunk, BACKWARD, from_next[0])
        return from_prev, from_next

    def _next_input(self) -> Incoming:
        chunk = next(self._input_chunks)
        stage, key = self.stages[chunk], (chunk, self.training)
        plan = None
        if stage.boundary.budget is None:
            self._asked[key], plan = self.upcoming(chunk, self.training, self._asked.get(key, -1) + 1)
        return Incoming(chunk, *stage.boundary.local_rows(stage.content_in, plan))

    def _outgoing(self, output: Tensor) -> Tensor:
        chunk = next(self._output_chunks)
        if self.training:
            self._awaited[chunk].append(output.shape[0])
        carried = take_carried(output)
        return output if carried is None else torch.cat([output.detach(), carried])

    def _split(self, message: Tensor | None) -> Tensor | None:
        """Decoder rows of a received message, a leaf whose gradient is sent back, with the carried rows attached."""
        if message is None:
            return None
        incoming, self._incoming = self._incoming, None
        assert incoming is not None
        if not incoming.carried or self.stages[incoming.chunk].boundary.carry_gradient:
            return message
        rows, carried = message.detach().split([incoming.rows, incoming.carried])
        return attach_carried(rows.requires_grad_(), carried)

    def _count(self, chunk: int, direction: str, rows: int) -> None:
        boundary = chunk * self.total_stages + self.current_stage - (direction == FORWARD)
        traffic = self.traffic[boundary, direction]
        traffic.messages += 1
        traffic.bytes += rows * self.config.hidden_size * self.config.pipeline_dtype.itemsize
