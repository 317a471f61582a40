"""Check nodes and their network for missing or slow parts before a job starts.

    python tools/check_cluster.py --node                       # only this node; takes seconds
    torchrun --nnodes 2 --nproc-per-node 8 ... tools/check_cluster.py --shared /checkpoints

Each line is `ok`, `slow` or `missing`, the host, and the check. The exit code is 0 if nothing is missing, otherwise
1; with `--strict`, slow counts as missing. train.sbatch runs the first form on every node before a job, and with
PREFLIGHT=2 the second one too.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

from megatron_internvlx import platform
from megatron_internvlx.commands.values import float_in_range, int_in_range
from megatron_internvlx.data.rvtc import tile_grid
from megatron_internvlx.platform import cards
from megatron_internvlx.ranks import local_rank

GIB = 1 << 30
MOST_SKEW = 0.5  # seconds between two clocks; logs of several hosts are compared by time
# GB/s of an all-reduce under NCCL. Sockets instead of RDMA, or PCIe without direct access between GPUs, are slower;
# one InfiniBand adapter of 200 Gbit/s per node is faster.
SLOW_LINK = 20.0
# Images per second of 1200x900 on one GPU: an H100 without its JPEG engines does three times as many.
SLOW_DECODING = 1000.0
OTHER_FORMATS = ("PNG", "WEBP", "BMP", "TIFF")  # decoded by DALI too, if it has their decoders
SLOW_SHARE = 0.8  # of the median speed; a slower rank delays all others


@dataclass(frozen=True)
class Check:
    """Result of one check on one host."""

    status: str
    """ok, slow or missing."""
    name: str
    detail: str
    host: str = ""

    def __str__(self) -> str:
        return f"{self.status:8}{self.host or socket.gethostname():20} {self.name}: {self.detail}"


def node_checks(gpus: int, scratch: Path) -> Iterator[Check]:
    """Run all checks of one node in this process. `gpus`: expected number of GPUs; 0: any number."""
    yield from _run_check("GPUs", lambda: _check_gpus(gpus))
    for package in ("megatron-core", "megatron-energon", "mlflow", "transformers"):
        yield _check_package(package, needed=True)
    if platform.backend() == "nccl":
        yield from _run_check("Transformer Engine", _check_transformer_engine)
        yield _check_package("flash-attn", needed=False)
    yield from _run_check("DALI", _check_dali)
    yield from _run_check("scratch", lambda: _check_scratch(scratch))
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


def _run_check(name: str, check: Callable[[], Check]) -> Iterator[Check]:
    try:
        yield check()
    except Exception as error:  # a broken installation can raise any error
        yield Check("missing", name, f"{type(error).__name__}: {str(error).splitlines()[0][:150]}")


def _check_package(package: str, *, needed: bool) -> Check:
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
    from megatron_internvlx.data.dali_pipeline import TilePipeline, Wanted
    from megatron_internvlx.data.encoded import EncodedImage

    on_gpu = platform.backend() == "nccl"
    # With a GPU photographs; on CPU one picture shows that DALI works, and rates do not matter.
    width, height, count = (1200, 900, 32) if on_gpu else (64, 64, 1)
    noise = torch.randint(0, 255, (height // 4, width // 4, 3), dtype=torch.uint8).numpy()
    photograph = _encode(Image.fromarray(noise).resize((width, height)), "JPEG")
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
    pipeline.cut([Wanted.whole(EncodedImage(_encode(small, form), 1, 1, False)) for form in OTHER_FORMATS])
    if pipeline.fallbacks or pipeline.blank:
        status, detail = "slow", f"{detail}; {', '.join(pipeline.fallbacks)}: Pillow cuts these on the CPU"
    pipeline.close()
    return Check(status, "DALI", detail)


def _encode(picture: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=90)
    return buffer.getvalue()


def world_checks(shared: Path | None, megabytes: int, slowest: float) -> list[Check]:
    """Run the checks between ranks; call it on every rank. Rank 0 gets all results."""
    checks = [*_compare_clocks(), *_time_matrix_products(), *_measure_all_reduce(megabytes, slowest)]
    if shared is not None:
        checks += _check_shared_files(shared, megabytes)
    return checks


def _gather(value: object) -> list:
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, (socket.gethostname(), value))
    return values


def _compare_clocks() -> Iterator[Check]:
    dist.barrier()
    times = _gather(time.time())
    middle = statistics.median(seconds for _, seconds in times)
    host, seconds = max(times, key=lambda item: abs(item[1] - middle))
    skew = abs(seconds - middle)
    detail = f"at most {skew:.2f} s from the median"
    yield Check("slow" if skew > MOST_SKEW else "ok", "clocks", detail, host if skew > MOST_SKEW else "")


def _time_matrix_products() -> Iterator[Check]:
    """Matrix products of each rank: one slow GPU slows the whole job."""
    side, rounds = (8192, 20) if platform.backend() == "nccl" else (256, 3)
    a = torch.randn(side, side, device=platform.device(), dtype=torch.bfloat16)
    for count in (2, rounds):  # the first time warms up
        platform.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            a @ a
        platform.synchronize()
        seconds = time.perf_counter() - start
    speeds = _gather(2 * side**3 * rounds / seconds / 1e12)
    middle = statistics.median(speed for _, speed in speeds)
    slow = [(host, speed) for host, speed in speeds if speed < SLOW_SHARE * middle]
    for host, speed in slow:
        yield Check("slow", "matrix products", f"{speed:.3g} TFLOP/s, the median rank has {middle:.3g}", host)
    if not slow:
        yield Check("ok", "matrix products", f"{middle:.3g} TFLOP/s on the median rank")


def _measure_all_reduce(megabytes: int, slowest: float) -> Iterator[Check]:
    """Bus bandwidth, as nccl-tests counts it: 2 (n-1)/n bytes per byte of the buffer."""
    ranks = dist.get_world_size()
    buffer = torch.zeros(megabytes << 18, device=platform.device())
    dist.all_reduce(buffer)
    platform.synchronize()
    rounds = 5
    start = time.perf_counter()
    for _ in range(rounds):
        dist.all_reduce(buffer)
    platform.synchronize()
    seconds = (time.perf_counter() - start) / rounds
    speed = 2 * (ranks - 1) / ranks * buffer.nbytes / seconds / 1e9
    detail = f"{speed:.2f} GB/s over {ranks} ranks, {megabytes} MiB"
    slow = ranks > 1 and speed < slowest
    yield Check("slow" if slow else "ok", "all-reduce", detail + (f"; {slowest:g} expected" if slow else ""))


def _check_shared_files(folder: Path, megabytes: int) -> Iterator[Check]:
    """Check that every host sees the whole file that rank 0 writes."""
    path = folder / f".check-cluster-{os.environ.get('SLURM_JOB_ID', os.getppid())}"
    written: list = [str(path), 0.0, ""]
    if dist.get_rank() == 0:
        start = time.perf_counter()
        try:
            with path.open("wb") as file:
                file.write(os.urandom(1 << 20) * megabytes)
                os.fsync(file.fileno())
        except OSError as error:
            written[2] = error.strerror or str(error)
        written[1] = megabytes / 1024 / (time.perf_counter() - start)
    dist.broadcast_object_list(written, src=0)
    path, speed, problem = Path(written[0]), written[1], written[2]
    if problem:
        yield Check("missing", "shared files", f"rank 0 cannot write to {folder}: {problem}")
        return
    sizes = _gather(path.stat().st_size if path.exists() else -1)
    missing_hosts = sorted({host for host, size in sizes if size != megabytes << 20})
    dist.barrier()
    if dist.get_rank() == 0:
        path.unlink()
    for host in missing_hosts:
        yield Check("missing", "shared files", f"does not see what rank 0 wrote to {folder}", host)
    if not missing_hosts:
        status = "ok" if speed > 0.2 else "slow"
        yield Check(status, "shared files", f"rank 0 writes {speed:.2f} GiB/s to {folder}")


def main(argv: list[str] | None = None) -> int:
    """Run the checks; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--node", action="store_true", help="check only this node, also under torchrun")
    parser.add_argument(
        "--gpus",
        type=int_in_range(0, 65_536),
        default=os.environ.get("GPUS_PER_NODE", "0"),
        help="expected GPUs",
    )
    parser.add_argument("--scratch", type=Path, default=Path(os.environ.get("NODE_SCRATCH", "/tmp")))
    parser.add_argument("--shared", type=Path, help="directory shared by all nodes, such as --save")
    parser.add_argument(
        "--megabytes",
        type=int_in_range(1, 1 << 20),
        default=256,
        help="size of the all-reduce and of the file",
    )
    parser.add_argument(
        "--min-bandwidth",
        type=float_in_range(0),
        help=f"GB/s below which all-reduce is slow; default {SLOW_LINK:.0f} with GPUs, 0 without",
    )
    parser.add_argument("--strict", action="store_true", help="slow counts as missing")
    options = parser.parse_args(argv)
    single_node = options.node or "RANK" not in os.environ
    if single_node and (options.shared or options.min_bandwidth):
        parser.error(
            "--shared and --min-bandwidth compare ranks: start this with torchrun and without --node"
        )
    checks: list[Check] = []
    if single_node or local_rank() == 0:
        checks += node_checks(options.gpus, options.scratch)
    if not single_node:
        began = not dist.is_initialized()
        if began:
            if platform.backend() == "nccl":
                cards.use_card(local_rank())
            dist.init_process_group(platform.backend())
        least = options.min_bandwidth
        if least is None:
            least = SLOW_LINK if platform.backend() == "nccl" else 0.0
        found = world_checks(options.shared, options.megabytes, least)
        checks += found if dist.get_rank() == 0 else []
        if began:
            dist.destroy_process_group()
    for check in checks:
        print(check, flush=True)
    bad = ("missing", "slow") if options.strict else ("missing",)
    return int(any(check.status in bad for check in checks))
