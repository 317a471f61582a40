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
from megatron_internvlx.data.decode import TileDecoder
from megatron_internvlx.data.energon_loader import (
    EnergonBatches,
    LoaderSettings,
    LoaderState,
    redistribute,
    workers_for,
)
from megatron_internvlx.data.plan import PlanSettings
from megatron_internvlx.data.prefetch import TAKEN_AHEAD
from megatron_internvlx.data.rejects import RejectLog, UnusableData
from megatron_internvlx.data.sample import SampleEncoder
from megatron_internvlx.files import checkpoint_directory
from megatron_internvlx.megatron_settings import Batches, CheckpointFiles, Progress
from megatron_internvlx.parallel.batch import HostBatch

FOLDER = "loader"
_REMEDY = "go back to an earlier checkpoint with --ckpt-step, or start the data anew with --restart-data"


class EnergonLoader:
    """Endless iterator of `HostBatch` with a position that can be saved."""

    def __init__(self, batches: EnergonBatches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        batch = next(self.batches)
        assert batch.plan is not None
        return HostBatch(batch.plan, batch.tiles, batch.images, batch.restore_key)

    def save_state(self, unused: Sequence[Any] = ()) -> LoaderState:
        """Position after the micro-batches given so far, without the last ones, whose keys are `unused`."""
        return self.batches.save_state(unused)


def print_once(message: str) -> None:
    """Print a message on the first loading rank only."""
    if mpu.get_data_parallel_rank() == 0:
        print(f"data loader: {message}", flush=True)


def energon_loader(
    args: argparse.Namespace,
    encoder: SampleEncoder,
    plan: PlanSettings,
    rejects: RejectLog,
    decoder: TileDecoder,
) -> EnergonLoader:
    """Create the training loader of this loading rank, at the position of the checkpoint that Megatron loaded."""
    data, sizes = settings_from(args, DataSettings), settings_from(args, Batches)
    rank, world = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    settings = LoaderSettings(
        rank=rank,
        world=world,
        workers=data.loader_workers,
        seed=sizes.seed,
        packing=data.packing,
        micro_batch_size=sizes.micro_batch_size,
        pack_buffer=data.pack_buffer,
        shuffle_buffer=data.shuffle_buffer,
    )
    files = settings_from(args, CheckpointFiles)
    state, settings = _resume(files, data, Progress(args).loaded_step, settings)
    batches = EnergonBatches(
        data.data or "",
        encoder,
        plan,
        settings,
        reject_log=rejects,
        decode=decoder,
        ahead=TAKEN_AHEAD if decoder.travel and settings.workers else 0,
    )
    if state is not None:
        batches.restore(state)
    return EnergonLoader(batches)


def _resume(
    files: CheckpointFiles, data: DataSettings, step: int, settings: LoaderSettings
) -> tuple[LoaderState | None, LoaderSettings]:
    """Read this rank's position at a checkpoint, and adapt the loader's settings to it.

    Args:
        files: directories that may contain the positions.
        data: whether the data restart, and the directory of the positions.
        step: iteration of the checkpoint; 0 without one.
        settings: settings of a loader that starts at the beginning.

    Returns:
        The position, None if the data start anew, and the settings to use.
    """
    if not step or files.finetune:
        return None, settings
    fresh = replace(settings, seed=settings.seed + step)
    if data.restart_data:
        print_once(f"--restart-data: the data start anew at step {step}, in another order")
        return None, fresh
    states = find_states(files, data, step)
    if not states:
        print_once(f"no position was saved for step {step}: the data start anew, in another order")
        return None, fresh
    workers = workers_for(len(states), states[0].workers, settings.world)
    if workers is None:
        print_once(
            f"the position of {len(states)} data-parallel ranks with {states[0].workers} loader workers "
            f"cannot be divided over {settings.world} ranks, because Energon gives each worker a fixed slice of "
            "the data: they start anew, in another order; samples of the current epoch may repeat"
        )
        return None, fresh
    if workers != settings.workers or len(states) != settings.world:
        print_once(
            f"resuming from {len(states)} ranks x {states[0].workers} workers with {settings.world} ranks x "
            f"{workers} workers; no sample is skipped or repeated"
        )
    # A run that had started its data anew keeps that order when it resumes again.
    settings = replace(settings, workers=workers, seed=states[0].made_with["seed"])
    return redistribute(states, settings.world)[settings.rank], settings


def _folders(files: CheckpointFiles, data: DataSettings, step: int) -> list[Path]:
    """Folders that may contain the positions saved with checkpoint `step`, the most likely first."""
    places = [data.dataloader_save, *(str(Path(f) / FOLDER) for f in (files.load, files.save) if f)]
    return [Path(place) / f"iter_{step:07d}" for place in dict.fromkeys(places) if place]


def position_file(rank: int | str) -> str:
    """Path of a data-parallel rank's file, or a pattern for it, below the folder of a checkpoint's positions."""
    return f"mp_rank_*/train_dataloader_dprank{rank if isinstance(rank, str) else f'{rank:03d}'}.pt"


def position_fault(files: CheckpointFiles, data: DataSettings, step: int) -> str | None:
    """Missing or broken part of the loader's position at checkpoint `step` in --save.

    None if it is complete, or if the checkpoint was not made with this loader.
    """
    assert files.save is not None
    checkpoint = checkpoint_directory(Path(files.save), step)
    try:
        made = load_common_state_dict(checkpoint)["args"]
    except Exception as error:  # a torn file raises nearly anything
        return f"the arguments in it cannot be read: {error!r}"
    if getattr(made, "loader", None) != "energon":
        return None
    folders = _folders(files, data, step)
    place = next((folder for folder in folders if folder.is_dir()), folders[0])
    for rank in range(made.data_parallel_size):
        found = list(place.glob(position_file(rank)))
        if not found:
            return f"the data loader's position of rank {rank} of {made.data_parallel_size} is not in {place}"
        if not zipfile.is_zipfile(found[0]):  # torch writes zip files, whose index is at the end
            return f"{found[0]} is cut off"
    return None


def find_states(files: CheckpointFiles, data: DataSettings, step: int) -> list[LoaderState]:
    """Loader states of all ranks saved with checkpoint `step`; empty if there are none.

    Raises UnusableData if some are missing or unreadable: with a part of them, samples would be left out.
    """
    for folder in _folders(files, data, step):
        paths = sorted(folder.glob(position_file("*")))
        if not paths:
            continue
        try:
            # Our own file, with classes of ours and Energon's.
            every = [torch.load(path, weights_only=False)["dataloader_state_dict"] for path in paths]
        except Exception as error:  # a torn file raises nearly anything
            raise UnusableData(f"a loader position in {folder} cannot be read: {error}; {_REMEDY}") from error
        every.sort(key=lambda state: state.rank)
        # Files of ranks beyond the world size of the first are left from an earlier run with more ranks.
        every = every[: every[0].world]
        if lacking := sorted(set(range(every[0].world)) - {state.rank for state in every}):
            raise UnusableData(
                f"{folder} has the loader positions of {len(every)} of {every[0].world} ranks, without "
                f"{', '.join(map(str, lacking))}; {_REMEDY}"
            )
        return every
    return []


def save_with_checkpoints(args: argparse.Namespace) -> None:
    """Make Megatron save the loader's position with each checkpoint, in loader/ of --save by default."""
    save = settings_from(args, CheckpointFiles).save
    if save and not settings_from(args, DataSettings).dataloader_save:
        args.dataloader_save = str(Path(save) / FOLDER)
    original = checkpointing.maybe_save_dataloader_state
    if getattr(original, "any_chunk", False):
        return

    def maybe_save(train_iterator: Any, *rest: Any, **options: Any) -> None:
        # With virtual pipeline stages there is a list of iterators, which Megatron does not expect here.
        first = train_iterator[0] if isinstance(train_iterator, list) else train_iterator
        original(first, *rest, **options)

    maybe_save.any_chunk = True  # type: ignore[attr-defined]
    checkpointing.maybe_save_dataloader_state = maybe_save
