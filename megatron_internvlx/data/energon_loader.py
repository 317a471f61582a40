"""Micro-batches of one loading rank from a prepared directory, and the state that resumes them exactly."""

from __future__ import annotations

import faulthandler
import gc
import io
import queue
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from copy import copy
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset
from megatron.energon.errors import reraise_exception
from megatron.energon.savable_loader import SavableDataLoaderState

from megatron_internvlx.data.ahead import Ahead
from megatron_internvlx.data.energon_tasks import Batch, Decode, Delivery, PackEncoder
from megatron_internvlx.data.plan import PlanSettings
from megatron_internvlx.data.prepared import METADATASET, prepared_sets
from megatron_internvlx.data.rejects import RejectLog, TooManyRejects
from megatron_internvlx.data.sample import SampleEncoder

STATE_VERSION = 1
# Packs without one good sample that may come in a row.
MAX_EMPTY = 64


@dataclass(frozen=True)
class LoaderSettings:
    """``rank`` of ``world`` loading ranks; ``workers`` processes each, 0 for none; ``micro_batch_size``
    samples without packing; ``pack_buffer`` samples among which packs are chosen; ``shuffle_buffer``
    samples from which the next is drawn; ``sequence`` records read one after another before jumping
    elsewhere; ``prefetch`` micro-batches that each worker is ahead."""

    rank: int = 0
    world: int = 1
    workers: int = 0
    seed: int = 0
    micro_batch_size: int = 1
    pack_buffer: int = 1000
    shuffle_buffer: int = 256
    sequence: int = 32
    prefetch: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world or self.workers < 0 or self.seed < 0:
            raise ValueError(
                f"rank {self.rank} must be in 0..{self.world - 1}; workers {self.workers} and seed "
                f"{self.seed} must not be negative"
            )
        for name in ("micro_batch_size", "pack_buffer", "sequence", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass
class LoaderState:
    """What a loading rank saves: Energon's state, packs on their way, and what it was made with."""

    made_with: dict[str, Any]
    rank: int
    world: int
    workers: int
    energon: SavableDataLoaderState | None
    pending: list[Any] = field(default_factory=list)
    version: int = STATE_VERSION


class EnergonBatches:
    """Endless planned micro-batches; `save_state` and `restore` make the next ones come again.

    Args:
        directory: what tools/prepare_data.py wrote.
        encoder: record -> sample; its packing budget decides whether packs are made.
        plan: grids, alignment and static budgets.
        settings: the share of this rank.
        reject_log: counts and lists bad samples; TooManyRejects ends the iteration.
        decode: bytes of an image -> tiles, or the file for a GPU.
        ahead: packs that a thread takes from the workers before they are asked for. 0: no thread.
    """

    def __init__(
        self,
        directory: str | Path,
        encoder: SampleEncoder,
        plan: PlanSettings,
        settings: LoaderSettings,
        *,
        reject_log: RejectLog,
        decode: Decode,
        ahead: int = 0,
    ):
        if ahead and not settings.workers:
            raise ValueError("a thread ahead of training needs worker processes to take packs from")
        self.directory, self.encoder, self.plan = Path(directory), encoder, plan
        self.settings, self.reject_log, self.decode = settings, reject_log, decode
        self.taken = 0
        self._depth = ahead
        self.fallbacks: Counter[str] = Counter()
        """Images so far that went to Pillow instead of DALI, per reason."""
        self._pending: list[Any] = []
        self._ahead: Ahead | None = None
        self._made_with = self._identity()
        self._loader = self._build()
        self._packs: Iterator[Delivery] | None = None

    def _identity(self) -> dict[str, Any]:
        """Settings that decide which samples come in which order."""
        encoder = {key: value for key, value in asdict(self.encoder.settings).items() if key != "compat"}
        wanted = ("seed", "micro_batch_size", "pack_buffer", "shuffle_buffer", "sequence")
        own = {name: getattr(self.settings, name) for name in wanted}
        sets = prepared_sets(self.directory)
        data = {entry.name: [part.records for part in entry.parts] for entry in sets}
        return {**encoder, **own, "records": data}

    def _build(self) -> Any:
        settings = self.settings
        total = sum(sum(counts) for counts in self._made_with["records"].values())
        slices = settings.world * max(settings.workers, 1)
        if total < slices:
            raise ValueError(
                f"{self.directory} holds {total} records for {slices} loader processes "
                f"({settings.world} ranks with {max(settings.workers, 1)} each): use fewer --loader-workers"
            )
        packing = self.encoder.settings.budget is not None
        config = WorkerConfig(
            rank=settings.rank,
            world_size=settings.world,
            num_workers=settings.workers,
            seed_offset=settings.seed,
            # Bad records never raise; what does is a mistake of ours or a broken directory.
            global_error_handler=reraise_exception,
        )
        with redirect_stdout(io.StringIO()):  # Energon prints the slices of every worker
            loader = self._energon_loader(config, packing)
        loader.pin_memory = False  # tiles are cut up for the TP ranks first
        if settings.workers:
            loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)
        return loader

    def _energon_loader(self, config: WorkerConfig, packing: bool) -> Any:
        settings = self.settings
        dataset = get_train_dataset(
            self.directory / METADATASET,
            worker_config=config,
            batch_size=None,
            packing_buffer_size=settings.pack_buffer,
            shuffle_buffer_size=settings.shuffle_buffer or None,
            max_samples_per_sequence=settings.sequence,
            task_encoder=PackEncoder(
                self.directory.absolute(),
                self.encoder,
                self.plan,
                micro_batch_size=settings.micro_batch_size,
                buffer_size=settings.pack_buffer if packing else 8 * settings.micro_batch_size,
                decode=self.decode,
                seed=settings.seed,
            ),
        )
        return get_savable_loader(
            dataset,
            # A state after every pack: a resumed worker then has nothing to skip.
            checkpoint_every_sec=0,
            checkpoint_every_min_n_samples=1,
            prefetch_factor=settings.prefetch,
            watchdog_timeout_seconds=600,
        )

    @property
    def ready(self) -> int:
        """Packs that the thread ahead of training has ready."""
        return 0 if self._ahead is None else self._ahead.ready

    def __iter__(self) -> EnergonBatches:
        return self

    def __next__(self) -> Batch:
        for _ in range(MAX_EMPTY):
            batch = self._take()
            for bad in batch.rejects:
                self.reject_log.add(bad)
            self.reject_log.saw(batch.seen - len(batch.rejects), len(batch.rejects), batch.pictured)
            self.reject_log.shortened(batch.dropped_tiles, batch.dropped_tokens)
            self.fallbacks.update(batch.fallbacks)
            if batch.plan is not None:
                self.taken += 1
                return batch
        raise TooManyRejects(self.reject_log.nothing_found(f"{MAX_EMPTY} packs"))

    def _take(self) -> Batch:
        if self._packs is None:
            self._packs = self._deliveries()
            if self._depth:
                self._ahead = Ahead(
                    self._packs,
                    lambda delivery: delivery.__restore_key__,
                    depth=self._depth,
                )
        delivery = next(self._packs if self._ahead is None else self._ahead)
        delivery.content.restore_key = delivery.__restore_key__
        return delivery.content

    def _deliveries(self) -> Iterator[Delivery]:
        """Packs that were on their way when the state was saved, made again, and then new ones."""
        new = iter(self._loader)
        if self._pending:
            # Workers start with the first new pack, and must do so before this process opens a data file: a
            # fork would share the file's position. That pack waits for its turn as a key.
            self._pending.append(next(new).__restore_key__)
        while self._pending:
            yield self._loader.restore_sample(self._pending.pop(0))
        yield from new

    def save_state(self, unused: Sequence[Any] = ()) -> LoaderState:
        """State after the micro-batches taken so far; the last ones, of restore keys ``unused``, come again."""
        settings = self.settings

        def position() -> tuple[SavableDataLoaderState | None, list[Any]]:
            return self._loader.save_state_rank(), list(self._pending)

        if self._ahead is None:
            state, pending = position()
        else:
            (state, waiting), taken = self._ahead.at_rest(position)
            pending = taken + waiting
        pending = [*unused, *pending]
        return LoaderState(self._made_with, settings.rank, settings.world, settings.workers, state, pending)

    def restore(self, state: LoaderState) -> None:
        """Go on after `state`; before the first micro-batch is taken. ValueError if it does not fit."""
        if self._packs is not None:
            raise ValueError("the loader has started: restore its state before the first micro-batch")
        check_same(state.made_with, self._made_with)
        here = (self.settings.rank, self.settings.world, self.settings.workers)
        if (state.rank, state.world, state.workers) != here:
            raise ValueError(
                f"loader state of rank {state.rank} of {state.world} with {state.workers} workers, this is "
                f"rank {here[0]} of {here[1]} with {here[2]}: use `redistribute`"
            )
        self._loader.restore_state_rank(state.energon)
        self._pending = list(state.pending)

    def close(self) -> None:
        """End the thread and the worker processes."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        self._packs = None
        self._loader._epoch_iterator = None
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None


class _AfterStart:
    """The commands for a worker, withheld until it has begun.

    A worker starts the thread that answers commands before it takes the lock that keeps that thread waiting
    for the first sample. On a busy machine a command in between is answered with a state that lacks the
    worker's position (megatron-energon 7.4.1), and a run resumed from it would skip a pack.
    """

    def __init__(self, worker: Any, commands: Any):
        self._worker, self._commands = worker, commands

    def _begun(self) -> bool:
        # Both become true while the worker holds the lock.
        worker = self._worker
        restored = worker._workers_restore_from[worker._worker_id] is None
        return restored and worker._last_checkpoints[-1].sample_index >= 0

    def get(self, timeout: float) -> Any:
        end = time.monotonic() + timeout
        while not self._begun():
            if time.monotonic() > end:
                raise queue.Empty
            time.sleep(0.002)
        return self._commands.get(timeout=timeout)


def _start_worker(first: Any, worker_id: int) -> None:
    faulthandler.enable(2)  # a crash in a codec is silent otherwise
    torch.set_num_threads(1)  # each worker has one core; more threads would fight over it
    first(worker_id)
    worker: Any = torch.utils.data.get_worker_info().dataset  # type: ignore[union-attr]
    worker._cmd_queues = [_AfterStart(worker, commands) for commands in worker._cmd_queues]
    # Energon collects garbage next. What the training process left behind (process groups, their pending
    # work) must not be destroyed in a fork of it: that crashes.
    gc.freeze()


def check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError naming the settings that differ from those of a saved state."""
    wrong = [f"{key}: {saved.get(key)} -> {now.get(key)}" for key in now if saved.get(key) != now.get(key)]
    if wrong:
        raise ValueError(
            "the loader state was saved with other data or settings, so it cannot say which samples come "
            f"next: {'; '.join(wrong)}. Use the same, or start the data anew with --restart-data"
        )


