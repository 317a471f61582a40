"""Micro-batches of one loading rank from a prepared directory, and the state for exact resume."""

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

from megatron_internvlx.data.energon_tasks import Batch, Decode, Delivery, PackEncoder
from megatron_internvlx.data.plan import PlanSettings
from megatron_internvlx.data.prefetch import WORKER_AHEAD, Prefetcher
from megatron_internvlx.data.prepared import METADATASET, prepared_sets
from megatron_internvlx.data.rejects import RejectLog, TooManyRejects, UnusableData
from megatron_internvlx.data.rvtc import stored_policy
from megatron_internvlx.data.sample import SampleEncoder

STATE_VERSION = 2
"""In version 1 the released RVTC rule was called `area`; see `stored_policy`."""
# Maximum number of consecutive packs without a good sample.
MAX_EMPTY = 64


@dataclass(frozen=True)
class LoaderSettings:
    """Settings of the loader of one loading rank."""

    rank: int = 0
    world: int = 1
    """Number of loading ranks."""
    workers: int = 0
    """Worker processes per rank; 0: read in the training process."""
    seed: int = 0
    packing: bool = True
    """Pack samples if the encoder has a budget. Off: with static boundaries the budget is that of one sample."""
    micro_batch_size: int = 1
    """Samples of a micro-batch without packing."""
    pack_buffer: int = 1000
    """Samples from which packs are chosen."""
    shuffle_buffer: int = 256
    """Samples from which the next is drawn; 0: keep the order."""
    sequence: int = 32
    """Records that are read in order before a jump."""
    prefetch: int = WORKER_AHEAD
    """Micro-batches that each worker prepares ahead."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world or self.workers < 0 or self.seed < 0:
            raise ValueError(
                f"rank {self.rank} must be in 0..{self.world - 1}; workers {self.workers} and seed "
                f"{self.seed} must not be negative"
            )
        for name in ("micro_batch_size", "pack_buffer", "sequence", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")


@dataclass
class LoaderState:
    """Saved position of a loading rank: Energon's state, the packs in flight, and the settings it depends on."""

    made_with: dict[str, Any]
    rank: int
    world: int
    workers: int
    energon: SavableDataLoaderState | None
    pending: list[Any] = field(default_factory=list)
    version: int = STATE_VERSION


