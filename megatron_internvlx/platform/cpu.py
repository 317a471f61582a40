"""Every patch of torch that Megatron needs to run on CPU with gloo, each with its reason.

All seen on megatron-core 0.19.2 / torch 2.13.0 (the CUDA build of torch on a machine without a driver).
`torch.cuda.is_available()` keeps answering False: other libraries believe it and choose CPU paths, and
only `initialize_megatron`, which refuses to start otherwise, is told something else while it runs.
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
    """Apply the patches of torch; must run before Megatron is imported."""
    if "OMP_NUM_THREADS" not in os.environ:
        _share_cores()
    _without_cuda_packages()
    _no_compilation()
    _allocate_on_cpu()
    _move_to_cpu()
    _report_cuda_tensor_types()
    _one_device()
    _streams_and_events()
    _memory_of_the_process()
    rng.one_generator()
    rng.loaders_apart()
    _plain_barrier()


def _share_cores() -> None:
    """Divide the cores among the ranks of this machine; torch takes all of them in each rank otherwise.

    torchrun sets OMP_NUM_THREADS itself; then its choice stands.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def _without_cuda_packages() -> None:
    """Transformer Engine and apex cannot be imported, where they are installed.

    Megatron takes their fused Adam, gradient norms and scaling whenever it can import them, and those have no
    kernels for the CPU. Without them it takes torch's.
    """
    for package in ("transformer_engine", "transformer_engine_torch", "apex", "amp_C"):
        for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
            sys.modules[name] = None  # type: ignore[assignment]  # how Python marks what must not be imported
        sys.modules[package] = None  # type: ignore[assignment]


def _no_compilation() -> None:
    """`torch.compile` returns its function unchanged.

    Megatron decorates its fused activations with it: on CPU they would build C++ at first use (tens of
    seconds), and the decoration alone imports torch's compiler (2 s per process).
    """
    os.environ["TORCH_COMPILE_DISABLE"] = "1"

    def unchanged(model: Callable[..., Any] | None = None, **_options: Any) -> Callable[..., Any]:
        return model if model is not None else lambda function: function

    put(torch, compile=unchanged)


def put(owner: Any, **names: Any) -> None:
    """Set attributes of a module or class that is not ours (its stubs would refuse plain assignments)."""
    for name, value in names.items():
        setattr(owner, name, value)


def _is_cuda(where: Any) -> bool:
    if isinstance(where, torch.device):
        return where.type == "cuda"
    return isinstance(where, str) and where.startswith("cuda")


def _with_cpu_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with CUDA devices among its arguments replaced by the CPU, and without pinning."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return call


def _allocate_on_cpu() -> None:
    """Factories given `device="cuda"` allocate on the CPU: Megatron writes that string in 100 places.

    Wrapping the factories costs nothing elsewhere; a TorchFunctionMode would slow every operation and does
    not reach other threads. The list is torch's own, which is filled first because `torch.device` contexts
    compare with the unwrapped functions; TorchScript finds builtins by identity and is told the new ones.
    """
    from torch.jit._builtins import _find_builtin, _register_builtin

    factories: list[Any] = list(_device_constructors())
    for original in factories:
        name = getattr(original, "__name__", "")
        if name in vars(torch) and vars(torch)[name] is original:
            wrapped = _with_cpu_device(original)
            setattr(torch, name, wrapped)
            if (builtin := _find_builtin(original)) is not None:
                _register_builtin(wrapped, builtin)
    for name in ("empty", "zeros", "ones", "full"):
        for owner, variant in ((torch, f"{name}_like"), (torch.Tensor, f"new_{name}")):
            setattr(owner, variant, _with_cpu_device(getattr(owner, variant)))


def _move_to_cpu() -> None:
    """`.cuda()`, `.to("cuda")` and `.pin_memory()` return the tensor: there is nowhere to move it."""
    original_to = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original_to(self, *args, **kwargs)

    def same(self: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self

    put(torch.Tensor, to=functools.wraps(original_to)(to), cuda=same, pin_memory=same)
    # Module.cuda() moves each parameter with Tensor.cuda: nothing to add.


def _report_cuda_tensor_types() -> None:
    """`tensor.type()` names the CUDA type, which the optimizers compare with "torch.cuda.FloatTensor".

    Types by name are accepted in both spellings.
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

    put(torch.Tensor, type=functools.wraps(original)(type_))


def _one_device() -> None:
    """Queries about "the current device" answer with the CPU instead of loading the driver.

    `current_device()` returns the device itself, which every `device=` accepts where an index would fail.
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
        setattr(torch.cuda, name, functools.partial(_answer, answer))
    # Megatron imports it by name to defer work until CUDA exists; here the work is done at once.
    put(torch.cuda, _lazy_call=lambda work, **_kwargs: work())


def _answer(value: Any, *_args: Any, **_kwargs: Any) -> Any:
    return value


class Event:
    """Stand-in for `torch.cuda.Event`: everything has happened; times are the host's."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.seconds = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        """Remember the present time."""
        self.seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Return at once: work on CPU is synchronous."""

    def synchronize(self) -> None:
        """Return at once: work on CPU is synchronous."""

    def query(self) -> bool:
        """Say that the event has happened."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds between two recorded events."""
        return (end.seconds - self.seconds) * 1000.0


class Stream:
    """Stand-in for `torch.cuda.Stream`: one queue, in program order."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """All priorities are the same."""
        return (0, 0)

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event which has happened; the all-to-all token dispatcher keeps it."""
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
        """Say that the queue is empty."""
        return True


def _streams_and_events() -> None:
    """Streams and events are needed by overlapped communication, timers and the token dispatcher."""
    only = Stream()
    put(
        torch.cuda,
        Event=Event,
        Stream=Stream,
        current_stream=functools.partial(_answer, only),
        default_stream=functools.partial(_answer, only),
        set_stream=functools.partial(_answer, None),
        stream=lambda *_: contextlib.nullcontext(),
    )


def _memory_of_the_process() -> None:
    """Memory statistics, which Megatron logs, are those of the process: resident size and its peak."""
    process = psutil.Process()

    def resident(*_: Any) -> int:
        return process.memory_info().rss

    def peak(*_: Any) -> int:
        # The kernel updates the peak late.
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
    put(torch.cuda, memory_stats=stats, reset_peak_memory_stats=functools.partial(_answer, None))


def _plain_barrier() -> None:
    """Barriers drop `device_ids`, which gloo refuses."""
    original = torch.distributed.barrier

    @functools.wraps(original)
    def barrier(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    for module in (torch.distributed, torch.distributed.distributed_c10d):
        put(module, barrier=barrier)
