"""Loader workers of a run and the host memory of loading on a node, computed for full micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_internvlx.config import DataSettings
from megatron_internvlx.data.dali_pipeline import DEPTH, MOST_THREADS
from megatron_internvlx.data.prefetch import TAKEN_AHEAD, WORKER_AHEAD

MIB, GIB = 1 << 20, 1 << 30
GPUS_PER_NODE = 8
# Private memory of a worker, measured with a small tokenizer and rounded up for a real one: 125 MiB where it reads
# files, 245 with DALI in it, 145 with Pillow (all forked); 195 for a worker of held-out data, which is started anew.
WORKER_BYTES = {"files": 200 * MIB, "dali": 350 * MIB, "pillow": 250 * MIB}
HELD_OUT_BYTES = 400 * MIB
# Core seconds per tile, measured (docs/data.md): 0.2 ms to check a file, and a tile may be an image; 16 and 44 ms to
# decode a photograph of 7 tiles.
SECONDS_PER_TILE = {"files": 0.2e-3, "dali": 16e-3 / 7, "pillow": 44e-3 / 7}
# Assumed: a photograph of 12 megapixels has 0.3 MiB of file per tile, smaller ones less.
FILE_BYTES_PER_TILE = MIB // 3
# A decoded image of 2.7 megapixels, in pinned memory, for each thread that decodes what the GPU does not.
DECODED_BYTES = 8 * MIB
# Token ids and labels int64, and a flag.
BYTES_PER_TOKEN = 17


@dataclass(frozen=True)
class Loading:
    """Loader workers, and bytes of host memory on a node; a node has 8 GPUs, or all GPUs of a smaller run."""

    sent: str
    """Content of a worker's micro-batches: `files`, or pixels that `dali` or `pillow` decoded."""
    workers: int
    """Per replica; 0: none, the training process loads."""
    needed: int
    """Workers that keep up with the assumed speed of the GPUs."""
    seconds: float
    """Assumed time of a micro-batch."""
    replicas: int
    """Maximum number of loading ranks on a node."""
    gpus: int
    """GPUs of a node."""
    processes: int
    """Bytes of the workers themselves."""
    buffers: int
    """Bytes of tokenized samples from which packs are chosen, each of them as long as possible."""
    packs: int
    """Bytes of micro-batches in flight, as files or as pixels."""
    pinned: int
    """Bytes of pinned memory that copies to the GPUs start from."""
    held_out: int
    """Bytes of the workers of an evaluation, which are there during it."""

    @property
    def total(self) -> int:
        """Bytes without those of evaluations."""
        return self.processes + self.buffers + self.packs + self.pinned

    def lines(self) -> list[str]:
        """Lines of the dry run."""
        sent = "files" if self.sent == "files" else "pixels"
        enough = f"{self.needed} keep up with micro-batches of {self.seconds * 1e3:,.0f} ms"
        count = self.workers * self.replicas
        if not self.workers:
            return ["loading      in the training process (--loader-workers 0)"]
        if self.needed > self.workers:
            enough += f": raise --loader-workers to {self.needed}"
        node = f"{count} processes on a node of {self.gpus} GPU{'s' if self.gpus > 1 else ''}"
        parts = {"workers": self.processes, "sample buffers": self.buffers, f"packs as {sent}": self.packs}
        parts["pinned"] = self.pinned
        sizes = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        return [
            f"loading      {self.workers} workers per replica send {sent}, {node}; {enough}",
            f"host memory  {self.total / GIB:.1f} GiB per node at most: {sizes}; {self.held_out / GIB:.1f} more "
            "during an evaluation",
        ]


def loading(
    data: DataSettings,
    *,
    files: bool,
    tiles: int,
    tile_size: int,
    rows: int,
    micro_batch_size: int,
    seconds: float,
    world: int,
    tensor: int,
    replicas: int,
) -> Loading:
    """Loading of a run.

    Args:
        data: loader, decoder, workers and buffers.
        files: whether images travel undecoded.
        tiles: maximum number of tiles of a micro-batch.
        tile_size: side of a tile, in pixels.
        rows: maximum number of tokens of a sample.
        micro_batch_size: samples of a micro-batch without packing.
        seconds: assumed time of a micro-batch.
        world: GPUs of the run.
        tensor: tensor-parallel ranks, one of which loads.
        replicas: data-parallel replicas.
    """
    gpus = min(GPUS_PER_NODE, world)
    on_node = min(replicas, max(gpus // tensor, 1))
    decoder = data.image_decoder if data.loader == "energon" else "pillow"
    sent = "files" if files else decoder
    pixels = tiles * 3 * tile_size**2
    pack = tiles * FILE_BYTES_PER_TILE if files else pixels
    per_replica = data.loader_workers * (WORKER_AHEAD + 1) + (TAKEN_AHEAD + DEPTH if files else DEPTH)
    samples = data.pack_buffer if data.packing else (8 * micro_batch_size if data.loader == "energon" else 0)
    ranks = min(on_node * tensor, gpus)  # of the first stage; each pins its share
    staged = -(-DEPTH * pack // tensor) + (MOST_THREADS * DECODED_BYTES if files else 0)
    return Loading(
        sent,
        data.loader_workers,
        1 + -(-int(tiles * SECONDS_PER_TILE[sent] * 1e6) // max(int(seconds * 1e6), 1)),
        seconds,
        on_node,
        gpus,
        data.loader_workers * on_node * WORKER_BYTES[sent],
        max(data.loader_workers, 1) * on_node * samples * rows * BYTES_PER_TOKEN,
        on_node * per_replica * pack,
        ranks * staged,
        data.loader_workers * on_node * HELD_OUT_BYTES,
    )


def loading_figures(plan: Loading) -> dict[str, Any]:
    """Results for other tools, in bytes."""
    return {
        "loader_workers_needed": plan.needed,
        "loader_processes_per_node": plan.workers * plan.replicas,
        "host_memory_per_node": plan.total,
        "host_memory_of_evaluation": plan.held_out,
    }
