"""Checks of this machine: GPUs, packages that must load, DALI, disks, memory and limits of the system."""

from __future__ import annotations

import io
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from megatron_internvlx import platform
from megatron_internvlx.platform import cards

GIB = 1 << 30
# Images per second of 1200x900 on one GPU: an H100 without its JPEG engines does three times as many.
SLOW_DECODING = 1000.0
OTHER_FORMATS = ("PNG", "WEBP", "BMP", "TIFF")  # decoded by DALI too, if it has their decoders


@dataclass(frozen=True)
class Check:
    """Result of one check on one host."""

    status: str
    """ok, slow or missing."""
    name: str
    detail: str
    host: str = ""
    remedy: str = ""
    """Command or setting that helps; "" if nothing is wrong."""

    def __str__(self) -> str:
        return f"{self.status:8}{self.host or socket.gethostname():20} {self.name}: {self.detail}"


def node_checks(gpus: int, scratch: Path) -> Iterator[Check]:
    """Run all checks of one node in this process. `gpus`: expected number of GPUs; 0: any number."""
    yield from run_check("GPUs", lambda: _check_gpus(gpus))
    for package in ("megatron-core", "megatron-energon", "mlflow", "transformers"):
        yield check_package(package, needed=True)
    yield from library_checks()
    yield from system_checks(scratch)


def library_checks() -> Iterator[Check]:
    """Run the libraries that need hardware: Transformer Engine on a GPU, and DALI."""
    if platform.backend() == "nccl":
        yield from run_check("Transformer Engine", _check_transformer_engine)
        yield check_package("flash-attn", needed=False)
    yield from run_check("DALI", _check_dali)


def system_checks(scratch: Path) -> Iterator[Check]:
    """Look at disk, shared memory and limits of this process. `scratch`: directory for temporary files."""
    yield from run_check("scratch", lambda: _check_scratch(scratch))
    shared = Path("/dev/shm")  # used by loader workers to pass images
    room = shutil.disk_usage(shared).total / GIB if shared.is_dir() else 0.0
    yield Check("ok" if room >= 1 else "slow", "shared memory", f"{room:.1f} GiB")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield Check("ok" if files >= 4096 else "slow", "open files", f"limit {files}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    unlimited = locked == resource.RLIM_INFINITY
    if platform.backend() == "nccl":  # InfiniBand registers memory
        yield Check("ok" if unlimited else "slow", "locked memory", "unlimited" if unlimited else f"{locked}")


def _check_scratch(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free / GIB
    if not os.access(folder, os.W_OK):
        return Check("missing", "scratch", f"no permission to write in {folder}")
    return Check("ok" if free > 10 else "slow", "scratch", f"{free:.0f} GiB free in {folder}")


def run_check(name: str, check: Callable[[], Check]) -> Iterator[Check]:
    """Run one check; an error that it raises becomes its result."""
    try:
        yield check()
    except Exception as error:  # a broken installation can raise any error
        yield Check("missing", name, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:150]}")


def check_package(package: str, *, needed: bool) -> Check:
    """Whether a package is installed; `slow` if it is missing and not needed."""
    try:
        return Check("ok", package, version(package))
    except PackageNotFoundError:
        return Check("missing" if needed else "slow", package, "not installed")


def _check_gpus(wanted: int) -> Check:
    found = cards.card_count()
    if platform.backend() != "nccl":
        return Check("missing" if wanted else "slow", "GPUs", "none found: runs would use the CPU")
    name = platform.device_name()
    free, total = cards.free_and_total_memory()
    detail = f"{found} x {name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
    if wanted and found < wanted:
        return Check("missing", "GPUs", f"{detail}; {wanted} expected")
    return Check("ok" if free > 0.9 * total else "slow", "GPUs", detail)


def _check_transformer_engine() -> Check:
    import_module("transformer_engine.pytorch")
    supported, reason = import_module("transformer_engine.pytorch.fp8").check_fp8_support()
    text = f"{version('transformer-engine')}, FP8 {'works' if supported else 'does not: ' + reason}"
    return Check("ok" if supported else "slow", "Transformer Engine", text)


def _check_dali() -> Check:
    """Decode images and cut them into tiles for a second, on the GPU if there is one."""
    from PIL import Image

    from megatron_internvlx.data.dali_pipeline import TilePipeline
    from megatron_internvlx.data.encoded import EncodedImage, Wanted
    from megatron_internvlx.data.rvtc import tile_grid

    def encode(picture: Image.Image, form: str) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, form, quality=90)
        return buffer.getvalue()

    on_gpu = platform.backend() == "nccl"
    # With a GPU photographs; on CPU one picture shows that DALI works, and rates do not matter.
    width, height, count = (1200, 900, 32) if on_gpu else (64, 64, 1)
    noise = torch.randint(0, 255, (height // 4, width // 4, 3), dtype=torch.uint8).numpy()
    photograph = encode(Image.fromarray(noise).resize((width, height)), "JPEG")
    cols, rows = tile_grid(width, height)
    wanted = [Wanted.whole(EncodedImage(photograph, cols, rows, True))] * count
    pipeline = TilePipeline(0 if on_gpu else None, 448)
    pipeline.cut(wanted)  # the first time starts the decoders
    platform.synchronize()
    done, began = 0, time.perf_counter()
    while done == 0 or (on_gpu and time.perf_counter() - began < 1):
        pipeline.cut(wanted)
        platform.synchronize()
        done += count
    speed = done / (time.perf_counter() - began)
    failed = pipeline.fallbacks.total() + pipeline.blank.total()
    if failed:
        pipeline.close()
        return Check("missing", "DALI", f"{failed} of {pipeline.images} pictures failed")
    status = "slow" if on_gpu and speed < SLOW_DECODING else "ok"
    detail = f"cuts {speed:,.0f} images/s of {width}x{height} on the {'GPU' if on_gpu else 'CPU'}"
    small = Image.fromarray(noise[:16, :16])
    pipeline.cut([Wanted.whole(EncodedImage(encode(small, form), 1, 1, False)) for form in OTHER_FORMATS])
    if pipeline.fallbacks or pipeline.blank:
        status, detail = "slow", f"{detail}; {', '.join(pipeline.fallbacks)}: Pillow cuts these on the CPU"
    pipeline.close()
    return Check(status, "DALI", detail)
