"""The GPUs of this machine, for checks before a job."""

import torch


def card_count() -> int:
    """Number of visible GPUs; 0 without CUDA."""
    return torch.cuda.device_count()


def free_and_total_memory() -> tuple[int, int]:
    """Free and total memory of this process's GPU, in bytes."""
    return torch.cuda.mem_get_info()


def use_card(index: int) -> None:
    """Make the GPU with this index the one of this process."""
    torch.cuda.set_device(index)
