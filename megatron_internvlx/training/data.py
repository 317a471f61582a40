"""Megatron's dataset provider: loaders on one rank per replica, the same micro-batches on its others."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_internvlx.arguments import row_alignment, settings_from
from megatron_internvlx.config import DataSettings, TrainSettings
from megatron_internvlx.data.conversation import ReleasedQuirks
from megatron_internvlx.data.loader import ConversationDataset, batches, planned
from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.data.packing import Budget
from megatron_internvlx.data.plan import PlanSettings
from megatron_internvlx.data.prepare import MARK, prepared_sets
from megatron_internvlx.data.rejects import RejectLog
from megatron_internvlx.data.sample import EncoderSettings, SampleEncoder
from megatron_internvlx.data.tokenizer import load_tokenizer
from megatron_internvlx.model.builder import compression_plan
from megatron_internvlx.parallel.batch import (
    BatchChannel,
    BatchIterator,
    DevicePlan,
    HostBatch,
    SharedBatches,
)


def plan_settings(args: argparse.Namespace) -> PlanSettings:
    """Row alignment and budgets of the layout that the arguments describe."""
    compression = compression_plan(args)
    train = settings_from(args, TrainSettings)
    tensor_parallel = args.tensor_model_parallel_size
    static = train.boundary == "static"
    return PlanSettings(
        low_grid=compression.low_grid,
        high_grid=compression.high_grid,
        lvtc=compression.lvtc,
        alignment=row_alignment(args),
        tile_multiple=tensor_parallel,
        shallow_length=train.shallow_seq_length if static else None,
        deep_length=args.seq_length if static else None,
        tile_budget=train.max_tiles_per_pack if static else None,
    )


def pack_budget(args: argparse.Namespace) -> Budget | None:
    """What a pack may hold; None without --packing."""
    if not settings_from(args, DataSettings).packing:
        return None
    train = settings_from(args, TrainSettings)
    return Budget(train.shallow_seq_length or args.seq_length, args.seq_length, train.max_tiles_per_pack)


def build_encoder(args: argparse.Namespace, budget: Budget | None = None) -> SampleEncoder:
    """Record -> tokens, labels and tile grids, as the model's token counts want them."""
    data = settings_from(args, DataSettings)
    compression = compression_plan(args)
    settings = EncoderSettings(
        template=data.conversation_template,
        tile_size=args.image_size,
        min_tiles=data.min_tiles,
        max_tiles=data.max_tiles,
        use_thumbnail=not data.no_thumbnail,
        rvtc=data.rvtc,
        tokens_per_tile=compression.high_grid**2,
        shallow_tokens_per_tile=compression.low_grid**2 if compression.lvtc else None,
        budget=budget,
        max_length=args.seq_length,
        dynamic_image_size=not data.static_image_size,
        compat=released_quirks() if data.released_quirks else ReleasedQuirks(),
    )
    return SampleEncoder(load_tokenizer(args.tokenizer_model), settings)


def released_quirks() -> ReleasedQuirks:
    """The released code's behaviours for --released-quirks.

    Masking tokens of id 0 is left out: it hides "!" from Qwen2 models only, of which none was released
    with InternVL-X, and packed attention has no mask inside a sample.
    """
    return replace(ReleasedQuirks.all(), mask_id_zero=False)