class EnergonBatches:
    """Endless iterator of planned micro-batches, whose position `save_state` saves and `restore` restores.

    Args:
        directory: prepared directory, from tools/prepare_data.py.
        encoder: converts records to samples; samples are packed if it has a budget and `settings.packing` is on.
        plan: grids, alignment and static budgets.
        settings: share of this rank, and buffers.
        reject_log: counts and lists bad samples; its TooManyRejects ends the iteration.
        decode: converts bytes of an image to tiles, or to the file for a GPU.
        ahead: packs that a thread takes from the workers in advance; 0: no thread.
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
            raise ValueError("ahead needs worker processes: set workers to at least 1")
        self.directory, self.encoder, self.plan = Path(directory), encoder, plan
        self.settings, self.reject_log, self.decode = settings, reject_log, decode
        self.taken = 0
        self._depth = ahead
        self.fallbacks: Counter[str] = Counter()
        """Images so far that Pillow cut instead of DALI, per reason."""
        self._pending: list[Any] = []
        self._prefetcher: Prefetcher | None = None
        self._made_with = self._identity()
        self._loader = self._build()
        self._packs: Iterator[Delivery] | None = None

    def _identity(self) -> dict[str, Any]:
        """Settings on which the samples and their order depend."""
        encoder = {key: value for key, value in asdict(self.encoder.settings).items() if key != "compat"}
        names = ("seed", "micro_batch_size", "pack_buffer", "shuffle_buffer", "sequence")
        own = {name: getattr(self.settings, name) for name in names}
        sets = prepared_sets(self.directory)
        data = {entry.name: [part.records for part in entry.parts] for entry in sets}
        return {**encoder, **own, "records": data}

    def _build(self) -> Any:
        settings = self.settings
        total = sum(sum(counts) for counts in self._made_with["records"].values())
        slices = settings.world * max(settings.workers, 1)
        if total < slices:
            raise ValueError(
                f"{self.directory} has {total} records, too few for {slices} loader processes "
                f"({settings.world} ranks with {max(settings.workers, 1)} each): use fewer --loader-workers"
            )
        packing = settings.packing and self.encoder.settings.budget is not None
        config = WorkerConfig(
            rank=settings.rank,
            world_size=settings.world,
            num_workers=settings.workers,
            seed_offset=settings.seed,
            # Bad records do not raise; any error is one of the code or of a broken directory.
            global_error_handler=reraise_exception,
        )
        with redirect_stdout(io.StringIO()):  # Energon prints the slices of every worker
            loader = self._energon_loader(config, packing)
        loader.pin_memory = False  # tiles are divided among TP ranks first
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
                micro_batch_size=None if packing else settings.micro_batch_size,
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
        """Number of packs that the thread has ready."""
        return 0 if self._prefetcher is None else self._prefetcher.ready

    def __iter__(self) -> EnergonBatches:
        return self

    def __next__(self) -> Batch:
        for _ in range(MAX_EMPTY):
            batch = self._take()
            for bad in batch.rejects:
                self.reject_log.add(bad)
            self.reject_log.count_samples(batch.seen - len(batch.rejects), len(batch.rejects), batch.pictured)
            self.reject_log.count_removed(batch.dropped_tiles, batch.dropped_tokens)
            self.fallbacks.update(batch.fallbacks)
            if batch.plan is not None:
                self.taken += 1
                return batch
        raise TooManyRejects(self.reject_log.nothing_found(f"{MAX_EMPTY} packs"))

    def _take(self) -> Batch:
        if self._packs is None:
            self._packs = self._deliveries()
            if self._depth:
                self._prefetcher = Prefetcher(
                    self._packs,
                    lambda delivery: delivery.__restore_key__,
                    depth=self._depth,
                )
        delivery = next(self._packs if self._prefetcher is None else self._prefetcher)
        delivery.content.restore_key = delivery.__restore_key__
        return delivery.content

    def _deliveries(self) -> Iterator[Delivery]:
        """Packs that were in flight when the state was saved, made again, and then new ones."""
        new = iter(self._loader)
        if self._pending:
            # Workers start with the first new pack. They must start before this process opens a data file, because a
            # fork would share the file's position. So that pack is taken first, and kept as a key until its turn.
            self._pending.append(next(new).__restore_key__)
        while self._pending:
            yield self._loader.restore_sample(self._pending.pop(0))
        yield from new

    def save_state(self, unused: Sequence[Any] = ()) -> LoaderState:
        """State after the micro-batches taken so far, except the last ones, with restore keys `unused`."""
        settings = self.settings

        def position() -> tuple[SavableDataLoaderState | None, list[Any]]:
            return self._loader.save_state_rank(), list(self._pending)

        if self._prefetcher is None:
            state, pending = position()
        else:
            (state, waiting), taken = self._prefetcher.while_paused(position)
            pending = taken + waiting
        pending = [*unused, *pending]
        return LoaderState(self._made_with, settings.rank, settings.world, settings.workers, state, pending)

    def restore(self, state: LoaderState) -> None:
        """Continue after `state`, before the first micro-batch is taken. Raises ValueError if it does not fit.

        Of other data or settings the error is an UnusableData: it is the caller's mistake.
        """
        if self._packs is not None:
            raise ValueError("the loader has started: restore its state before the first micro-batch")
        check_same(_present_names(state), self._made_with)
        here = (self.settings.rank, self.settings.world, self.settings.workers)
        if (state.rank, state.world, state.workers) != here:
            raise ValueError(
                f"loader state of rank {state.rank} of {state.world} with {state.workers} workers, this is "
                f"rank {here[0]} of {here[1]} with {here[2]}: use `redistribute`"
            )
        self._loader.restore_state_rank(state.energon)
        self._pending = list(state.pending)

    def close(self) -> None:
        """Stop the thread and the worker processes."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        self._packs = None
        self._loader._epoch_iterator = None
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None


