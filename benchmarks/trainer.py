"""A training run that is stepped by hand, through Megatron's own train_step, on synthetic samples."""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_internvlx import platform

platform.setup()

import megatron.training.training as training  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.rerun_state_machine import RerunDataIterator  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402

from megatron_internvlx import arguments  # noqa: E402
from megatron_internvlx.config import settings_from  # noqa: E402
from megatron_internvlx.data.plan import IGNORE, build_plan  # noqa: E402
from megatron_internvlx.megatron_settings import Execution  # noqa: E402
from megatron_internvlx.parallel.batch import HostBatch  # noqa: E402
from megatron_internvlx.parallel.groups import MegatronGroups  # noqa: E402
from megatron_internvlx.planning.metrics import StepMeter  # noqa: E402
from megatron_internvlx.precision import Precision  # noqa: E402
from megatron_internvlx.training.builder import ModelProvider  # noqa: E402
from megatron_internvlx.training.graph import StepGraph  # noqa: E402
from megatron_internvlx.training.pipeline import boundary_communicator  # noqa: E402
from megatron_internvlx.training.provider import DataProvider, plan_settings  # noqa: E402
from megatron_internvlx.training.replay import FirstReplay  # noqa: E402
from megatron_internvlx.training.step import ForwardStep  # noqa: E402

Sample = tuple[int, int]
"""Tiles and text tokens; the last half of the text is supervised."""


def tokens_of(samples: list[Sample], per_tile: int, vocabulary: int) -> tuple[list[np.ndarray], ...]:
    """Ids, labels and visual masks of samples: tiles first, then text."""
    rng = np.random.default_rng(len(samples))
    ids, labels, visual = [], [], []
    for tiles, text in samples:
        words = rng.integers(3, vocabulary, text)
        mask = np.arange(tiles * per_tile + text) < tiles * per_tile
        tokens = np.concatenate([np.zeros(tiles * per_tile, int), words])
        ids.append(tokens)
        visual.append(mask)
        labels.append(np.where(np.arange(len(tokens)) >= len(tokens) - text // 2, tokens, IGNORE))
    return ids, labels, visual


class SampleData(DataProvider):
    """The real provider with the micro-batches of a list of samples, again and again."""

    micro_batches: list[list[Sample]]

    def open_files(self) -> None:
        """There are none."""

    def _pipeline(self) -> None:
        """None: the tiles are made here."""

    def _loader(self, split: str) -> Iterator[HostBatch]:
        settings, size = plan_settings(self.args), self.args.image_size
        if settings.sample_budget is not None:  # several samples are a pack here, whoever packs
            most = max(settings.sample_budget, *map(len, self.micro_batches))
            settings = replace(settings, sample_budget=most)
        # Made here, before any clock starts: random pixels take longer than a step.
        batches = []
        for samples in self.micro_batches:
            tiles = sum(count for count, _ in samples)
            pixels = torch.randint(0, 256, (tiles, 3, size, size), dtype=torch.uint8)
            plan = build_plan(*tokens_of(samples, settings.high_grid**2, self.args.vocab_size), settings)
            batches.append(HostBatch(plan, pixels))
        return itertools.cycle(batches)


class Trainer:
    """One run in this process or rank.

    Args:
        argv: command-line arguments of pretrain_vlm.py.
        micro_batches: samples of each micro-batch of a step.
    """

    def __init__(self, argv: list[str], micro_batches: list[list[Sample]]) -> None:
        saved, sys.argv = sys.argv, ["benchmark", *argv]
        try:
            self.args = args = arguments.parse()
        finally:
            sys.argv = saved
        if "MASTER_ADDR" not in os.environ and not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(platform.backend(), store=store, rank=0, world_size=1)
        initialize_megatron()
        data = SampleData(args)
        data.micro_batches = micro_batches
        self.forward_step = ForwardStep()
        self.communicator, self.groups = boundary_communicator(data), MegatronGroups()
        self.model, self.optimizer, self.scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            model_provider_func=ModelProvider(args, self.communicator, self.forward_step.weights),
            cfg_container=pretrain_cfg_container_from_args(args),
            pg_collection=self.groups,
        )
        chunks = args.virtual_pipeline_model_parallel_size
        iterators = [RerunDataIterator(data(None, vp_stage=i)[0]) for i in range(chunks or 1)]
        self.iterator: Any = iterators if chunks else iterators[0]
        self.forward_step.meter = StepMeter.from_args(args)
        self.config = get_model_config(self.model[0])
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.passes = get_forward_backward_func()
        if args.cuda_graph_impl != "none":
            self.passes = StepGraph(self.passes, cuda_graph_warmup_steps=args.cuda_graph_warmup_steps)
            how = settings_from(args, Execution), settings_from(args, Precision)
            # Reported, whatever it is: a benchmark that ends here would not say what the graph gives later.
            self.passes.first_replay = replace(FirstReplay.of(*how), limit=math.inf)
        self.steps = 0
        for chunk in self.model:
            chunk.train()

    @property
    def replay_difference(self) -> float | None:
        """Largest relative difference of a graph's first replay; None before it, and without a graph."""
        return getattr(self.passes, "difference", None)

    def step(self) -> dict[str, float]:
        """One training step: seconds, loss, and model FLOPs of this rank's replica, all and useful ones."""
        platform.synchronize()
        start = time.perf_counter()
        losses, *_ = training.train_step(
            self.forward_step, self.iterator, self.model, self.optimizer, self.scheduler, self.config,
            self.passes, self.steps, pg_collection=self.groups, p2p_communicator=self.communicator,
        )  # fmt: skip
        platform.synchronize()
        seconds = time.perf_counter() - start
        self.steps += 1
        assert self.forward_step.meter is not None
        interval = self.forward_step.meter.take()
        return {
            "seconds": seconds,
            "loss": float(losses.get("loss", float("nan"))),
            "flops": float(interval.padded_flops.model),
            "useful_flops": float(interval.model_flops),
            "peak_gib": platform.peak_memory() / 2**30,
        }
