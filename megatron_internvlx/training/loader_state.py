"""The Energon loader of a loading rank, and its position saved with and restored from checkpoints."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.training import checkpointing

from megatron_internvlx.config import DataSettings, settings_from
from megatron_internvlx.data.decode import TileDecoder, ranks_cut
from megatron_internvlx.data.energon_loader import (
    EnergonBatches,
    LoaderSettings,
    LoaderState,
    redistribute,
    workers_for,
)
from megatron_internvlx.data.plan import PlanSettings
from megatron_internvlx.data.rejects import RejectLog
from megatron_internvlx.data.sample import SampleEncoder
from megatron_internvlx.files import checkpoint_directory
from megatron_internvlx.parallel.batch import HostBatch

# Packs whose files the training process has taken from its workers before it asks for them.
AHEAD = 2
FOLDER = "loader"
_REMEDY = "go back to an earlier checkpoint with --ckpt-step, or start the data anew with --restart-data"


class EnergonLoader:
    """Endless `HostBatch`es with a position that can be saved."""

    def __init__(self, batches: EnergonBatches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        batch = next(self.batches)
        assert batch.plan is not None
        return HostBatch(batch.plan, batch.tiles, batch.images, batch.restore_key)

    def save_state(self, unused: Sequence[Any] = ()) -> LoaderState:
        """Position after the micro-batches given so far, without the last ones, whose keys are ``unused``."""
        return self.batches.save_state(unused)


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
    travel = ranks_cut(data)
    decoder = TileDecoder(
        data.image_decoder, tile_size=args.image_size, apply_exif=encoder.apply_exif, travel=travel
    )
    batches = EnergonBatches(
        data.data or "",
        encoder,
        plan,
        settings,
        reject_log=rejects,
        decode=decoder,
        ahead=AHEAD if travel and settings.workers else 0,
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


def _folders(args: argparse.Namespace, step: int) -> list[Path]:
    """Where the positions saved with checkpoint ``step`` may be, the likeliest first."""
    folders = [args.dataloader_save, *(str(Path(f) / FOLDER) for f in (args.load, args.save) if f)]
    return [Path(folder) / f"iter_{step:07d}" for folder in dict.fromkeys(folders) if folder]


def position_file(rank: int | str) -> str:
    """Name of a data-parallel rank's file, or a pattern for it, below the folder of a checkpoint's positions."""
    return f"mp_rank_*/train_dataloader_dprank{rank if isinstance(rank, str) else f'{rank:03d}'}.pt"


def position_fault(args: argparse.Namespace, step: int) -> str | None:
    """What is missing of the loader's position at checkpoint ``step`` in --save.

    None if it is complete, or if the checkpoint was not made with this loader.
    """
    checkpoint = checkpoint_directory(Path(args.save), step)
    try:
        made = load_common_state_dict(checkpoint)["args"]
    except Exception as error:  # a torn file raises nearly anything
        return f"the arguments in it cannot be read: {error!r}"
    if getattr(made, "loader", None) != "energon":
        return None
    folders = _folders(args, step)
    place = next((folder for folder in folders if folder.is_dir()), folders[0])
    for rank in range(made.data_parallel_size):
        files = list(place.glob(position_file(rank)))
        if not files:
            return f"the data loader's position of rank {rank} of {made.data_parallel_size} is not in {place}"
        if not zipfile.is_zipfile(files[0]):  # a torch file whose end is missing is none
            return f"{files[0]} is cut off"
    return None


def find_states(args: argparse.Namespace, step: int) -> list[LoaderState]:
    """Loader states of all ranks saved with checkpoint ``step``; empty if there are none.

    Raises ValueError if some are missing or cannot be read: others would go on where they were, and samples
    would be left out.
    """
    for folder in _folders(args, step):
        files = sorted(folder.glob(position_file("*")))
        if not files:
            continue
        try:
            # Our own file, with classes of ours and Energon's.
            every = [torch.load(file, weights_only=False)["dataloader_state_dict"] for file in files]
        except Exception as error:  # a torn file raises nearly anything
            raise ValueError(f"a loader position in {folder} cannot be read: {error}; {_REMEDY}") from error
        every.sort(key=lambda state: state.rank)
        # Ranks beyond the world of the first are left from an earlier, wider run.
        every = every[: every[0].world]
        if lacking := sorted(set(range(every[0].world)) - {state.rank for state in every}):
            raise ValueError(
                f"{folder} holds the loader positions of {len(every)} of {every[0].world} ranks, without "
                f"{', '.join(map(str, lacking))}; {_REMEDY}"
            )
        return every
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
