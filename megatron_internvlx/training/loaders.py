"""The Energon loader of a loading rank, and its position saved with and restored from checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.training import checkpointing

from megatron_internvlx import platform
from megatron_internvlx.arguments import settings_from
from megatron_internvlx.config import DataSettings
from megatron_internvlx.data.decode import TileDecoder
from megatron_internvlx.data.energon_batches import (
    EnergonBatches,
    LoaderSettings,
    LoaderState,
    redistribute,
    workers_for,
)
from megatron_internvlx.data.plan import PlanSettings
from megatron_internvlx.data.rejects import RejectLog
from megatron_internvlx.data.sample import SampleEncoder
from megatron_internvlx.parallel.batch import HostBatch
from megatron_internvlx.platform.transfer import side_stream

# Packs that a GPU decodes ahead of training.
AHEAD = 2
FOLDER = "loader"


class EnergonLoader:
    """Endless `HostBatch`es with a position that can be saved."""

    def __init__(self, batches: EnergonBatches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        batch = next(self.batches)
        assert batch.plan is not None and batch.tiles is not None
        return HostBatch(batch.plan, batch.tiles)

    def cut(self) -> tuple[int, int]:
        """Tiles and tokens that samples over a budget gave up so far."""
        return self.batches.dropped_tiles, self.batches.dropped_tokens

    def save_state(self) -> LoaderState:
        """Position after the micro-batches given so far."""
        return self.batches.save_state()


def say(message: str) -> None:
    """Tell the user once, from the first loading rank."""
    if mpu.get_data_parallel_rank() == 0:
        print(f"data loader: {message}", flush=True)


def energon_loader(
    args: argparse.Namespace, encoder: SampleEncoder, plan: PlanSettings, rejects: RejectLog
) -> EnergonLoader:
    """The training loader of this loading rank, at the position of the loaded checkpoint."""
    data = settings_from(args, DataSettings)
    rank, world = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    settings = LoaderSettings(
        rank=rank,
        world=world,
        workers=data.loader_workers,
        seed=args.seed,
        micro_batch_size=args.micro_batch_size,
        pack_buffer=data.pack_buffer,
        shuffle_buffer=data.shuffle_buffer,
    )
    state, settings = _resumed(args, data, settings)
    gpu = platform.device().index if data.image_decoder == "dali" else None
    decoder = TileDecoder(
        data.image_decoder, tile_size=args.image_size, apply_exif=encoder.apply_exif, gpu=gpu
    )
    batches = EnergonBatches(
        data.data or "",
        encoder,
        plan,
        settings,
        reject_log=rejects,
        decode=decoder,
        # A worker process cannot use the GPU of its parent: the bytes come here then.
        in_worker=gpu is None,
        ahead=AHEAD if gpu is not None and settings.workers else 0,
        stream=side_stream,
    )
    if state is not None:
        batches.restore(state)
    return EnergonLoader(batches)


def _resumed(
    args: argparse.Namespace, data: DataSettings, settings: LoaderSettings
) -> tuple[LoaderState | None, LoaderSettings]:
    """This rank's state of the loaded checkpoint, if there is one that fits, and the settings it needs."""
    step = getattr(args, "iteration", 0) or 0
    if not step or args.finetune:
        return None, settings
    fresh = replace(settings, seed=settings.seed + step)
    if data.restart_data:
        say(f"--restart-data: the data starts anew at step {step}, in another order")
        return None, fresh
    states = find_states(args, step)
    if not states:
        say(f"no position was saved for step {step}: the data starts anew, in another order")
        return None, fresh
    workers = workers_for(len(states), states[0].workers, settings.world)
    if workers is None:
        say(
            f"the position of {len(states)} data-parallel ranks with {states[0].workers} loader workers "
            f"cannot be dealt to {settings.world} ranks, because Energon gives each worker a fixed slice of "
            "the data: it starts anew, in another order; samples of the running epoch may come again"
        )
        return None, fresh
    if workers != settings.workers or len(states) != settings.world:
        say(
            f"going on from {len(states)} ranks x {states[0].workers} workers as {settings.world} ranks x "
            f"{workers} workers; every sample comes as before"
        )
    # A run that had started its data anew keeps that order when it resumes again.
    settings = replace(settings, workers=workers, seed=states[0].made_with["seed"])
    return redistribute(states, settings.world)[settings.rank], settings


def find_states(args: argparse.Namespace, step: int) -> list[LoaderState]:
    """Loader states of all ranks saved with checkpoint ``step``; empty if there are none."""
    folders = [args.dataloader_save, *(str(Path(f) / FOLDER) for f in (args.load, args.save) if f)]
    for folder in dict.fromkeys(folder for folder in folders if folder):
        files = sorted(Path(folder).glob(f"iter_{step:07d}/mp_rank_*/train_dataloader_dprank*.pt"))
        if files:
            # Our own file, with classes of ours and Energon's.
            every = [torch.load(file, weights_only=False)["dataloader_state_dict"] for file in files]
            every.sort(key=lambda state: state.rank)
            # Ranks beyond the world of the first are left from an earlier, wider run.
            return every[: every[0].world]
    return []


def save_with_checkpoints(args: argparse.Namespace) -> None:
    """Let Megatron save the loader's position with each checkpoint, beside them by default."""
    if args.save and not args.dataloader_save:
        args.dataloader_save = str(Path(args.save) / FOLDER)
    original = checkpointing.maybe_save_dataloader_state
    if getattr(original, "any_chunk", False):
        return

    def maybe_save(train_iterator: Any, *rest: Any, **options: Any) -> None:
        # With virtual pipeline stages there is a list of iterators, which Megatron does not expect here.
        first = train_iterator[0] if isinstance(train_iterator, list) else train_iterator
        original(first, *rest, **options)

    maybe_save.any_chunk = True  # type: ignore[attr-defined]
    checkpointing.maybe_save_dataloader_state = maybe_save
