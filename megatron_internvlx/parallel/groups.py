"""Process groups that Megatron does not create, or creates too late.

The vision encoder's weights are replicated over the tensor-parallel group, every rank encoding its own
tiles. Its Megatron modules therefore get tensor-, pipeline- and context-parallel groups of size one, which
frees its head count from the tensor-parallel size and makes every collective inside it a no-op.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

_FIELDS = ("tp", "pp", "cp", "mp", "tp_cp", "ep", "expt_tp", "tp_ep", "tp_ep_pp")
_cache: list[tuple[torch.distributed.ProcessGroup | None, ProcessGroupCollection]] = []


def single_rank_groups() -> ProcessGroupCollection:
    """Collection whose model-parallel groups have this rank only; no rank waits for another.

    The groups are created once per default group, so that a process that restarts torch.distributed (as tests do)
    gets new ones.

    Raises:
        RuntimeError: if torch.distributed is not initialized.
    """
    if not torch.distributed.is_initialized():
        raise RuntimeError("single_rank_groups() needs torch.distributed: call init_process_group first")
    world = torch.distributed.group.WORLD
    if not _cache or _cache[0][0] is not world:
        # Local synchronization: only members call, and the only member is this rank, so first-stage ranks
        # may build a vision encoder while the others do not.
        group = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
        collection = ProcessGroupCollection()
        for field in _FIELDS:
            setattr(collection, field, group)
        _cache[:] = [(world, collection)]
    return _cache[0][1]


class MegatronGroups(ProcessGroupCollection):
    """Megatron's own groups, looked up when they are first needed.

    `pretrain` needs the collection together with our communicator, but creates the groups itself, later.
    """

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and parallel_state.model_parallel_is_initialized():
            self.__dict__.update(ProcessGroupCollection.use_mpu_process_groups().__dict__)
            if name in self.__dict__:
                return self.__dict__[name]
        return super().__getattr__(name)
