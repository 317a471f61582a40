"""The tensor between two pipeline stages: decoder rows, then carried ViT features.

One 3-D tensor per message, [rows + carry, 1, h] (Megatron's schedules move exactly one). The
features [T, L, c] are flattened and cut into rows of width h; under sequence parallelism every
TP rank sends its share of both parts. Features are carried, not projections: T*L*c elements
whatever the number of injections, and each projector stays on the stage of its layer.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_internvlx.parallel.batch import DevicePhase, DevicePlan
from megatron_internvlx.parallel.layout import BoundaryContent


class BoundaryFormat:
    """Packs and unpacks boundary tensors.

    Args:
        hidden_size: h. vision_hidden_size: c. vision_tokens: L = 1 + P*P.
        sequence_parallel: whether rows are sharded over `group`.
        group: tensor-parallel group.
    """

    def __init__(
        self,
        hidden_size: int,
        vision_hidden_size: int,
        vision_tokens: int,
        *,
        sequence_parallel: bool,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        self.hidden_size = hidden_size
        self.vision_hidden_size, self.vision_tokens = vision_hidden_size, vision_tokens
        self.sequence_parallel, self.group = sequence_parallel, group
        self.shards = group.size() if sequence_parallel else 1

    def carry_rows(self, tiles: int) -> int:
        """Rows of width h that `tiles` tiles of features fill, padded to whole shards."""
        elements = tiles * self.vision_tokens * self.vision_hidden_size
        return -(-elements // (self.hidden_size * self.shards)) * self.shards

    def local_rows(self, content: BoundaryContent, plan: DevicePlan) -> tuple[int, int]:
        """(decoder rows, carried rows) of this rank's message."""
        carry = self.carry_rows(plan.encoded_tiles) if content.carry else 0
        return self.phase(content, plan).length // self.shards, carry // self.shards

    @staticmethod
    def phase(content: BoundaryContent, plan: DevicePlan) -> DevicePhase:
        """The phase whose rows cross the boundary."""
        return plan.deep if content.deep else plan.shallow

    def join(self, rows_S1h: Tensor, features_TLc: Tensor | None, content: BoundaryContent) -> Tensor:
        """Decoder rows and, if the boundary carries them, features -> one tensor."""
        if not content.carry:
            return rows_S1h
        assert features_TLc is not None
        flat = features_TLc.reshape(-1).to(rows_S1h.dtype)
        wanted = self.carry_rows(features_TLc.shape[0]) * self.hidden_size
        carry = torch.nn.functional.pad(flat, (0, wanted - flat.numel())).view(-1, 1, self.hidden_size)
        if self.sequence_parallel:
            carry = scatter_to_sequence_parallel_region(carry, group=self.group)
        return torch.cat([rows_S1h, carry])

    def split(
        self, message: Tensor, content: BoundaryContent, plan: DevicePlan
    ) -> tuple[Tensor, Tensor | None]:
        """One received tensor -> decoder rows [S, 1, h] and features [T, L, c] (or None)."""
        rows, carried = self.local_rows(content, plan)
        if message.shape[0] != rows + carried:
            raise RuntimeError(
                f"boundary before layer {content.next_layer}: received {message.shape[0]} rows, the plan "
                f"says {rows} decoder rows and {carried} carried rows"
            )
        if not content.carry:
            return message, None
        rows_S1h, carry = message.split([rows, carried])
        if self.sequence_parallel:
            # All ranks compute the same gradient of the features, so each keeps its share.
            carry = gather_from_sequence_parallel_region(
                carry, tensor_parallel_output_grad=False, group=self.group
            )
        shape = (plan.encoded_tiles, self.vision_tokens, self.vision_hidden_size)
        elements = shape[0] * shape[1] * shape[2]
        return rows_S1h, carry.reshape(-1)[:elements].view(shape)
