"""Megatron's dataset provider: one rank of each replica loads, and the others receive its micro-batches."""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_internvlx.config import DataSettings, TrainSettings, VisionSettings, settings_from
from megatron_internvlx.data.dali_pipeline import TilePipeline
from megatron_internvlx.data.decode import TileDecoder, ranks_cut
from megatron_internvlx.data.encoded import fallback_counts
from megatron_internvlx.data.file_kinds import Kind
from megatron_internvlx.data.loss_weights import loss_weights
from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.data.order import ConversationDataset, batches, held_out_batches, plan_micro_batch
from megatron_internvlx.data.packing import Budget
from megatron_internvlx.data.plan import PlanSettings
from megatron_internvlx.data.prepared import is_prepared, prepared_sets
from megatron_internvlx.data.quirks import ReleasedQuirks
from megatron_internvlx.data.rejects import BadSample, RejectLog
from megatron_internvlx.data.sample import EncoderSettings, SampleEncoder
from megatron_internvlx.data.tokenizer import load_tokenizer
from megatron_internvlx.megatron_settings import Batches, CheckpointFiles, Parallelism, Progress
from megatron_internvlx.model.sizes import model_sizes
from megatron_internvlx.parallel.batch import (
    BatchChannel,
    BatchIterator,
    HostBatch,
    SharedBatches,
)
from megatron_internvlx.parallel.device_plan import DevicePlan
from megatron_internvlx.precision import row_alignment
from megatron_internvlx.ranks import is_first_rank
from megatron_internvlx.training.decoding import Decoding, missing_decoders, tile_pipeline
from megatron_internvlx.training.validation import ValidationCounts, check_equal_on_all_ranks

# Number of held-out records that are tried before training starts.
FIRST_RECORDS = 64


def plan_settings(args: argparse.Namespace) -> PlanSettings:
    """Row alignment and budgets of the layout that validated arguments describe."""
    sizes = model_sizes(args)
    train, batches = settings_from(args, TrainSettings), settings_from(args, Batches)
    static = train.boundary == "static"
    samples = samples_per_micro_batch(train, settings_from(args, DataSettings), batches)
    return PlanSettings(
        low_grid=sizes.low_grid,
        high_grid=sizes.high_grid,
        lvtc=sizes.lvtc,
        alignment=row_alignment(args),
        tile_multiple=settings_from(args, Parallelism).tensor_model_parallel_size,
        shallow_length=train.shallow_seq_length if static else None,
        deep_length=batches.seq_length if static else None,
        tile_budget=train.max_tiles_per_pack if static else None,
        sample_budget=samples if static else None,
        supervised_budget=train.max_supervised_tokens_per_pack if static else None,
    )


def samples_per_micro_batch(train: TrainSettings, data: DataSettings, batches: Batches) -> int:
    """Maximum number of samples of a micro-batch, in training and evaluation, with static boundaries."""
    packed = train.max_samples_per_pack if data.packing else 1
    return max(packed, batches.micro_batch_size, batches.eval_micro_batch_size or 1)


def sample_budget(
    train: TrainSettings, data: DataSettings, *, seq_length: int, micro_batch_size: int
) -> Budget | None:
    """Maximum size of one sample; None if only --seq-length limits it.

    With packing a sample must fit into a pack. With static boundaries each sample of a micro-batch has an equal share
    of the sizes to which every micro-batch is padded.
    """
    static = train.boundary == "static"
    if not (static or data.packing):
        return None
    whole = Budget(
        train.shallow_seq_length or seq_length,
        seq_length,
        train.max_tiles_per_pack,
        train.max_samples_per_pack if static and data.packing else None,
        train.max_supervised_tokens_per_pack if static else None,
    )
    return whole.share(micro_batch_size) if static else whole


def released_quirks() -> ReleasedQuirks:
    """Behaviours of the released code for --released-quirks.

    Masking tokens of id 0 is left out: it hides "!" from Qwen2 models only, of which none was released
    with InternVL-X, and packed attention has no mask inside a sample.
    """
    return replace(ReleasedQuirks.all(), mask_id_zero=False)


