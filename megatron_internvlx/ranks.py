"""Ranks as set by the launcher's environment variables, for code that runs without process groups."""

import os
from pathlib import Path


def global_rank() -> int:
    """Global rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_first_rank() -> bool:
    """Whether this process has global rank 0, so that it prints for all ranks."""
    return global_rank() == 0


def is_launched() -> bool:
    """Whether a launcher such as torchrun has started this process as a rank."""
    return "RANK" in os.environ


def visible_cards() -> int:
    """Number of GPUs that a run on this node would use, from the driver's device files, without importing PyTorch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    files = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[len("nvidia") :].isdecimal()]
    if chosen is None or not files:
        return len(files)
    return len([name for name in chosen.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])


def local_rank() -> int:
    """Rank of this process on its node; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched_ranks() -> int:
    """Number of ranks of the run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_nodes() -> int:
    """Number of nodes of the run; 1 without a launcher."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def ranks_per_node() -> int:
    """Processes of the run on this node; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
