"""What a GPU did during some steps: kernels by class, and the time in which any of them ran."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PRODUCTS, ATTENTION = "matrix products", "attention"
IDLE = "idle"

# The first pattern that is found in a kernel's name gives its class, so the order matters: a copy is an elementwise
# kernel of torch with a copy functor, and the name of an attention kernel may hold "gemm".
CLASSES: tuple[tuple[str, str], ...] = (
    (ATTENTION, r"fmha|sdpa|flash_?(fwd|bwd|attn|attention)|fused_attn|flash::|FlashAttn|attention"),
    (PRODUCTS, r"nvjet|gemm|gemv|xmma|cublas|splitK|cutlass|wgmma"),
    ("communication", r"nccl"),
    ("optimizer, gradient norm", r"multi_tensor_apply|adam"),
    # bf16 gradient + fp32 main gradient: the only addition of torch's that reads one type and writes another.
    ("gradient accumulation", r"CUDAFunctor_?[aA]dd.*LoadWithCast"),
    ("FP8 casts", r"cast_transpose|quantize|amax|fp8|scale_inv|mxfp8|cast_kernel|cast_gated|cast_fused"),
    ("norms", r"rms_?norm|layer_?norm|ln_(fwd|bwd)"),
    ("cross entropy, softmax", r"cross_?entropy|softmax|nll_loss"),
    ("activations", r"gelu|silu|swiglu|geglu|sigmoid|dact|gated_act|tanh"),
    ("rotary embedding", r"rope|rotary"),
    ("gather, scatter", r"index|gather|scatter|embedding"),
    ("copies", r"memcpy|copy|CatArray|transpose|permute|triton_\w*(cat|clone)"),
    ("fills, random", r"fill|memset|distribution|philox|dropout|arange"),
    ("reductions", r"reduce|triton_(red|per)_|cumsum|scan"),
    ("elementwise", r"elementwise|triton_poi_|functor|triton"),
)
OTHER = "other"
_PATTERNS = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in CLASSES)
ORDER = (*(name for name, _ in CLASSES), OTHER)
# What a trace calls work of the device; on CPU, to try the code, operators stand for kernels.
DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
CPU_CATEGORIES = ("cpu_op",)
TOP, NAME_LENGTH = 40, 160


class Event(NamedTuple):
    """A kernel: its name, start and duration in microseconds."""

    name: str
    start: float
    duration: float


def kind(name: str) -> str:
    """Class of a kernel by its name."""
    return next((found for found, pattern in _PATTERNS if pattern.search(name)), OTHER)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end): what overlaps counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total


def read_trace(path: Path, categories: Sequence[str] = DEVICE_CATEGORIES) -> list[Event]:
    """Events of the device in a Chrome trace of torch's profiler."""
    trace = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    return [
        Event(event["name"], float(event["ts"]), float(event.get("dur", 0)))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in categories
    ]


def summarize(events: Sequence[Event], steps: int) -> dict[str, Any]:
    """Figures per step, in milliseconds.

    Returns `kernels` (count), `busy_ms` (any kernel runs), `classes` {class: [ms, count]} and `top`, the kernels
    that took longest: [name, class, ms, count]. Classes add up to more than `busy_ms` where streams overlap.
    """
    by_name: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        entry = by_name[event.name]
        entry[0] += event.duration / 1e3 / steps
        entry[1] += 1 / steps
    classes: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for name, (milliseconds, count) in by_name.items():
        entry = classes[kind(name)]
        entry[0] += milliseconds
        entry[1] += count
    longest = sorted(by_name.items(), key=lambda item: -item[1][0])[:TOP]
    return {
        "kernels": len(events) / steps,
        "busy_ms": covered((e.start, e.start + e.duration) for e in events) / 1e3 / steps,
        "classes": {name: classes[name] for name in ORDER if name in classes},
        "top": [[name[:NAME_LENGTH], kind(name), *values] for name, values in longest],
    }
