"""Platform: unmodified Megatron on CUDA, or on CPU with gloo and the patches of this package.

Call `setup()` once, before anything imports Megatron. With CUDA it mainly prepares the environment; without CUDA
it applies the patches of `cpu.py`, `rng.py` and `cpu_megatron.py`, one function each, with its reason.
`device()` is the only device switch of the project: no other module queries CUDA.
"""

import argparse
import importlib.util
import os
from typing import Any

import torch

from megatron_internvlx.platform import cpu, cuda, schedule, shared
from megatron_internvlx.platform.logs import LogRecord, install_log_line, quiet_logs, quiet_prints

__all__ = [
    "LogRecord",
    "args_defaults",
    "backend",
    "device",
    "device_name",
    "install_log_line",
    "output_layer_fuses_accumulation",
    "peak_memory",
    "pretend_hopper",
    "quiet_logs",
    "quiet_prints",
    "set_args_defaults",
    "setup",
    "synchronize",
]

_done: str | None = None


def _has_cuda() -> bool:
    """Whether CUDA is available; called once, before any patch can change the answer."""
    return torch.cuda.is_available()


_CUDA = _has_cuda()


def device() -> torch.device:
    """Device of parameters and batches: this rank's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if _CUDA else torch.device("cpu")


def backend() -> str:
    """Backend of torch.distributed for tensors on `device()`."""
    return "nccl" if _CUDA else "gloo"


def peak_memory() -> int:
    """Peak memory of this process on its device in bytes; without a GPU, its peak resident size."""
    return torch.cuda.max_memory_allocated()


def synchronize() -> None:
    """Wait until the device has finished its queued work; for time measurements."""
    if _CUDA:
        torch.cuda.synchronize()


def device_name() -> str:
    """Name of this rank's GPU; "CPU" without one."""
    return torch.cuda.get_device_name() if _CUDA else "CPU"


def setup() -> str:
    """Prepare this process for `megatron.training.pretrain`; returns "cuda" or "cpu". Safe to repeat.

    Call it before the first import of Megatron, whose modules bind some torch names when imported.
    """
    global _done
    if _done is None:
        # Sequence parallelism and overlapped communication check for this setting on every device.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        quiet_logs(on_cpu=not _CUDA)
        if not _CUDA:
            cpu.patch_torch()
            from megatron_internvlx.platform import cpu_megatron

            cpu_megatron.patch_megatron()
        else:
            cuda.patch_torch()
            cuda.patch_megatron()
        shared.use_shipped_index_helper()
        schedule.allow_learning_rate_changes()
        schedule.announce_schedule_changes()
        _done = "cuda" if _CUDA else "cpu"
    return _done


def pretend_hopper() -> None:
    """Report the compute capability of an H100 to Megatron's checks; for dry runs, which need no GPU."""
    cpu.set_attributes(torch.cuda, get_device_capability=lambda *_args, **_kwargs: (9, 0))


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def args_defaults() -> dict[str, Any]:
    """Defaults of Megatron arguments (argparse destinations) that this machine needs."""
    return {} if _CUDA else dict(cpu.ARGS_DEFAULTS)


def output_layer_fuses_accumulation() -> bool:
    """Whether Megatron's own linear layers can add weight gradients in their matrix products: a kernel of apex.

    Without it Megatron 0.19 refuses to build them with `gradient_accumulation_fusion`; Transformer Engine's layers
    need nothing.
    """
    return _installed("fused_weight_gradient_mlp_cuda")


def set_args_defaults(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Set `args_defaults()` as the parser's defaults; call it from Megatron's `extra_args_provider`."""
    parser.set_defaults(**args_defaults())
    return parser
