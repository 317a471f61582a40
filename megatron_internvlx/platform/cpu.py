"""Every patch of torch that Megatron needs to run on CPU with gloo, each with its reason.

All seen on megatron-core 0.19.2 / torch 2.13.0 (the CUDA build of torch on a machine without a driver).
`torch.cuda.is_available()` stays False, so that other libraries choose their CPU paths. It is True only while
`initialize_megatron` runs, which would refuse to start otherwise.
"""

import contextlib
import functools
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch.utils._device import _device_constructors

from megatron_internvlx.platform import rng

CPU = torch.device("cpu")

# Megatron arguments by destination: the local implementation, and no kernel that exists only for CUDA.
ARGS_DEFAULTS: dict[str, Any] = {
    "transformer_impl": "local",
    "distributed_backend": "gloo",
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
}


def patch_torch() -> None:
    """Apply all patches of torch; call it before Megatron is imported."""
    if "OMP_NUM_THREADS" not in os.environ:
        _share_cores()
    _block_cuda_packages()
    _disable_compilation()
    _allocate_on_cpu()
    _move_to_cpu()
    _report_cuda_tensor_types()
    _report_cpu_as_device()
    _replace_streams_and_events()
    _report_process_memory()
    rng.share_one_generator()
    rng.separate_loader_stream()
    _drop_barrier_devices()


def _share_cores() -> None:
    """Divide the cores among the ranks of this machine; otherwise torch uses all cores in each rank.

    Skipped if OMP_NUM_THREADS is set, as it is by torchrun.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def _block_cuda_packages() -> None:
    """Prevent the import of Transformer Engine and apex, if they are installed.

    Megatron uses their fused Adam, gradient norms and scaling whenever it can import them, and they have no
    kernels for the CPU. Without them it uses torch's.
    """
    for package in ("transformer_engine", "transformer_engine_torch", "apex", "amp_C"):
        for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
            sys.modules[name] = None  # type: ignore[assignment]  # makes Python refuse the import
        sys.modules[package] = None  # type: ignore[assignment]


def _disable_compilation() -> None:
    """Make `torch.compile` return its function unchanged.

    Megatron decorates its fused activations with it: on CPU they would compile C++ at first use (tens of
    seconds), and the decorator alone imports torch's compiler (2 s per process).
    """
    os.environ["TORCH_COMPILE_DISABLE"] = "1"

    def unchanged(model: Callable[..., Any] | None = None, **_options: Any) -> Callable[..., Any]:
        return model if model is not None else lambda function: function

    set_attributes(torch, compile=unchanged)


def set_attributes(owner: Any, **names: Any) -> None:
    """Set attributes of a foreign module or class (its type stubs would reject plain assignments)."""
    for name, value in names.items():
        setattr(owner, name, value)


def _is_cuda(where: Any) -> bool:
    if isinstance(where, torch.device):
        return where.type == "cuda"
    return isinstance(where, str) and where.startswith("cuda")


def _redirect_to_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function: CUDA devices among its arguments become the CPU, and memory is not pinned."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return call


def _allocate_on_cpu() -> None:
    """Make tensor factories with `device="cuda"` allocate on the CPU; Megatron uses that string in 100 places.

    Wrapping the factories costs nothing elsewhere; a TorchFunctionMode would slow down every operation and does
    not affect other threads. The list of factories is torch's own. It is computed before wrapping, because
    `torch.device` contexts compare with the original functions. TorchScript identifies builtins by identity, so
    the wrapped ones are registered too.
    """
    from torch.jit._builtins import _find_builtin, _register_builtin

    factories: list[Any] = list(_device_constructors())
    for original in factories:
        name = getattr(original, "__name__", "")
        if name in vars(torch) and vars(torch)[name] is original:
            wrapped = _redirect_to_cpu(original)
            setattr(torch, name, wrapped)
            if (builtin := _find_builtin(original)) is not None:
                _register_builtin(wrapped, builtin)
    for name in ("empty", "zeros", "ones", "full"):
        for owner, variant in ((torch, f"{name}_like"), (torch.Tensor, f"new_{name}")):
            setattr(owner, variant, _redirect_to_cpu(getattr(owner, variant)))


def _move_to_cpu() -> None:
    """Make `.cuda()`, `.to("cuda")` and `.pin_memory()` return the tensor itself."""
    original_to = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original_to(self, *args, **kwargs)

    def same(self: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self

    set_attributes(torch.Tensor, to=functools.wraps(original_to)(to), cuda=same, pin_memory=same)
    # Module.cuda() calls Tensor.cuda for each parameter, so it needs no patch.


def _report_cuda_tensor_types() -> None:
    """Make `tensor.type()` return the CUDA type, because the optimizers compare it with "torch.cuda.FloatTensor".

    As an argument, both spellings are accepted.
    """
    original = torch.Tensor.type
    names = {f"torch.{kind}Tensor": f"torch.cuda.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")}

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            name = original(self)
            return names.get(name, name)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original(self, dtype, *args, **kwargs)

    set_attributes(torch.Tensor, type=functools.wraps(original)(type_))


def _report_cpu_as_device() -> None:
    """Make queries about the current device report the CPU instead of loading the driver.

    `current_device()` returns the device itself: every `device=` accepts it, and an index would fail.
    """
    properties = SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=psutil.virtual_memory().total, multi_processor_count=1
    )
    answers: dict[str, Any] = {
        "current_device": CPU,
        "get_device_properties": properties,
        "get_device_capability": (0, 0),
        "get_device_name": "cpu",
        "is_current_stream_capturing": False,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "_lazy_init": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, functools.partial(_return_constant, answer))
    # Megatron uses it to defer work until CUDA is initialised; here the work is done at once.
    set_attributes(torch.cuda, _lazy_call=lambda work, **_kwargs: work())


def _return_constant(value: Any, *_args: Any, **_kwargs: Any) -> Any:
    return value


class Event:
    """Replacement of `torch.cuda.Event`: always complete, timed by the host's clock."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.seconds = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        """Store the current time."""
        self.seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Return at once: work on CPU is synchronous."""

    def synchronize(self) -> None:
        """Return at once: work on CPU is synchronous."""

    def query(self) -> bool:
        """Return True: the event is complete."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds between two recorded events."""
        return (end.seconds - self.seconds) * 1000.0


