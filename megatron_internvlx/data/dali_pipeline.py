"""Batches of undecoded images to tiles in one DALI pipeline; on a GPU, no pixel is ever on the host.

decode -> EXIF turn -> resize to the grid, and to the thumbnail -> tiles -> the requested ones. On a GPU its JPEG
engines and nvJPEG decode JPEG files, DALI's CPU decoders all others. The same graph runs without a GPU.

If DALI fails on an image, Pillow cuts it. The failed run is repeated in halves and by a new pipeline, which takes
seconds; so if DALI lacks a decoder of that kind of file, later files of the kind go to Pillow at once.

S: side of a tile, in pixels. T: tiles, in the order of the plan.
"""

from __future__ import annotations

import io
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_internvlx.data.decode_pil import load_tiles, read_header
from megatron_internvlx.data.encoded import FAILED, NO_DECODER, EncodedImage
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.platform.transfer import Marker

# Images in one run of the pipeline; a larger batch takes several runs.
MOST_IMAGES = 128
# Share of JPEG files for the GPU's JPEG engines, as DALI chooses it; the GPU's cores decode the rest.
ENGINE_SHARE = 0.65
# Kind of a file: format and mode as Pillow names them.
Kind = tuple[str, str]
# Images after which kinds without a decoder are tried again: the failure may have had another cause, such as memory.
RECHECK = 10_000


@dataclass(frozen=True)
class Wanted:
    """Request for `count` tiles of an image, from tile `first` on."""

    image: EncodedImage
    first: int
    count: int

    @classmethod
    def whole(cls, image: EncodedImage) -> Wanted:
        """Request for all tiles of an image, including the thumbnail."""
        return cls(image, 0, image.num_tiles)


