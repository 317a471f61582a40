"""Batches of undecoded images to tiles in one DALI pipeline; on a GPU, no pixel is ever on the host.

On a GPU its JPEG engines and nvJPEG decode JPEG files, DALI's CPU decoders all others. The same graph, which
`dali_graph.py` builds, runs without a GPU.

If DALI fails on an image, Pillow cuts it. The failed run is repeated in halves and by a new pipeline, which takes
seconds. So `missing_decoders` is asked at the start, and loader workers send no files of those kinds; if a decoder is
found missing only later, further files of the kind go to Pillow at once.

S: side of a tile, in pixels. T: tiles, in the order of the plan.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_internvlx.data.dali_graph import MOST_IMAGES, build, inputs
from megatron_internvlx.data.decode_pil import load_tiles, read_header
from megatron_internvlx.data.encoded import FAILED, EncodedImage, Wanted, no_decoder
from megatron_internvlx.data.file_kinds import SENT, Kind, kind_of, small_picture
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.platform.transfer import Marker

# Share of JPEG files for the GPU's JPEG engines, as DALI chooses it; the GPU's cores decode the rest.
ENGINE_SHARE = 0.65
# Maximum number of runs in flight.
DEPTH = 2
# Maximum number of DALI's threads on a rank: more do not decode faster, because the GPU does most of the work.
MOST_THREADS = 8
# Images after which kinds without a decoder are tried again: the failure may have had another cause, such as memory.
RECHECK = 10_000


@dataclass(frozen=True)
class _Batch:
    """Batch in flight: its number, and how many runs and tiles it has."""

    number: int
    runs: int
    tiles: int


class TilePipeline:
    """Cuts batches of images: `start` a batch, later `collect` it.

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
        depth: int = DEPTH,
        threads: int = MOST_THREADS,
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
        self._started = 0
        self._batches: deque[_Batch] = deque()
        self._kept: dict[int, torch.Tensor] = {}  # tiles of batches that later ones overtook
        self._runs: deque[list[Wanted]] = deque()  # not collected; the first `_scheduled` of them are in DALI
        self._scheduled = 0
        self._last_outputs: tuple[Any, Marker] | None = None
        self._has_decoder: dict[Kind, bool] = {}  # kinds of files that DALI failed on

    def start(self, wanted: Sequence[Wanted]) -> int:
        """Start a batch and return its number, before it is decoded unless `depth` runs are in flight already."""
        if self.images // RECHECK != (self.images + len(wanted)) // RECHECK:
            self._has_decoder.clear()
        self.images += len(wanted)
        runs = [list(wanted[i : i + MOST_IMAGES]) for i in range(0, len(wanted), MOST_IMAGES)]
        self._started += 1
        self._batches.append(_Batch(self._started, len(runs), sum(one.count for one in wanted)))
        self._runs += runs
        self._schedule_waiting()
        return self._started

    def collect(self, out: torch.Tensor, number: int | None = None) -> None:
        """Copy the tiles of a batch to `out`, uint8 [T, 3, S, S] on the pipeline's device.

        Args:
            out: place of the tiles.
            number: batch, as `start` numbered it; tiles of those before it are kept until they are asked for. None:
                the oldest.
        """
        if number is None:
            number = min(self._kept, default=0) or self._batches[0].number
        while number not in self._kept:
            batch = self._batches.popleft()
            if batch.number == number:
                self._collect_batch(batch, out)
                return
            self._kept[batch.number] = kept = self._empty(batch.tiles)
            self._collect_batch(batch, kept)
        out.copy_(self._kept.pop(number))

    def _collect_batch(self, batch: _Batch, out: torch.Tensor) -> None:
        done = 0
        for _ in range(batch.runs):
            for tiles in self._collect_run():
                out[done : done + len(tiles)].copy_(tiles)
                self._mark_copied()
                done += len(tiles)
        assert done == len(out), f"{done} tiles for {len(out)} places"

    def _empty(self, tiles: int) -> torch.Tensor:
        device = "cpu" if self.device_id is None else f"cuda:{self.device_id}"
        return torch.empty((tiles, 3, self.tile_size, self.tile_size), dtype=torch.uint8, device=device)

    def cut(self, wanted: Sequence[Wanted]) -> torch.Tensor:
        """Tiles of a batch, uint8 [T, 3, S, S]: `start` and `collect` in one call."""
        out = self._empty(sum(one.count for one in wanted))
        self.collect(out, self.start(wanted))
        return out

    def missing_decoders(self) -> frozenset[Kind]:
        """Find the kinds of files that DALI does not decode on this machine, by a small picture of each.

        Call it before the first batch. The threads and memory that it needs are freed again, so that the process can
        fork. Raises RuntimeError if DALI does not work at all.
        """
        assert not self._runs, "batches are in flight"
        self._has_decoder = {}
        pictures = {kind: data for kind in SENT if (data := small_picture(kind)) is not None}
        if not self._can_cut(list(pictures.values())):
            self._has_decoder = {kind: self._can_cut([data]) for kind, data in pictures.items()}
        self._destroy_pipeline()
        return frozenset(kind for kind, has in self._has_decoder.items() if not has)

    def close(self) -> None:
        """Free threads and memory; batches in flight are lost."""
        self._destroy_pipeline()
        self._batches.clear()
        self._kept.clear()
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
            self._pipeline = build(self.device_id, self.tile_size, self.depth, self.threads, self._decoding)
            self._warm_up()

    def _feed(self, run: list[Wanted]) -> None:
        for name, value in inputs(run, self.tile_size).items():
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
        small = None if kind is None or kind in self._has_decoder else small_picture(kind)
        if kind is not None and small is not None:
            self._has_decoder[kind] = self._can_cut([small])

    def _can_cut(self, pictures: list[bytes]) -> bool:
        """Whether DALI decodes these files, tried at once; no run may be in flight."""
        self._ensure_pipeline()
        run = [Wanted.whole(EncodedImage(data, 1, 1, thumbnail=False)) for data in pictures]
        try:
            self._feed(run)
            self._pipeline.schedule_run()
            self._outputs(run)
        except RuntimeError:
            self._destroy_pipeline()
            return False
        return True

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
        self.fallbacks[FAILED if kind is None else no_decoder(kind)] += 1
        return torch.from_numpy(tiles[one.first : one.first + one.count])


def _kind(image: EncodedImage) -> Kind | None:
    """Kind of an image from its header, None if that is broken."""
    try:
        with read_header(image.data) as header:
            return kind_of(header)
    except BadSample:
        return None


_SMALL_JPEG = small_picture(("JPEG", "RGB")) or b""


def _stand_in(one: Wanted) -> Wanted:
    """Request for as many tiles of a small picture: the run keeps its shape, and Pillow's tiles replace them."""
    return replace(one, image=replace(one.image, data=_SMALL_JPEG, turn=1))
