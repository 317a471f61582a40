"""The communicator of a run, from Megatron's micro-batch counts and our plans."""

from __future__ import annotations

from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_internvlx.parallel.communicator import BoundaryCommunicator
from megatron_internvlx.training.provider import DataProvider


def boundary_communicator(data: DataProvider) -> BoundaryCommunicator:
    """Create the `p2p_communicator` of Megatron's `pretrain`; the model provider adds its stages to it."""

    def micro_batches(training: bool) -> int:
        return get_num_microbatches() if training else data.evaluation_micro_batches

    return BoundaryCommunicator(micro_batches, data.upcoming)
