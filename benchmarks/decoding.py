"""Speed of the pipeline that cuts tiles on a GPU: images per second by batch, engine share and upsampling."""

from __future__ import annotations

import io
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_internvlx import platform
from megatron_internvlx.data.dali_pipeline import ENGINE_SHARE, TilePipeline
from megatron_internvlx.data.encoded import EncodedImage, Wanted
from megatron_internvlx.data.rvtc import tile_grid

TILE, MAX_TILES, BATCH, SETTLE = 448, 12, 48, 3
WIDTHS, HEIGHTS = (500, 1900), (400, 1400)


def photograph(seed: int) -> bytes:
    """A JPEG file of 500x400 to 1900x1400, quality 90, 4:2:0: low-frequency colour and Gaussian noise of sigma 3."""
    rng = np.random.default_rng(seed)
    width, height = int(rng.integers(*WIDTHS)), int(rng.integers(*HEIGHTS))
    low = Image.fromarray(rng.integers(0, 255, (9, 12, 3)).astype(np.uint8))
    smooth = np.asarray(low.resize((width, height)), np.float32)
    noise = rng.normal(0, 3, (height, width, 1)).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def photographs(count: int, max_tiles: int = MAX_TILES) -> list[EncodedImage]:
    """So many of them with their grids (RVTC edge, at most so many tiles and the thumbnail), drawn on every core."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        files = list(pool.map(photograph, range(count)))
    sizes = [Image.open(io.BytesIO(data)).size for data in files]
    grids = [tile_grid(*size, tile_size=TILE, max_tiles=max_tiles) for size in sizes]
    return [EncodedImage(data, *grid, True) for data, grid in zip(files, grids, strict=True)]


def rate(
    images: list[EncodedImage], batch: int, seconds: float, device_id: int | None = 0, **options: Any
) -> dict:
    """Images and tiles per second of a pipeline that always has two batches on their way."""
    pipeline = TilePipeline(device_id, TILE, **options)
    many = images * (-(-batch // len(images)))
    wanted = [Wanted.whole(image) for image in many[:batch]]
    device = "cpu" if device_id is None else f"cuda:{device_id}"
    out = torch.empty((sum(one.count for one in wanted), 3, TILE, TILE), dtype=torch.uint8, device=device)
    pipeline.start(wanted)
    done, began = -SETTLE, time.perf_counter()
    while done < 2 or time.perf_counter() - began < seconds:
        pipeline.start(wanted)
        pipeline.collect(out)
        done += 1
        if done == 0:
            platform.synchronize()
            began = time.perf_counter()
    platform.synchronize()
    spent = time.perf_counter() - began
    pipeline.collect(out)
    pipeline.close()
    return {
        "batch": batch,
        **options,
        "images_per_s": round(done * batch / spent, 1),
        "tiles_per_s": round(done * len(out) / spent, 1),
        "rescued": pipeline.fallbacks.total(),
        "blank": sum(pipeline.blank.values()),
    }


def host_time(images: list[EncodedImage], batch: int, device_id: int | None = 0, rest: float = 0.05) -> dict:
    """Milliseconds of the training thread per micro-batch, the GPU having had ``rest`` seconds to decode it."""
    pipeline = TilePipeline(device_id, TILE)
    wanted = [Wanted.whole(image) for image in images[:batch]]
    device = "cpu" if device_id is None else f"cuda:{device_id}"
    out = torch.empty((sum(one.count for one in wanted), 3, TILE, TILE), dtype=torch.uint8, device=device)
    starts, collects = [], []
    for _ in range(12):
        begin = time.perf_counter()
        pipeline.start(wanted)
        started = time.perf_counter()
        time.sleep(rest)
        rested = time.perf_counter()
        pipeline.collect(out)
        starts.append(started - begin)
        collects.append(time.perf_counter() - rested)
        platform.synchronize()
    pipeline.close()
    middle = [round(1000 * float(np.median(times[2:])), 3) for times in (starts, collects)]
    return {"batch": batch, "tiles": len(out), "start_ms": middle[0], "collect_ms": middle[1]}


def gpu_rows(
    seconds: float, images: list[EncodedImage] | None = None, device_id: int | None = 0
) -> list[dict]:
    """Rows of a table, one per batch size, engine share and upsampling.

    Args:
        seconds: what all rows take together on a GPU, about.
        images: as many as a batch has in most rows; None draws them.
        device_id: GPU; None for the CPU, where engine share and upsampling change nothing.
    """
    images = images or photographs(BATCH)
    batch = len(images)
    small, half = max(batch // 6, 1), max(batch // 2, 1)
    variants: list[tuple[int, dict[str, Any]]] = [
        *((count, {"engine_share": ENGINE_SHARE}) for count in (small, half, batch, 2 * batch)),
        *((batch, {"engine_share": share}) for share in (0.0, 0.5, 0.8, 1.0)),
        (batch, {"engine_share": ENGINE_SHARE, "fancy_upsampling": False}),
        (batch, {"engine_share": ENGINE_SHARE, "threads": 8}),
    ]
    each = seconds / (len(variants) + 2)
    rows = [rate(images, count, each, device_id, **options) for count, options in variants]
    return rows + [host_time(images, count, device_id) for count in (small, half)]
