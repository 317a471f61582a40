"""The GPUs of this machine, for checks before a job."""

from pathlib import Path

import torch

DRIVER = Path("/proc/driver/nvidia/version")


def cuda_version() -> str:
    """CUDA version that PyTorch is built for; "none" for a build without CUDA."""
    return torch.version.cuda or "none"


def driver_version() -> str:
    """Version of NVIDIA's driver; "unknown" without one."""
    if not DRIVER.is_file():
        return "unknown"
    words = DRIVER.read_text().split("\n", 1)[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def card_count() -> int:
    """Number of visible GPUs; 0 without CUDA."""
    return torch.cuda.device_count()


def capability() -> tuple[int, int] | None:
    """Compute capability of this process's GPU, (9, 0) for Hopper; None without a GPU."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def free_and_total_memory() -> tuple[int, int]:
    """Free and total memory of this process's GPU, in bytes."""
    return torch.cuda.mem_get_info()


def use_card(index: int) -> None:
    """Make the GPU with this index the one of this process."""
    torch.cuda.set_device(index)