class _DelayedCommands:
    """Queue of commands for a worker that gives none before the worker reads its first sample.

    A worker starts the thread that answers commands before it takes the lock that makes this thread wait for the
    first sample. On a busy machine a command in between is answered with a state without the worker's position
    (megatron-energon 7.4.1), and a run resumed from it would skip a pack.
    """

    def __init__(self, worker: Any, commands: Any):
        self._worker, self._commands = worker, commands

    def _begun(self) -> bool:
        # Both become true while the worker has the lock.
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
    faulthandler.enable(2)  # otherwise a crash in a codec is silent
    torch.set_num_threads(1)  # each worker has one core; more threads would fight over it
    first(worker_id)
    worker: Any = torch.utils.data.get_worker_info().dataset  # type: ignore[union-attr]
    worker._cmd_queues = [_DelayedCommands(worker, commands) for commands in worker._cmd_queues]
    # Energon collects garbage next. Objects of the training process (process groups and their pending work) must not
    # be destroyed in a fork: that crashes.
    gc.freeze()


def _present_names(state: LoaderState) -> dict[str, Any]:
    """Settings of a saved state, its RVTC rule by its present name, without a budget that it did not have yet."""
    saved = dict(state.made_with)
    if (rule := saved.get("rvtc")) is not None:
        saved["rvtc"] = stored_policy(rule, state.version)
    if saved.get("budget") is not None:
        saved["budget"] = {**saved["budget"], "supervised": saved["budget"].get("supervised")}
    return saved


def check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare the settings of a saved state with the present ones. Raises UnusableData naming the differences."""
    wrong = []
    for key in now:
        old, new = saved.get(key), now[key]
        if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
            wrong += [f"{key} {name}: {old[name]} -> {new[name]}" for name in new if old[name] != new[name]]
        elif old != new:
            wrong.append(f"{key}: {old} -> {new}")
    if wrong:
        raise UnusableData(
            "the loader state was saved with other data or settings, so the next samples are unknown: "
            f"{'; '.join(wrong)}. Use the same, or start the data again with --restart-data"
        )


def workers_for(states: int, workers: int, world: int) -> int | None:
    """Workers per rank with which `world` ranks can continue from a state of `states` ranks; None if impossible.

    Energon divides the data into one slice per worker, and slices cannot be divided again.
    """
    if workers == 0:
        return 0 if states == world else None
    return states * workers // world if states * workers % world == 0 else None


def redistribute(states: list[LoaderState], world: int) -> list[LoaderState]:
    """States of the same workers distributed over `world` ranks, in order; no sample is lost or repeated.

    Raises ValueError if the number of workers is not divisible by the ranks.
    """
    first = states[0]
    if any(state.rank != number for number, state in enumerate(states)) or first.world != len(states):
        raise ValueError(f"loader states of all {first.world} ranks are needed, in order")
    workers = workers_for(len(states), first.workers, world)
    if workers is None:
        raise ValueError(
            f"{len(states)} ranks with {first.workers} loader workers cannot be distributed over {world} ranks"
        )
    if len(states) == world:
        return states
    if any(state.energon is None for state in states):
        raise ValueError("a loader state without position cannot be distributed: no micro-batch was taken")
    pending = [key for state in states for key in state.pending]
    every = [slice_ for state in states for slice_ in state.energon.worker_states]  # type: ignore[union-attr]
    distributed = []
    for rank in range(world):
        mine = every[rank * workers : (rank + 1) * workers]
        energon = SavableDataLoaderState(worker_states=mine, next_worker_id=0, micro_batch_size=None)
        state = copy(first)
        state.rank, state.world, state.workers, state.energon = rank, world, workers, energon
        state.pending = pending[rank::world]
        distributed.append(state)
    return distributed
