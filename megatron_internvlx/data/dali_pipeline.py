"""Batches of undecoded images to tiles in one DALI pipeline; on a GPU, no pixel is ever on the host.

decode -> EXIF turn -> resize to the grid, and to the thumbnail -> tiles -> those that are wanted. On a GPU its JPEG
engines and nvJPEG decode JPEG files, DALI's CPU decoders all others. The same graph runs without a GPU.

S: side of a tile, in pixels. T: tiles, in the order of the plan.
"""

from __future__ import annotations

import io
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_internvlx.data.decode_pil import load_tiles
from megatron_internvlx.data.encoded import EncodedImage
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.platform.transfer import Marker

# Of one run of the pipeline; more are cut in several runs.
MOST_IMAGES = 128
# DALI's own: the share of JPEG files for the GPU's JPEG engines; the rest goes to its cores.
ENGINE_SHARE = 0.65


@dataclass(frozen=True)
class Wanted:
    """``count`` tiles of an image, from tile ``first`` on."""

    image: EncodedImage
    first: int
    count: int

    @classmethod
    def whole(cls, image: EncodedImage) -> Wanted:
        """Every tile of an image, the thumbnail among them."""
        return cls(image, 0, image.num_tiles)


class TilePipeline:
    """Cuts batches of images: `start` some, then `collect` them in turn.

    Args:
        device_id: the GPU; None for DALI's CPU backend.
        tile_size: S, in pixels.
        depth: runs of the pipeline on their way at once.
        threads: of the host, for JPEG entropy codes and for formats that the GPU does not decode.
        engine_share: 0 to 1, share of the JPEG files for the GPU's JPEG engines.
        fancy_upsampling: chroma is upsampled as libjpeg, and so Pillow, does it; False: nvJPEG's own way.

    ``images`` counts all, ``rescued`` those that DALI failed on and Pillow read, ``blank`` per cause those that
    nobody could read: their tiles are black, so that their micro-batch keeps its shape.
    """

    def __init__(
        self,
        device_id: int | None,
        tile_size: int,
        *,
        depth: int = 2,
        threads: int = 8,
        engine_share: float = ENGINE_SHARE,
        fancy_upsampling: bool = True,
    ):
        if depth < 1 or threads < 1 or not 0 <= engine_share <= 1:
            raise ValueError(
                f"depth {depth} and threads {threads} must be at least 1, engine_share {engine_share} in 0..1"
            )
        self.device_id, self.tile_size, self.depth, self.threads = device_id, tile_size, depth, threads
        self._decoding: dict[str, Any] = {"device": "cpu"}
        if device_id is not None:
            self._decoding = {
                "device": "mixed",
                "hw_decoder_load": engine_share,
                "jpeg_fancy_upsampling": fancy_upsampling,
            }
        self.images = self.rescued = 0
        self.blank: Counter[str] = Counter()
        self._pipeline: Any = None
        self._batches: deque[int] = deque()  # runs of each batch
        self._runs: deque[list[Wanted]] = deque()  # not collected; the first `_fed` of them are DALI's
        self._fed = 0
        self._held: tuple[Any, Marker] | None = None

    def start(self, wanted: Sequence[Wanted]) -> None:
        """Begin a batch; returns before it is decoded, unless ``depth`` runs are on their way already."""
        self.images += len(wanted)
        runs = [list(wanted[i : i + MOST_IMAGES]) for i in range(0, len(wanted), MOST_IMAGES)]
        self._batches.append(len(runs))
        self._runs += runs
        self._feed()

    def collect(self, out: torch.Tensor) -> None:
        """Tiles of the oldest batch into ``out``, uint8 [T, 3, S, S] on the pipeline's device."""
        done = 0
        for _ in range(self._batches.popleft()):
            for tiles in self._collect_run():
                out[done : done + len(tiles)].copy_(tiles)
                self._copied()
                done += len(tiles)
        assert done == len(out), f"{done} tiles for {len(out)} places"

    def cut(self, wanted: Sequence[Wanted]) -> torch.Tensor:
        """`start` and `collect` at once: tiles uint8 [T, 3, S, S]."""
        device = "cpu" if self.device_id is None else f"cuda:{self.device_id}"
        shape = (sum(one.count for one in wanted), 3, self.tile_size, self.tile_size)
        out = torch.empty(shape, dtype=torch.uint8, device=device)
        self.start(wanted)
        self.collect(out)
        return out

    def close(self) -> None:
        """Give back threads and memory; what was on its way is lost."""
        self._drop()
        self._batches.clear()
        self._runs.clear()

    def _drop(self) -> None:
        self._release()
        self._pipeline, self._fed = None, 0

    def _copied(self) -> None:
        """The copy of the last outputs has just been asked for."""
        if self._held is not None:
            self._held = (self._held[0], Marker())

    def _release(self) -> None:
        """DALI may use the memory of the last outputs again once they are copied."""
        if self._held is not None:
            self._held[1].wait()
            self._held = None

    def _feed(self) -> None:
        while self._fed < min(self.depth, len(self._runs)):
            self._schedule(self._runs[self._fed])
            self._fed += 1

    def _schedule(self, run: list[Wanted]) -> None:
        if self._pipeline is None:
            self._pipeline = _build(self.device_id, self.tile_size, self.depth, self.threads, self._decoding)
            self._warm_up()
        self._put(run)
        self._pipeline.schedule_run()

    def _put(self, run: list[Wanted]) -> None:
        for name, value in _inputs(run, self.tile_size).items():
            self._pipeline.feed_input(name, value)

    def _warm_up(self) -> None:
        """DALI's first call starts ``depth`` runs, all later ones start one."""
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "JPEG")
        small = Wanted.whole(EncodedImage(file.getvalue(), 1, 1, thumbnail=False))
        for _ in range(self.depth):
            self._put([small])
        self._pipeline.schedule_run()
        for _ in range(self.depth):
            self._pipeline.outputs()

    def _collect_run(self) -> Iterator[torch.Tensor]:
        """Tiles of the oldest run, in one piece or several."""
        run = self._runs.popleft()
        try:
            tiles = self._outputs(run)
        except RuntimeError:
            # What else is on its way starts anew in a new pipeline, after this run's images were told apart.
            self._drop()
            yield from self._apart(run)
        else:
            self._fed -= 1
            yield tiles
        self._feed()

    def _outputs(self, run: list[Wanted]) -> torch.Tensor:
        self._release()
        (tiles,) = self._pipeline.outputs()
        self._held = (tiles, Marker())
        shape = [sum(one.count for one in run), self.tile_size, self.tile_size, 3]
        # Channels move in the copy to their place; the same in DALI halves the images per second.
        return torch.from_dlpack(tiles.as_reshaped_tensor(shape)).permute(0, 3, 1, 2)

    def _apart(self, run: list[Wanted]) -> Iterator[torch.Tensor]:
        """A run that failed, in halves, so that only the image at fault goes to Pillow."""
        if len(run) == 1:
            yield self._rescue(run[0])
            return
        for half in (run[: len(run) // 2], run[len(run) // 2 :]):
            try:
                self._schedule(half)
                tiles = self._outputs(half)
            except RuntimeError:
                self._drop()
                yield from self._apart(half)
            else:
                yield tiles

    def _rescue(self, one: Wanted) -> torch.Tensor:
        image, size = one.image, self.tile_size
        try:
            tiles = load_tiles(
                image.data,
                image.cols,
                image.rows,
                tile_size=size,
                thumbnail=image.thumbnail,
                apply_exif=image.turn != 1,
            )
        except BadSample as bad:
            self.blank[bad.cause] += 1
            return torch.zeros((one.count, 3, size, size), dtype=torch.uint8)
        self.rescued += 1
        return torch.from_numpy(tiles[one.first : one.first + one.count])


def _inputs(run: list[Wanted], size: int) -> dict[str, Any]:
    """What the pipeline of `_build` is fed for a run, one row per image."""
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


def _build(device_id: int | None, size: int, depth: int, threads: int, decoding: dict[str, Any]) -> Any:
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
