"""The communicator of a run: Megatron's micro-batch counts and our plans, put together."""

from __future__ import annotations

import argparse

from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_internvlx.parallel.communicator import BoundaryCommunicator
from megatron_internvlx.training.provider import DataProvider


def boundary_communicator(args: argparse.Namespace, data: DataProvider) -> BoundaryCommunicator:
    """What `pretrain` needs as `p2p_communicator`, and the model provider to add its stages to."""

    def micro_batches(training: bool) -> int:
        if training:
            return get_num_microbatches()
        return args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size)

    return BoundaryCommunicator(micro_batches, data.upcoming)
