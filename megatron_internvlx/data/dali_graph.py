"""DALI's graph from undecoded images to tiles, and its inputs.

decode -> EXIF turn -> resize to the grid, and to the thumbnail -> tiles -> the requested ones.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from megatron_internvlx.data.encoded import Wanted

# Images in one run of the pipeline; a larger batch takes several runs.
MOST_IMAGES = 128


def inputs(run: list[Wanted], size: int) -> dict[str, Any]:
    """Inputs of the pipeline of `build` for a run of at most `MOST_IMAGES`, one row per image."""
    grids = np.array([(one.image.rows, one.image.cols) for one in run], np.int32)
    turns = np.array([one.image.turn for one in run], np.int32)
    sides, channels = np.full(len(run), size, np.int32), np.full(len(run), 3, np.int32)
    return {
        "file": [np.frombuffer(one.image.data, np.uint8) for one in run],
        "size": (grids * size).astype(np.float32),
        "tiled": np.stack([grids[:, 0], sides, grids[:, 1], sides, channels], 1),
        "first": np.array([[one.first] for one in run], np.int32),
        "count": np.array([[one.count] for one in run], np.int32),
        "turned": turns != 1,
        "swapped": turns >= 5,
        "horizontal": np.isin(turns, (2, 3, 6, 7)).astype(np.int32),
        "vertical": np.isin(turns, (3, 4, 7, 8)).astype(np.int32),
    }


def _module(name: str) -> Any:
    return import_module(name)


def build(device_id: int | None, size: int, depth: int, threads: int, decoding: dict[str, Any]) -> Any:
    """DALI pipeline whose only output are the tiles of a run, uint8 [tiles, S, S, 3] of each image.

    Args:
        device_id: GPU; None for DALI's CPU backend.
        size: S, side of a tile, in pixels.
        depth: maximum number of runs in flight.
        threads: host threads.
        decoding: options of DALI's image decoder.
    """
    # DALI takes a second to import.
    dali, fn, types = (_module(f"nvidia.dali{name}") for name in ("", ".fn", ".types"))

    shapes = {"file": (types.UINT8, 1), "size": (types.FLOAT, 1), "tiled": (types.INT32, 1)}
    shapes |= {"first": (types.INT32, 1), "count": (types.INT32, 1)}
    shapes |= {"turned": (types.BOOL, 0), "swapped": (types.BOOL, 0)}
    shapes |= {"horizontal": (types.INT32, 0), "vertical": (types.INT32, 0)}
    cubic = {"interp_type": types.INTERP_CUBIC, "antialias": True}

    @dali.pipeline_def(
        enable_conditionals=True,
        batch_size=MOST_IMAGES,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=depth,
        exec_dynamic=True,
    )
    def graph() -> Any:
        given = {name: fn.external_source(name=name, dtype=d, ndim=n) for name, (d, n) in shapes.items()}
        image = fn.decoders.image(given["file"], output_type=types.RGB, adjust_orientation=False, **decoding)
        if given["turned"]:
            if given["swapped"]:
                image = fn.transpose(image, perm=[1, 0, 2], transpose_layout=False)
            image = fn.flip(image, horizontal=given["horizontal"], vertical=given["vertical"])
        whole = fn.reshape(fn.resize(image, size=given["size"], **cubic), shape=given["tiled"])
        tiles = fn.reshape(fn.transpose(whole, perm=[0, 2, 1, 3, 4]), shape=[-1, size, size, 3])
        small = fn.resize(image, size=[size, size], **cubic)
        every = fn.cat(tiles, fn.reshape(small, shape=[1, size, size, 3]), axis=0)
        return fn.slice(every, start=given["first"], shape=given["count"], axes=[0])

    pipeline = graph()
    pipeline.build()
    return pipeline
