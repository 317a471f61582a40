"""Which rank this process is, as its launcher says: before process groups exist, and where they are not needed."""

import os


def global_rank() -> int:
    """Number of this process among all of the run; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_first_rank() -> bool:
    """Whether this process speaks for all: rank 0, or the only one."""
    return global_rank() == 0


def local_rank() -> int:
    """Number of this process on its node; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched_ranks() -> int:
    """Processes of the run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_nodes() -> int:
    """Groups of processes that the launcher made, one for each node; 1 without a launcher."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def ranks_per_node() -> int:
    """Processes of the run on this node; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