def workers_for(states: int, workers: int, world: int) -> int | None:
    """Workers per rank with which ``world`` ranks can go on from a state of ``states`` ranks; None if they
    cannot: Energon cuts the data into one slice per worker, and slices cannot be cut again."""
    if workers == 0:
        return 0 if states == world else None
    return states * workers // world if states * workers % world == 0 else None


def redistribute(states: list[LoaderState], world: int) -> list[LoaderState]:
    """The same workers' states dealt to ``world`` ranks, in order; no sample is lost or repeated.

    Raises ValueError if the workers do not divide over the ranks.
    """
    first = states[0]
    if any(state.rank != number for number, state in enumerate(states)) or first.world != len(states):
        raise ValueError(f"loader states of all {first.world} ranks are needed, in order")
    workers = workers_for(len(states), first.workers, world)
    if workers is None:
        raise ValueError(
            f"{len(states)} ranks with {first.workers} loader workers cannot be dealt to {world} ranks"
        )
    if len(states) == world:
        return states
    if any(state.energon is None for state in states):
        raise ValueError("a loader state without position cannot be dealt anew: no micro-batch was taken")
    pending = [key for state in states for key in state.pending]
    every = [slice_ for state in states for slice_ in state.energon.worker_states]  # type: ignore[union-attr]
    dealt = []
    for rank in range(world):
        mine = every[rank * workers : (rank + 1) * workers]
        energon = SavableDataLoaderState(worker_states=mine, next_worker_id=0, micro_batch_size=None)
        state = copy(first)
        state.rank, state.world, state.workers, state.energon = rank, world, workers, energon
        state.pending = pending[rank::world]
        dealt.append(state)
    return dealt
