"""Conversion of a 2B model both ways: peak memory of all processes, and speed beside `cp` on the same disk.

    python -m benchmarks.convert --work FOLDER      # writes benchmarks/results/convert-DATE.md

The released InternVL-X-2B configuration in bf16 with random weights. Every run starts with its input out of
the page cache and ends when its output is on the disk; `cp` copies the same directory. Needs 19 GB in
FOLDER, which are removed.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from benchmarks import common
from benchmarks.common import ROOT, ratio
from megatron_internvlx.checkpoint.hf_config import model_config
from megatron_internvlx.checkpoint.mapping import table
from megatron_internvlx.checkpoint.safetensors_io import (
    SINGLE,
    TensorInfo,
    plan_shard,
    tensor_bytes,
    write_at,
    write_header,
)
from megatron_internvlx.model.sizes import model_sizes

CONFIGS = ROOT / "tests" / "golden" / "real_configs.json"
ROUNDS = 6
# Seconds before every run: a disk that was written to is slow for a while.
REST = 10


class _Released:
    """Enough of a weight directory to read the configuration: it has PVTC."""

    names = {"projector.cls_scale"}  # noqa: RUF012

    def equal(self, first: str, second: str) -> bool:
        return False


def make_model(folder: Path) -> int:
    """Write the directory; returns the bytes of its weights."""
    held = {name.split(" (")[0]: entry["config"] for name, entry in json.loads(CONFIGS.read_text()).items()
            if isinstance(entry, dict) and "config" in entry}  # fmt: skip
    config = held["top_level InternVLChatConfig"] | {
        "architectures": ["InternVLChatModel"],
        "torch_dtype": "bfloat16",
        "llm_config": held["InternLM2-chat-1.8B"],
        "vision_config": held["InternViT-300M-448px"],
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ours = model_config(config, _Released())  # type: ignore[arg-type]
    entries = table(model_sizes(ours.arguments), ours.family, ours.layout)
    shapes = {n: s for e in entries for n, s in zip(e.theirs, e.shapes, strict=True)}
    shard = plan_shard(SINGLE, {n: TensorInfo(SINGLE, s, torch.bfloat16) for n, s in shapes.items()})
    write_header(folder, shard)
    noise = torch.randn(1 << 24).bfloat16()
    descriptor = os.open(folder / SINGLE, os.O_WRONLY)
    for name, shape in shapes.items():
        count = math.prod(shape)
        repeated = noise.repeat(-(-count // len(noise)))[:count].roll(len(name))
        write_at(descriptor, tensor_bytes(repeated), shard.offsets[name])
    os.close(descriptor)
    return shard.size


def _tree(pid: int) -> Iterator[psutil.Process]:
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        yield parent
        yield from parent.children(recursive=True)


def peak_of(process: subprocess.Popen) -> int:
    """Most bytes that a process and its descendants held together; pages they share count once (PSS)."""
    peak = 0
    while True:
        total = 0
        for one in _tree(process.pid):
            with suppress(psutil.Error, FileNotFoundError, ProcessLookupError):
                total += one.memory_full_info().pss
        peak = max(peak, total)
        # Counting walks through all page tables, and the process that is counted waits: seldom.
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
            return peak


def evict(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(command: list[str], source: Path, result: Path) -> tuple[float, int]:
    """(seconds until the result is on the disk, peak bytes) of a command."""
    evict(source)
    time.sleep(REST)
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = peak_of(process)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    for path in result.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return time.perf_counter() - start, peak


def measure(work: Path) -> tuple[int, dict[str, list[tuple[float, int]]]]:
    """(bytes of the model, measurements by name), repetitions of all three interleaved."""
    source, checkpoint, copy, back = (work / name for name in ("hf", "ck", "copy", "back"))
    total = make_model(source)
    tool = [sys.executable, "tools/convert_checkpoint.py"]
    commands = {
        "cp": (["cp", "-r", str(source), str(copy)], source, copy),
        "import": (
            [*tool, "import", "--hf", str(source), "--save", str(checkpoint), "--quiet"], source, checkpoint
        ),
        "export": (
            [*tool, "export", "--load", str(checkpoint), "--hf", str(back), "--quiet"], checkpoint, back
        ),
    }  # fmt: skip
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for number in range(ROUNDS):
        order = ["import", "export"]
        order.insert(number % 3, "cp")  # first, second and third in turn
        for name in order:
            found[name].append(timed(*commands[name]))
        compared = subprocess.run(["cmp", source / SINGLE, back / SINGLE], check=False)
        if compared.returncode:
            raise SystemExit("the model did not come back bit for bit")
        for folder in (copy, checkpoint, back):
            shutil.rmtree(folder)
    return total, found


def report(total: int, found: dict[str, list[tuple[float, int]]]) -> list[str]:
    """The table's lines."""
    rows: list[list[str]] = [
        ["", "seconds, median (range)", "MB/s", "of cp", "peak memory, GB", "of the model"]
    ]
    seconds = {name: [s for s, _ in runs] for name, runs in found.items()}
    for name, runs in found.items():
        middle, peak = statistics.median(seconds[name]), max(p for _, p in runs)
        rows.append(
            [
                name,
                f"{middle:.1f} ({min(seconds[name]):.1f}-{max(seconds[name]):.1f})",
                f"{total / 1e6 / middle:.0f}",
                f"{ratio(seconds['cp'], seconds[name]):.2f}",
                f"{peak / 1e9:.2f}",
                f"{peak / total:.2f}",
            ]
        )
    memory = psutil.virtual_memory().total
    return [
        f"InternVL-X-2B, bf16, {total / 1e9:.2f} GB in one file; {memory / 1e9:.0f} GB of memory. Input not in the "
        f"page cache; until the output is on the disk. {ROUNDS} rounds, {REST} s of rest before every run; the speed "
        "beside cp is the median of the ratios within a round, the peak that of all processes, in the worst run.",
        "",
        *common.table(rows),
    ]


def main() -> None:
    it = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    it.add_argument("--work", type=Path, required=True, help="folder on the disk to measure; must not exist")
    args = it.parse_args()
    args.work.mkdir(parents=True)
    try:
        total, found = measure(args.work)
    finally:
        shutil.rmtree(args.work)
    common.write(
        "convert",
        "Conversion of a 2B model",
        "python -m benchmarks.convert --work FOLDER",
        report(total, found),
        arithmetic="",
    )


if __name__ == "__main__":
    main()