class DataProvider:
    """Builder of the training and validation iterators; Megatron calls it once per virtual stage.

    Args:
        args: validated arguments, with the sizes that `settle_validation` sets.
        held_out: held-out data; None without validation.
    """

    # Every rank takes part: the loading ranks send, the others receive.
    is_distributed = True

    def __init__(self, args: argparse.Namespace, held_out: Manifest | None = None) -> None:
        self.args = args
        """Megatron's namespace, in which it sets the position of the run when it loads a checkpoint."""
        self.data, self.train = settings_from(args, DataSettings), settings_from(args, TrainSettings)
        self.batches, self.parallel = settings_from(args, Batches), settings_from(args, Parallelism)
        self.tile_size = settings_from(args, VisionSettings).image_size
        self._save = settings_from(args, CheckpointFiles).save
        self._cut_before = 0
        self.pipeline: TilePipeline | None = None
        """Pipeline that cuts this rank's images; None if tiles arrive as pixels, or not at all."""
        self._lacking: frozenset[Kind] = frozenset()
        self._held_out_fallbacks: Counter[str] = Counter()
        self.rejects: RejectLog | None = None
        """Unusable and shortened training samples so far; None if this rank does not load."""
        self.valid_manifest = held_out
        """Held-out data, if the run has any; see `validation.settle_validation`."""
        self._train_manifest: Manifest | None = None
        self._evaluation: RejectLog | None = None
        self.open_files()
        self._groups: tuple[list[list[int]], Any, Any] | None = None
        self._shared: dict[str, SharedBatches] = {}
        self._iterators: dict[tuple[str, int], BatchIterator] = {}
        self.on_build: Callable[[], None] = lambda: None
        """Called before the loaders are built."""

    def open_files(self) -> None:
        """Open the data on rank 0, which loads in every layout, before the model is built. Raises ValueError."""
        energon = self.data.loader == "energon"
        if energon:
            # Energon takes seconds to import; the simple loader does without.
            from megatron_internvlx.training.loader_state import save_with_checkpoints

            save_with_checkpoints(self.args)
        if is_first_rank() and energon:
            prepared_sets(self.data.data or "")
        elif is_first_rank():
            if is_prepared(self.data.data or ""):
                raise ValueError(f"--data {self.data.data} is a prepared directory: add --loader energon")
            self._train_manifest = Manifest(self.data.data or "")
        if self.valid_manifest is not None and is_first_rank():
            self._check_held_out()

    def _check_held_out(self) -> None:
        """Check that one of the first held-out records is usable, before hours of training. Raises ValueError."""
        assert self.valid_manifest is not None
        dataset, log = self._held_out_dataset(), RejectLog(None, None)
        tries = min(FIRST_RECORDS, len(dataset))
        for position in range(tries):
            item = dataset[position]
            if not isinstance(item, BadSample):
                return
            log.add(item)
            log.count_samples(0, 1)
        raise ValueError(f"--valid-data {self.data.valid_data}: {log.nothing_found(f'the first {tries}')}")

    def _held_out_dataset(self) -> ConversationDataset:
        assert self.valid_manifest is not None
        return ConversationDataset(
            self.valid_manifest,
            self.validation_encoder,
            seed=self.batches.seed,
            shuffle=False,
            records=self.data.valid_records,
            decode=self._decoder(self.validation_encoder) if ranks_cut(self.data) else None,
        )

    def _decoder(self, encoder: SampleEncoder) -> TileDecoder:
        """Create the decoder of the loader processes, which leaves to the ranks what these can cut."""
        return TileDecoder(
            self.data.image_decoder,
            tile_size=self.tile_size,
            apply_exif=encoder.apply_exif,
            travel=ranks_cut(self.data),
            lacking=self._lacking,
        )

    @cached_property
    def validation_encoder(self) -> SampleEncoder:
        """Encoder of held-out records, with the limits of training samples."""
        return self._encoder(self.batches.eval_micro_batch_size)

    def _encoder(self, micro_batch_size: int) -> SampleEncoder:
        """Create the converter of records to tokens, labels and tile grids of this model."""
        data, sizes, length = self.data, model_sizes(self.args), self.batches.seq_length
        budget = sample_budget(self.train, data, seq_length=length, micro_batch_size=micro_batch_size)
        settings = EncoderSettings(
            template=data.conversation_template,
            tile_size=self.tile_size,
            min_tiles=data.min_tiles,
            max_tiles=data.max_tiles,
            use_thumbnail=not data.no_thumbnail,
            rvtc=data.rvtc,
            tokens_per_tile=sizes.high_grid**2,
            shallow_tokens_per_tile=sizes.low_grid**2 if sizes.lvtc else None,
            budget=budget,
            max_length=length,
            dynamic_image_size=not data.static_image_size,
            compat=released_quirks() if data.released_quirks else ReleasedQuirks(),
        )
        return SampleEncoder(load_tokenizer(self.args.tokenizer_model), settings)

    def evaluated(self) -> ValidationCounts:
        """Counts of the latest evaluation on this rank; zeros if it does not load."""
        log = self._evaluation
        if log is None:
            return ValidationCounts()
        return ValidationCounts(log.good, dict(log.counts), log.cut_tiles, log.cut_tokens)

    def take_decoding(self) -> Decoding:
        """Numbers of this rank's training images; `cut` counts from the last call on."""
        train = self._shared.get("train")
        batches = getattr(train.loader, "batches", None) if train else None
        pipeline, cut = self.pipeline, 0
        if train and train.channel.files is not None:
            images = train.channel.files.images
            cut, self._cut_before = images - self._cut_before, images
        reasons = Counter(batches.fallbacks if batches else {}) + self._held_out_fallbacks
        reasons.update(pipeline.fallbacks if pipeline else {})
        fallbacks = fallback_counts(reasons)
        blank = sum(pipeline.blank.values()) if pipeline else 0
        return Decoding(cut, blank, fallbacks, batches.ready if batches and pipeline else None)

    @property
    def is_loading_rank(self) -> bool:
        """Whether this rank reads files; the other ranks of its replica receive from it."""
        return any(shared.channel.is_source for shared in self._shared.values())

    def __call__(self, _num_samples, vp_stage: int | None = None):
        """(training, validation, test) iterators of one model chunk. Raises UnusableData."""
        self.on_build()
        if self.valid_manifest is not None and not self._shared:  # the first chunk's call
            check_equal_on_all_ranks(self.data.valid_data, len(self.valid_manifest), self.batches)
        train = None if self.batches.skip_train else self._iterator("train", vp_stage)
        valid = self._iterator("valid", vp_stage) if self.valid_manifest is not None else None
        return train, valid, None

    def upcoming(self, chunk: int, training: bool, least: int) -> tuple[int, DevicePlan]:
        """Number and plan of a chunk's next micro-batch; see `BatchIterator.upcoming`."""
        return self._iterators["train" if training else "valid", chunk].upcoming(least)

    def _iterator(self, split: str, vp_stage: int | None) -> BatchIterator:
        if split not in self._shared:
            channel = self._channel(split)
            loader = self._loader(split) if channel.is_source else None
            readers = self.parallel.virtual_pipeline_model_parallel_size or 1
            self._shared[split] = SharedBatches(channel, loader, readers)
        iterator = BatchIterator(self._shared[split])
        self._iterators[split, vp_stage or 0] = iterator
        return iterator

    def _channel(self, split: str) -> BatchChannel:
        if self._groups is None:
            ranks = sorted(dist.get_process_group_ranks(mpu.get_model_parallel_group()))
            width = self.parallel.tensor_model_parallel_size
            # Megatron numbers ranks with TP innermost and PP outermost.
            stages = [ranks[i : i + width] for i in range(0, len(ranks), width)]
            stage = next(stage for stage in stages if dist.get_rank() in stage)
            self._groups = (stages, host_group(ranks), host_group(stage))
            if ranks_cut(self.data) and stage == stages[0]:
                self.pipeline = tile_pipeline(self.tile_size)
                self._lacking = missing_decoders(self.pipeline, self._groups[2])
        stages, group, stage_group = self._groups
        weigh = partial(loss_weights, weighting=self.train.loss_weighting, average=self.train.loss_average)
        # Training plans are sent ahead: an evaluation between them must not receive one of those.
        tag = 0 if split == "train" else 1
        once = None if split == "train" else self.batches.eval_iters * self.evaluation_micro_batches
        return BatchChannel(stages, group, stage_group, self.tile_size, weigh, self.pipeline, tag, once)

    def _loader(self, split: str) -> Iterator[HostBatch]:
        return self._training_loader() if split == "train" else self._evaluations()

    def _rejects_file(self) -> str | None:
        if self.data.rejects_file is None and self._save:
            return str(Path(self._save) / f"rejects-dp{mpu.get_data_parallel_rank()}.jsonl")
        return self.data.rejects_file

    def _share(self) -> dict[str, Any]:
        """This rank's part of the simple loader's work."""
        return {
            "dp_rank": mpu.get_data_parallel_rank(),
            "dp_size": mpu.get_data_parallel_world_size(),
            "num_workers": self.data.loader_workers,
            "finish": partial(plan_micro_batch, settings=plan_settings(self.args)),
        }

    def _training_loader(self) -> Iterator[HostBatch]:
        self.rejects = RejectLog(self._rejects_file(), self.data.max_rejects, self.data.max_reject_rate)
        encoder = self._encoder(self.batches.micro_batch_size)
        if self.data.loader == "energon":
            from megatron_internvlx.training.loader_state import energon_loader

            decoder = self._decoder(encoder)
            return energon_loader(self.args, encoder, plan_settings(self.args), self.rejects, decoder)
        manifest = self._train_manifest or Manifest(self.data.data or "")
        planned_batches = batches(
            ConversationDataset(manifest, encoder, seed=self.batches.seed),
            start=Progress(self.args).consumed_train_samples,
            micro_batch_size=self.batches.micro_batch_size,
            reject_log=self.rejects,
            **self._share(),
        )
        return itertools.starmap(HostBatch, planned_batches)

    @property
    def evaluation_micro_batches(self) -> int:
        """Micro-batches of an evaluation's global batch on each data-parallel rank."""
        sizes = self.batches
        return sizes.eval_global_batch_size // (
            sizes.eval_micro_batch_size * self.parallel.data_parallel_size
        )

    def _evaluations(self) -> Iterator[HostBatch]:
        """Micro-batches of evaluation after evaluation, each with every held-out record once."""
        while True:
            # Its own: a broken held-out record is counted and named, and does not end training.
            self._evaluation = RejectLog(self._rejects_file(), None)
            yield from itertools.starmap(
                HostBatch,
                held_out_batches(
                    self._held_out_dataset(),
                    micro_batches=self.batches.eval_iters * self.evaluation_micro_batches,
                    micro_batch_size=self.batches.eval_micro_batch_size,
                    reject_log=self._evaluation,
                    fallbacks=self._held_out_fallbacks,
                    **self._share(),
                ),
            )


def host_group(ranks: list[int]) -> dist.ProcessGroup | None:
    """Create a gloo group of these ranks, this one among them; None for a group of one.

    Every rank of the world must call it. Ranks may ask for different groups: all ranks create all of them, in the
    same order.
    """
    named: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(named, ranks)
    mine = None
    for members in sorted({tuple(group) for group in named if len(group) > 1}):
        group = dist.new_group(list(members), backend="gloo")
        mine = group if list(members) == ranks else mine
    return mine
