"""One row in a process of its own: imports at once, waits for a line of input, then measures.

Started by `processes.py`, which lets the imports of some rows run beside the measurement of others. Every result is
a line `RESULT {json}`; the parent merges them, so that what was measured before a failure is kept.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

READY = "READY"
RESULT = "RESULT "
# A graph is captured after Megatron's own warm-up steps (three); steps compile until then.
WARMUP, REPEATS, PROFILED = 6, 8, 2
MAX_STEP_SECONDS = 16.0  # of timed steps together, from the second on
IMAGE_SECONDS = 10.0
TINY_IMAGE_SECONDS, TINY_IMAGES, TINY_IMAGE_TILES = 0.1, 2, 1


def send(values: dict[str, Any]) -> None:
    """A part of the row's result to the parent."""
    print(RESULT + json.dumps(values), flush=True)


def main() -> None:
    """Import what the row's kind needs, wait, measure; an error is a part of the result."""
    row: dict[str, Any] = json.loads(sys.argv[1])
    try:
        measure = KINDS[row["kind"]]()
        print(READY, flush=True)
        sys.stdin.readline()
        measure(row)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # without taking process groups and caches down, which takes seconds and no row needs
    except BaseException as error:  # SystemExit too: argparse and Megatron end so
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}".strip()
        send({"error": next(iter(text.splitlines()), text)[:300]})
        raise SystemExit(1) from error


def _steps() -> Callable[[dict[str, Any]], None]:
    """Imports for a row that steps this trainer."""
    from benchmarks.trainer import Trainer

    _import_transformer_engine()

    def measure(row: dict[str, Any]) -> None:
        started = time.perf_counter()
        trainer = Trainer(row["argv"], row["packs"])
        parameters = sum(p.numel() for p in trainer.model[0].parameters())
        send({"build_seconds": time.perf_counter() - started, "parameters": parameters, **_device()})
        send(_predicted(trainer.args))
        last = _timed(row, trainer.step)
        send(
            {"flops": last["flops"], "useful_flops": last["useful_flops"], **_memory()}
            | {"replay_difference": trainer.replay_difference}
        )
        send(_profile(row, trainer.step))

    return measure


def _plain() -> Callable[[dict[str, Any]], None]:
    """Imports for the plain loop."""
    from benchmarks.plain import PlainTrainer

    def measure(row: dict[str, Any]) -> None:
        started = time.perf_counter()
        trainer = PlainTrainer(row["model"], row["size"], row["packs"])
        parameters = sum(p.numel() for p in trainer.model.parameters())
        send({"build_seconds": time.perf_counter() - started, "parameters": parameters, **_device()})
        _timed(row, trainer.step)
        send(_memory())
        send(_profile(row, trainer.step))

    return measure


def _curve() -> Callable[[dict[str, Any]], None]:
    """Imports for a loss curve."""
    from benchmarks.trainer import Trainer

    _import_transformer_engine()

    def measure(row: dict[str, Any]) -> None:
        trainer = Trainer(row["argv"], row["packs"])
        send(_device())
        losses: list[float] = []
        for number in range(1, row["steps"] + 1):
            losses.append(trainer.step()["loss"])
            if number % 10 == 0 or number == row["steps"]:
                send({"losses": losses})
        send({"replay_difference": trainer.replay_difference, **_memory()})

    return measure


def _images() -> Callable[[dict[str, Any]], None]:
    """Imports for images per second."""
    from importlib import import_module

    # By name: the rows are DALI's, and a report without them is still one. Imports neither torchvision nor Energon.
    decoding = import_module("benchmarks.decoding")

    def measure(row: dict[str, Any]) -> None:
        if row.get("tiny"):
            few = decoding.photographs(TINY_IMAGES, TINY_IMAGE_TILES)
            images = decoding.gpu_rows(TINY_IMAGE_SECONDS, few, _gpu())
        else:
            images = decoding.gpu_rows(IMAGE_SECONDS)
        send({"images": images, **_device()})

    return measure


KINDS: dict[str, Callable[[], Callable[[dict[str, Any]], None]]] = {
    "step": _steps,
    "plain": _plain,
    "curve": _curve,
    "images": _images,
}


def _import_transformer_engine() -> None:
    """Where it is installed: its import takes seconds, which belong before the start signal."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        print("Transformer Engine is not installed", flush=True)


def _gpu() -> int | None:
    """The first GPU; None where there is none."""
    import torch

    return 0 if torch.cuda.is_available() else None


def _device() -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    # As loaded, which need not be the installed package; None without it.
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {"device": name, "cuda": torch.version.cuda, "torch": torch.__version__, "cudnn": cudnn}


def _memory() -> dict[str, float]:
    """Peak of tensors and of what the allocator held, graph pools included, GiB."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def _predicted(args: Any) -> dict[str, Any]:
    """GiB that the dry run predicts for these arguments, without its reserve."""
    from megatron_internvlx.planning import dryrun

    try:
        return {"predicted_gib": dryrun.check(args).fullest.total / 2**30}
    except Exception as error:  # the step's figures matter more than the prediction
        traceback.print_exc()
        return {"predicted_error": str(error)[:200]}


def _compilations() -> int:
    """Frames that torch.compile has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["frames"]["ok"])


def _timed(row: dict[str, Any], step: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Warm-up steps, then timed ones; sends their seconds and returns the last step's values."""
    warmup, repeats = (2, 2) if row.get("tiny") else (WARMUP, REPEATS)
    seconds = [step()["seconds"] for _ in range(warmup)]
    send({"warmup_seconds": seconds})
    compiled, timed, last = _compilations(), [], {}
    for _ in range(repeats):
        last = step()
        timed.append(last["seconds"])
        if sum(timed) > MAX_STEP_SECONDS and len(timed) > 2:
            break
    tokens = sum(tiles * _per_tile(row) + text for pack in row["packs"] for tiles, text in pack)
    send(
        {
            "seconds": timed,
            "loss": last.get("loss"),
            "tokens": tokens,
            "recompiled": _compilations() - compiled,
        }
    )
    return last


def _per_tile(row: dict[str, Any]) -> int:
    """Deep tokens of a tile: 448 pixels in patches of 14, halved."""
    return 16 if row.get("tiny") else 256


def _profile(row: dict[str, Any], step: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """Kernels of some more steps, after the timed ones: recording slows a step, but not its kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.gpu_report import kernels

    on_gpu = torch.cuda.is_available()
    steps = 1 if row.get("tiny") else PROFILED
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        taken = [step()["seconds"] for _ in range(steps)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        categories = kernels.DEVICE_CATEGORIES if on_gpu else kernels.CPU_CATEGORIES
        events = kernels.read_trace(path, categories)
    if not events:
        raise RuntimeError("the profiler saw no kernel")
    return {"profile": {**kernels.summarize(events, steps), "recorded_ms": sum(taken) / steps * 1e3}}


if __name__ == "__main__":
    main()