class Stream:
    """Replacement of `torch.cuda.Stream`: work runs at once, in program order."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Range of priorities: there is only one."""
        return (0, 0)

    def record_event(self, event: Event | None = None) -> Event:
        """Return a complete event, which the all-to-all token dispatcher stores."""
        event = event if event is not None else Event()
        event.record()
        return event

    def wait_event(self, event: Any) -> None:
        """Return at once: work on CPU is synchronous."""

    def wait_stream(self, stream: Any) -> None:
        """Return at once: work on CPU is synchronous."""

    def synchronize(self) -> None:
        """Return at once: work on CPU is synchronous."""

    def query(self) -> bool:
        """Return True: the queue is empty."""
        return True


def _replace_streams_and_events() -> None:
    """Replace streams and events, which overlapped communication, timers and the token dispatcher use."""
    only = Stream()
    set_attributes(
        torch.cuda,
        Event=Event,
        Stream=Stream,
        current_stream=functools.partial(_return_constant, only),
        default_stream=functools.partial(_return_constant, only),
        set_stream=functools.partial(_return_constant, None),
        stream=lambda *_: contextlib.nullcontext(),
    )


def _report_process_memory() -> None:
    """Report the process's resident size and its peak as the memory statistics that Megatron logs."""
    process = psutil.Process()

    def resident(*_: Any) -> int:
        return process.memory_info().rss

    def peak(*_: Any) -> int:
        # The kernel updates the peak with a delay.
        return max(resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    def stats(*_: Any) -> dict[str, int]:
        values: dict[str, int] = defaultdict(int)
        for kind in ("allocated_bytes", "reserved_bytes"):
            values[f"{kind}.all.current"] = resident()
            values[f"{kind}.all.peak"] = peak()
        return values

    for name in ("memory_allocated", "memory_reserved", "device_memory_used"):
        setattr(torch.cuda, name, resident)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        setattr(torch.cuda, name, peak)
    set_attributes(
        torch.cuda, memory_stats=stats, reset_peak_memory_stats=functools.partial(_return_constant, None)
    )


def _drop_barrier_devices() -> None:
    """Make barriers ignore `device_ids`, which gloo rejects."""
    original = torch.distributed.barrier

    @functools.wraps(original)
    def barrier(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    for module in (torch.distributed, torch.distributed.distributed_c10d):
        set_attributes(module, barrier=barrier)
