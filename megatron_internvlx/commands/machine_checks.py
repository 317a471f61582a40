"""The checks of `ivlx doctor`: Python, packages and their versions, GPUs, libraries, disk and memory, SLURM."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_internvlx import platform
from megatron_internvlx.commands.node_checks import GIB, Check, library_checks, run_check, system_checks
from megatron_internvlx.platform import cards
from megatron_internvlx.ranks import visible_cards

PACKAGE = "megatron-internvlx"
# Packages with a line of their own; the others are counted in one.
SHOWN = (
    "torch",
    "megatron-core",
    "transformers",
    "megatron-energon",
    "nvidia-dali-cuda130",
    "mlflow",
    "tensorboard",
)
LEAST_MEMORY = 8.0  # GiB of the machine; importing PyTorch, Megatron and DALI takes about one per process
REMEDIES = {
    "GPUs": "training works on the CPU, for small models; check nvidia-smi if this machine has a GPU",
    "Transformer Engine": f"pip install '{PACKAGE}[gpu]'; FP8 needs an H100 or newer",
    "flash-attn": "not needed: Transformer Engine uses cuDNN's attention without it",
    "DALI": "decode with Pillow: --image-decoder pillow",
    "scratch": "choose a directory with space: --scratch DIR, and TMPDIR=DIR in the environment",
    "shared memory": "docker run --shm-size 8g, or fewer loader workers",
    "open files": "ulimit -n 65536",
    "locked memory": "ulimit -l unlimited, or LimitMEMLOCK=infinity for slurmd",
    "memory": "fewer loader workers and ranks",
    "threads": "unset OMP_NUM_THREADS, or set it to cores / ranks",
}


def machine_checks(scratch: Path) -> Iterator[Check]:
    """Run all checks of `ivlx doctor` in this process, each with a remedy unless it is ok."""
    for check in _all_checks(scratch):
        remedy = check.remedy or REMEDIES.get(check.name, "")
        yield replace(check, host=socket.gethostname(), remedy="" if check.status == "ok" else remedy)


def _all_checks(scratch: Path) -> Iterator[Check]:
    yield _python()
    yield from package_checks(requires(PACKAGE) or (), constraints())
    yield from run_check("threads", _threads)
    yield from run_check("GPUs", _gpus)
    yield from library_checks()
    yield from system_checks(scratch)
    yield from run_check("memory", _memory)
    yield from run_check("disk", _disk)
    yield _slurm()


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    right = sys.version_info[:2] == (3, 12)
    remedy = "" if right else "install Python 3.12: the versions of Megatron that work here need it"
    return Check("ok" if right else "missing", "Python", f"{found}, {sys.executable}", remedy=remedy)


def constraints() -> dict[str, str]:
    """Package -> version with which the tests pass, from constraints.txt of the package or the checkout; {} without."""
    spec = find_spec("pretrain_vlm")
    folders = [Path(__file__).parents[1]] + ([Path(spec.origin).parent] if spec and spec.origin else [])
    for folder in folders:
        if (path := folder / "constraints.txt").is_file():
            lines = [line.partition("==") for line in path.read_text(encoding="utf-8").splitlines()]
            return {canonicalize_name(name): tested.strip() for name, equal, tested in lines if equal}
    return {}


def package_checks(needed: Sequence[str], tested: dict[str, str]) -> Iterator[Check]:
    """Compare installed packages with what is required, and with the versions of the tests.

    Args:
        needed: requirements of the package, as its metadata has them; those of extras are not looked at.
        tested: package -> version with which the tests pass.
    """
    yield Check("ok", PACKAGE, f"{version(PACKAGE)}, {Path(__file__).parents[1]}")
    good: list[str] = []
    for requirement in map(Requirement, needed):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        check = _package(requirement, tested.get(canonicalize_name(requirement.name)))
        if check.status == "ok" and requirement.name not in SHOWN:
            good.append(requirement.name)
        else:
            yield check
    yield Check("ok", "other packages", f"{len(good)} of {len(good)} that are needed directly")


def _package(requirement: Requirement, tested: str | None) -> Check:
    name, wanted = requirement.name, str(requirement.specifier)
    remedy = f"pip install '{name}{wanted}'" if tested is None else f"pip install {name}=={tested}"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check("missing", name, "not installed", remedy=remedy)
    if not requirement.specifier.contains(found, prereleases=True):
        return Check("missing", name, f"{found}; {wanted} is needed", remedy=remedy)
    note = f"; tested with {tested}" if tested not in (None, found.partition("+")[0]) else ""
    return Check("ok", name, found + note)


def _threads() -> Check:
    cores = len(os.sched_getaffinity(0))
    threads, given = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    detail = f"{threads} threads on {cores} cores" + (f" (OMP_NUM_THREADS={given})" if given else "")
    return Check("slow" if threads > cores else "ok", "threads", detail)


def _gpus() -> Check:
    built, driver = cards.cuda_version(), cards.driver_version()
    if platform.backend() == "nccl":
        free, total = cards.free_and_total_memory()
        detail = (
            f"{cards.card_count()} x {platform.device_name()}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        )
        detail += f"; CUDA {built}, driver {driver}"
        return Check(
            "ok" if free > 0.9 * total else "slow",
            "GPUs",
            detail,
            remedy="see nvidia-smi for other processes",
        )
    if not visible_cards():
        return Check("slow", "GPUs", f"none: runs use the CPU (PyTorch is built for CUDA {built})")
    detail = f"{visible_cards()} found, but PyTorch cannot use them; built for CUDA {built}, driver {driver}"
    return Check(
        "missing", "GPUs", detail, remedy="a newer driver, or a PyTorch built for the CUDA of this driver"
    )


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Check("ok" if total >= LEAST_MEMORY else "slow", "memory", f"{total:.0f} GiB")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    remedy = "a checkpoint of a trained 8B model takes about 110 GB: choose --save on a larger disk"
    return Check(
        "ok" if free > 10 else "slow", "disk", f"{free:.0f} GiB free here, in {Path.cwd()}", remedy=remedy
    )


def _slurm() -> Check:
    found = shutil.which("sbatch")
    return Check("ok", "SLURM", found or "not on this machine: only examples/slurm needs it")
