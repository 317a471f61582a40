"""Checks between the ranks of several nodes: clocks, speed of each GPU, the network, shared files."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_internvlx import platform
from megatron_internvlx.commands.node_checks import Check
from megatron_internvlx.platform import cards
from megatron_internvlx.ranks import local_rank

MOST_SKEW = 0.5  # seconds between two clocks; logs of several hosts are compared by time
# GB/s of an all-reduce under NCCL. Sockets instead of RDMA, or PCIe without direct access between GPUs, are slower;
# one InfiniBand adapter of 200 Gbit/s per node is faster.
SLOW_LINK = 20.0
SLOW_SHARE = 0.8  # of the median speed; a slower rank delays all others


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


def check_between_ranks(shared: Path | None, megabytes: int, slowest: float | None) -> list[Check]:
    """Run `world_checks` in a process group, which is made if there is none; returns all results on rank 0.

    Args:
        shared: directory that all nodes see; None to leave it out.
        megabytes: size of the all-reduce and of the file, in MiB.
        slowest: GB/s below which an all-reduce is slow; None for `SLOW_LINK` with GPUs and 0 without.
    """
    began = not dist.is_initialized()
    if began:
        if platform.backend() == "nccl":
            cards.use_card(local_rank())
        dist.init_process_group(platform.backend())
    if slowest is None:
        slowest = SLOW_LINK if platform.backend() == "nccl" else 0.0
    found = world_checks(shared, megabytes, slowest)
    first = dist.get_rank() == 0
    if began:
        dist.destroy_process_group()
    return found if first else []