class TilePipeline:
    """Cuts batches of images: `start` a batch, later `collect` it; the oldest batch comes first.

    Args:
        device_id: GPU; None for DALI's CPU backend.
        tile_size: S, in pixels.
        depth: maximum number of runs of the pipeline in flight.
        threads: host threads, for JPEG entropy codes and for formats that the GPU does not decode.
        engine_share: 0 to 1, share of the JPEG files for the GPU's JPEG engines.
        fancy_upsampling: upsample chroma as libjpeg and Pillow do; False: as nvJPEG does by default.

    `images` counts all images, `fallbacks` per reason those that Pillow cut instead of DALI, and `blank` per cause
    those that neither could read: their tiles are black, so that their micro-batch keeps its shape.
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
        self.images = 0
        self.fallbacks: Counter[str] = Counter()
        self.blank: Counter[str] = Counter()
        self._pipeline: Any = None
        self._batches: deque[int] = deque()  # number of runs per batch
        self._runs: deque[list[Wanted]] = deque()  # not collected; the first `_scheduled` of them are in DALI
        self._scheduled = 0
        self._last_outputs: tuple[Any, Marker] | None = None
        self._has_decoder: dict[Kind, bool] = {}  # kinds of files that DALI failed on

    def start(self, wanted: Sequence[Wanted]) -> None:
        """Start a batch; returns before it is decoded, unless `depth` runs are in flight already."""
        if self.images // RECHECK != (self.images + len(wanted)) // RECHECK:
            self._has_decoder.clear()
        self.images += len(wanted)
        runs = [list(wanted[i : i + MOST_IMAGES]) for i in range(0, len(wanted), MOST_IMAGES)]
        self._batches.append(len(runs))
        self._runs += runs
        self._schedule_waiting()

    def collect(self, out: torch.Tensor) -> None:
        """Copy the tiles of the oldest batch to `out`, uint8 [T, 3, S, S] on the pipeline's device."""
        done = 0
        for _ in range(self._batches.popleft()):
            for tiles in self._collect_run():
                out[done : done + len(tiles)].copy_(tiles)
                self._mark_copied()
                done += len(tiles)
        assert done == len(out), f"{done} tiles for {len(out)} places"

    def cut(self, wanted: Sequence[Wanted]) -> torch.Tensor:
        """Tiles of a batch, uint8 [T, 3, S, S]: `start` and `collect` in one call."""
        device = "cpu" if self.device_id is None else f"cuda:{self.device_id}"
        shape = (sum(one.count for one in wanted), 3, self.tile_size, self.tile_size)
        out = torch.empty(shape, dtype=torch.uint8, device=device)
        self.start(wanted)
        self.collect(out)
        return out

    def close(self) -> None:
        """Free threads and memory; batches in flight are lost."""
        self._destroy_pipeline()
        self._batches.clear()
        self._runs.clear()

    def _destroy_pipeline(self) -> None:
        self._release_outputs()
        self._pipeline, self._scheduled = None, 0

    def _mark_copied(self) -> None:
        """Note that a copy of the last outputs was queued on the device."""
        if self._last_outputs is not None:
            self._last_outputs = (self._last_outputs[0], Marker())

    def _release_outputs(self) -> None:
        """Let DALI reuse the memory of the last outputs, after they are copied."""
        if self._last_outputs is not None:
            self._last_outputs[1].wait()
            self._last_outputs = None

    def _schedule_waiting(self) -> None:
        while self._scheduled < min(self.depth, len(self._runs)):
            self._schedule(self._runs[self._scheduled])
            self._scheduled += 1

    def _schedule(self, run: list[Wanted]) -> None:
        self._ensure_pipeline()
        self._feed([one if self._lacking_decoder(one) is None else _stand_in(one) for one in run])
        self._pipeline.schedule_run()

    def _ensure_pipeline(self) -> None:
        if self._pipeline is None:
            self._pipeline = _build(self.device_id, self.tile_size, self.depth, self.threads, self._decoding)
            self._warm_up()

    def _feed(self, run: list[Wanted]) -> None:
        for name, value in _inputs(run, self.tile_size).items():
            self._pipeline.feed_input(name, value)

    def _warm_up(self) -> None:
        """Make DALI's first call, which starts `depth` runs; all later calls start one."""
        small = Wanted.whole(EncodedImage(_SMALL_JPEG, 1, 1, thumbnail=False))
        for _ in range(self.depth):
            self._feed([small])
        self._pipeline.schedule_run()
        for _ in range(self.depth):
            self._pipeline.outputs()

    def _collect_run(self) -> Iterator[torch.Tensor]:
        """Tiles of the oldest run, in one or several tensors."""
        run = self._runs.popleft()
        try:
            tiles = self._outputs(run)
        except RuntimeError:
            # The other runs in flight are repeated in a new pipeline, once the images of this one are separated.
            self._destroy_pipeline()
            yield from self._cut_in_halves(run)
        else:
            self._scheduled -= 1
            yield from self._with_pillow_tiles(run, tiles)
        self._schedule_waiting()

    def _outputs(self, run: list[Wanted]) -> torch.Tensor:
        self._release_outputs()
        (tiles,) = self._pipeline.outputs()
        self._last_outputs = (tiles, Marker())
        shape = [sum(one.count for one in run), self.tile_size, self.tile_size, 3]
        # The later copy permutes channels; a transpose in DALI halves the images per second.
        return torch.from_dlpack(tiles.as_reshaped_tensor(shape)).permute(0, 3, 1, 2)

    def _cut_in_halves(self, run: list[Wanted]) -> Iterator[torch.Tensor]:
        """Tiles of a run that failed: repeated in halves, so that only the faulty image goes to Pillow."""
        if len(run) == 1:
            self._check_decoder(run[0])
            yield self._cut_with_pillow(run[0])
            return
        for half in (run[: len(run) // 2], run[len(run) // 2 :]):
            try:
                self._schedule(half)
                tiles = self._outputs(half)
            except RuntimeError:
                self._destroy_pipeline()
                yield from self._cut_in_halves(half)
            else:
                yield from self._with_pillow_tiles(half, tiles)

    def _with_pillow_tiles(self, run: list[Wanted], tiles: torch.Tensor) -> Iterator[torch.Tensor]:
        """Tiles of a run in order, with Pillow's in place of those of stand-ins."""
        done = end = 0
        for one in run:
            if self._lacking_decoder(one) is not None:
                if end > done:
                    yield tiles[done:end]
                yield self._cut_with_pillow(one)
                done = end + one.count
            end += one.count
        if end > done:
            yield tiles[done:end]

    def _lacking_decoder(self, one: Wanted) -> Kind | None:
        """Kind of an image if DALI is known to lack a decoder for it, otherwise None."""
        if all(self._has_decoder.values()):
            return None
        kind = _kind(one.image)
        return None if kind is None or self._has_decoder.get(kind, True) else kind

    def _check_decoder(self, one: Wanted) -> None:
        """Find out, once per kind, whether DALI failed on an image because it lacks the decoder.

        The test is a small picture of the same kind: a single odd file does not send all others to Pillow. Raises
        RuntimeError if no pipeline can be built any more.
        """
        kind = _kind(one.image)
        small = None if kind is None or kind in self._has_decoder else _small_picture(*kind)
        if kind is None or small is None:
            return
        self._ensure_pipeline()
        run = [Wanted.whole(EncodedImage(small, 1, 1, thumbnail=False))]
        try:
            self._schedule(run)
            self._outputs(run)
            self._has_decoder[kind] = True
        except RuntimeError:
            self._destroy_pipeline()
            self._has_decoder[kind] = False

    def _cut_with_pillow(self, one: Wanted) -> torch.Tensor:
        """Tiles of an image, black if Pillow cannot read it either; counted by reason."""
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
        kind = self._lacking_decoder(one)
        self.fallbacks[FAILED if kind is None else f"{NO_DECODER} for {kind[0]}"] += 1
        return torch.from_numpy(tiles[one.first : one.first + one.count])


def _kind(image: EncodedImage) -> Kind | None:
    """Kind of an image from its header, None if that is broken."""
    try:
        with read_header(image.data) as header:
            return header.format or "", header.mode
    except BadSample:
        return None


def _small_picture(form: str, mode: str) -> bytes | None:
    """File of a small black picture, None if Pillow does not write this kind."""
    file = io.BytesIO()
    try:
        Image.new(mode, (16, 16)).save(file, form)
    except (OSError, ValueError, KeyError):
        return None
    return file.getvalue()


_SMALL_JPEG = _small_picture("JPEG", "RGB") or b""


def _stand_in(one: Wanted) -> Wanted:
    """Request for as many tiles of a small picture: the run keeps its shape, and Pillow's tiles replace them."""
    return replace(one, image=replace(one.image, data=_SMALL_JPEG, turn=1))


def _inputs(run: list[Wanted], size: int) -> dict[str, Any]:
    """Inputs of the pipeline of `_build` for a run, one row per image."""
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
