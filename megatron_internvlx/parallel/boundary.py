"""The tensor between two pipeline stages: decoder rows, then carried ViT features.

One 3-D tensor per message, [rows + carry, 1, h] (Megatron's schedules move exactly one). The
features [T, L, c] are flattened and cut into rows of width h; under sequence parallelism every
TP rank sends its share of both parts. Features are carried, not projections: T*L*c elements
whatever the number of injections, and each projector stays on the stage of its layer.

For a frozen vision encoder the features have no gradient. They are then attached to the tensor of
decoder rows, outside of autograd; `communicator.py` puts both into the message and takes them apart,
so that the gradient that goes back has the decoder rows only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_internvlx.parallel.device_plan import DevicePlan
from megatron_internvlx.parallel.layout import BoundaryContent, carried_rows


@dataclass(frozen=True)
class Budget:
    """Sizes to which every micro-batch is padded in static mode."""

    shallow: int
    """Rows of the shallow phase."""
    deep: int
    """Rows of the deep phase."""
    tiles: int
    """Tiles of features in a message."""


def attach_carried(rows_S1h: Tensor, carried_C1h: Tensor) -> Tensor:
    """Attach features without gradient to the rows, outside of autograd; see `take_carried`."""
    rows_S1h.carried = carried_C1h  # type: ignore[attr-defined]
    return rows_S1h


def take_carried(rows_S1h: Tensor) -> Tensor | None:
    """Remove and return the attached features, or None."""
    return rows_S1h.__dict__.pop("carried", None)


class BoundaryFormat:
    """Packing and unpacking of boundary tensors.

    Args:
        hidden_size: h, width of the decoder.
        vision_hidden_size: c, width of the vision encoder.
        vision_tokens: L = 1 + P*P, tokens per tile of the vision encoder.
        sequence_parallel: whether rows are sharded over `group`.
        group: tensor-parallel group.
        carry_gradient: whether the carried features have a gradient.
        budget: sizes in static mode; None for the sizes of the micro-batch's plan.
    """

    def __init__(
        self,
        hidden_size: int,
        vision_hidden_size: int,
        vision_tokens: int,
        *,
        sequence_parallel: bool,
        group: torch.distributed.ProcessGroup,
        carry_gradient: bool = True,
        budget: Budget | None = None,
    ) -> None:
        self.hidden_size = hidden_size
        self.vision_hidden_size, self.vision_tokens = vision_hidden_size, vision_tokens
        self.sequence_parallel, self.group = sequence_parallel, group
        self.shards = group.size() if sequence_parallel else 1
        self.carry_gradient, self.budget = carry_gradient, budget

    def carry_rows(self, tiles: int) -> int:
        """Rows of width h that `tiles` tiles of features fill, padded to whole shards."""
        elements = tiles * self.vision_tokens * self.vision_hidden_size
        return carried_rows(elements, self.hidden_size, self.shards)

    def local_rows(self, content: BoundaryContent, plan: DevicePlan | None) -> tuple[int, int]:
        """(decoder rows, carried rows) of this rank's message; with a budget the plan is not needed."""
        if self.budget is not None:
            length = self.budget.deep if content.deep else self.budget.shallow
            tiles = self.budget.tiles
        else:
            assert plan is not None
            length = (plan.deep if content.deep else plan.shallow).length
            tiles = plan.encoded_tiles
        carry = self.carry_rows(tiles) if content.carry else 0
        return length // self.shards, carry // self.shards

    def join(
        self, rows_S1h: Tensor, features_TLc: Tensor | None, content: BoundaryContent, plan: DevicePlan
    ) -> Tensor:
        """Pack decoder rows and, if the boundary carries them, features into the tensor that the schedule sends."""
        if content.carry:
            assert features_TLc is not None
            carry = self._flatten(features_TLc, self.local_rows(content, plan)[1], rows_S1h.dtype)
            if self.carry_gradient:
                rows_S1h = torch.cat([rows_S1h, carry])
        # Megatron frees the data of a sent tensor, which must therefore be no view.
        out = make_viewless_tensor(rows_S1h, requires_grad=rows_S1h.requires_grad, keep_graph=True)
        return attach_carried(out, carry.detach()) if content.carry and not self.carry_gradient else out

    def _flatten(self, features_TLc: Tensor, local_rows: int, dtype: torch.dtype) -> Tensor:
        """Reshape features to rows of width h, this rank's share: [local_rows, 1, h]."""
        flat = features_TLc.reshape(-1).to(dtype)
        missing = local_rows * self.shards * self.hidden_size - flat.numel()
        carry = torch.nn.functional.pad(flat, (0, missing)).view(-1, 1, self.hidden_size)
        if self.sequence_parallel:
            carry = scatter_to_sequence_parallel_region(carry, group=self.group)
        return carry

    def split(
        self, message: Tensor, content: BoundaryContent, plan: DevicePlan
    ) -> tuple[Tensor, Tensor | None]:
        """Unpack a received tensor into decoder rows [S, 1, h] and features [T, L, c] (or None)."""
        rows, carried = self.local_rows(content, plan)
        attached = take_carried(message)
        received = message.shape[0] + (attached.shape[0] if attached is not None else 0)
        if received != rows + carried:
            raise RuntimeError(
                f"boundary before layer {content.next_layer}: received {received} rows, expected "
                f"{rows} decoder rows and {carried} carried rows"
            )
        if not content.carry:
            return message, None
        rows_S1h, carry = (message, attached) if attached is not None else message.split([rows, carried])
        if self.sequence_parallel:
            # All ranks compute the same gradient of the features, so each keeps its share.
            carry = gather_from_sequence_parallel_region(
                carry, tensor_parallel_output_grad=False, group=self.group
            )
        shape = (plan.encoded_tiles, self.vision_tokens, self.vision_hidden_size)
        elements = shape[0] * shape[1] * shape[2]
        return rows_S1h, carry.reshape(-1)[:elements].view(shape)