class DataProvider:
    """Builds the training and validation iterators; Megatron calls it once per virtual stage."""

    # Every rank takes part: the loading ranks send, the others receive.
    is_distributed = True

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.data = settings_from(args, DataSettings)
        self.rejects: RejectLog | None = None
        self.cut = lambda: (0, 0)
        """Tiles and tokens given up so far, on this rank, by samples over a packing budget."""
        self.valid_manifest: Manifest | None = None
        self._train_manifest: Manifest | None = None
        self.open_files()
        self._groups: tuple[list[list[int]], Any, Any] | None = None
        self._shared: dict[str, SharedBatches] = {}
        self._iterators: dict[tuple[str, int], BatchIterator] = {}

    def open_files(self) -> None:
        """Find a mistake before anything is built: rank 0 loads in every layout. Raises ValueError."""
        energon = self.data.loader == "energon"
        if energon:
            # Energon takes seconds to import; the simple loader does without.
            from megatron_internvlx.training.loaders import save_with_checkpoints

            save_with_checkpoints(self.args)
        if os.environ.get("RANK", "0") == "0" and energon:
            prepared_sets(self.data.data or "")
        elif os.environ.get("RANK", "0") == "0":
            if (Path(self.data.data or "") / MARK).is_file():
                raise ValueError(f"--data {self.data.data} is a prepared directory: add --loader energon")
            self._train_manifest = Manifest(self.data.data or "")
        if self.data.valid_data:
            self.valid_manifest = Manifest(self.data.valid_data)

    @property
    def is_loading_rank(self) -> bool:
        """Whether this rank reads files; the others of its replica receive."""
        return any(shared.channel.is_source for shared in self._shared.values())

    def __call__(self, _num_samples, vp_stage: int | None = None):
        """(training, validation, test) iterators of one model chunk."""
        train = None if self.args.skip_train else self._iterator("train", vp_stage)
        valid = self._iterator("valid", vp_stage) if self.valid_manifest is not None else None
        return train, valid, None

    def upcoming(self, chunk: int, training: bool, least: int) -> tuple[int, DevicePlan]:
        """Number and plan of a chunk's next micro-batch; see `BatchIterator.upcoming`."""
        return self._iterators["train" if training else "valid", chunk].upcoming(least)

    def _iterator(self, split: str, vp_stage: int | None) -> BatchIterator:
        if split not in self._shared:
            channel = self._channel()
            loader = self._loader(split) if channel.is_source else None
            readers = self.args.virtual_pipeline_model_parallel_size or 1
            self._shared[split] = SharedBatches(channel, loader, readers)
        iterator = BatchIterator(self._shared[split])
        self._iterators[split, vp_stage or 0] = iterator
        return iterator

    def _channel(self) -> BatchChannel:
        if self._groups is None:
            ranks = sorted(dist.get_process_group_ranks(mpu.get_model_parallel_group()))
            width = self.args.tensor_model_parallel_size
            # Megatron numbers ranks with TP innermost and PP outermost.
            stages = [ranks[i : i + width] for i in range(0, len(ranks), width)]
            stage = next(stage for stage in stages if dist.get_rank() in stage)
            self._groups = (stages, host_group(ranks), host_group(stage))
        stages, group, stage_group = self._groups
        return BatchChannel(stages, group, stage_group, self.args.image_size)

    def _loader(self, split: str) -> Iterator[HostBatch]:
        args = self.args
        if self.rejects is None:
            path = self.data.rejects_file
            if path is None and args.save:
                path = str(Path(args.save) / f"rejects-dp{mpu.get_data_parallel_rank()}.jsonl")
            self.rejects = RejectLog(path, self.data.max_rejects, self.data.max_reject_rate)
        train = split == "train"
        if train and self.data.loader == "energon":
            from megatron_internvlx.training.loaders import energon_loader

            encoder = build_encoder(args, pack_budget(args))
            loader = energon_loader(args, encoder, plan_settings(args), self.rejects)
            self.cut = loader.cut
            return loader
        manifest = self._train_manifest or Manifest(self.data.data or "") if train else self.valid_manifest
        assert manifest is not None
        dataset = ConversationDataset(manifest, build_encoder(args), seed=args.seed, shuffle=train)
        size = args.micro_batch_size if train else args.eval_micro_batch_size
        split_args = {
            "micro_batch_size": size,
            "dp_rank": mpu.get_data_parallel_rank(),
            "dp_size": mpu.get_data_parallel_world_size(),
            "num_workers": self.data.loader_workers,
            "reject_log": self.rejects,
            "finish": partial(planned, settings=plan_settings(args)),
        }
        if train:
            planned_batches = batches(dataset, start=args.consumed_train_samples, **split_args)
            return itertools.starmap(HostBatch, planned_batches)
        per_rank = args.eval_global_batch_size // (size * split_args["dp_size"]) * args.eval_iters
        return self._evaluations(dataset, split_args, per_rank)

    @staticmethod
    def _evaluations(dataset, split_args, micro_batches: int) -> Iterator[HostBatch]:
        """Every evaluation sees the same held-out samples, from the first on."""
        while True:
            yield from itertools.starmap(
                HostBatch, batches(dataset, start=0, limit=micro_batches, **split_args)
            )


def host_group(ranks: list[int]) -> dist.ProcessGroup | None:
    """A gloo group of these ranks, this one among them; every rank of the world calls it.

    Ranks may name different groups: each is made by all, in one order. None for a group of one.
    """
    named: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(named, ranks)
    mine = None
    for members in sorted({tuple(group) for group in named if len(group) > 1}):
        group = dist.new_group(list(members), backend="gloo")
        mine = group if list(members) == ranks else mine
    return mine
