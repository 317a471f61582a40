"""Time the real layers of a model on this machine: the planner's measured profile.

A model with one layer of each kind runs through our own modules, part by part, each part's
backward pass right after its forward pass. Under torchrun with as many ranks as tensor (or expert)
parallelism, the times include its communication. Selective recomputation happens inside a layer, so the times
include it; full recomputation is added by `with_recomputation`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import core_transformer_config_from_args
from torch import Tensor

from megatron_internvlx import platform
from megatron_internvlx.config import TrainSettings, as_mapping, settings_from
from megatron_internvlx.data.plan import IGNORE, PlanSettings, build_plan
from megatron_internvlx.model.builder import build_stage
from megatron_internvlx.model.internvlx import InternVLX
from megatron_internvlx.model.sizes import ModelSizes
from megatron_internvlx.parallel.batch import MicroBatch
from megatron_internvlx.parallel.device_plan import device_plan
from megatron_internvlx.planning.costs import Cost, Profile, layer_kind
from megatron_internvlx.planning.flops import PlanStats, Recomputation
from megatron_internvlx.platform.transfer import to_device


def layer_kinds(sizes: ModelSizes) -> list[str]:
    """Kinds of the model's layers, in an order in which a small model can have one of each."""
    present = {layer_kind(sizes, layer) for layer in range(sizes.layers)}
    names = ("shallow", "expand", "deep", "inject")
    return sorted(present, key=lambda kind: (names.index(kind.removesuffix("_experts")), kind))


@dataclass(frozen=True)
class _Ranks:
    """Megatron's arguments that the reduced model's batch and experts follow."""

    world_size: int
    tensor_model_parallel_size: int
    num_experts: int | None


def reduce_to_kinds(args: argparse.Namespace, kinds: list[str]) -> argparse.Namespace:
    """Copy of parsed arguments for a model with one layer of each kind, on one pipeline stage.

    Must be made before Megatron checks the arguments. Raises ValueError for a model whose every layer is deep.
    """
    names = [kind.removesuffix("_experts") for kind in kinds]
    ranks, again = settings_from(args, _Ranks), settings_from(args, Recomputation)
    expand = names.index("expand") if "expand" in names else None
    if expand == 0:  # the expansion needs a layer before it, which such a model does not have
        raise ValueError("a model whose every layer is deep has no expansion to measure: remove --measure")
    changes: dict[str, Any] = {
        "num_layers": len(kinds),
        "expand_layer": expand,
        "inject_layers": [i for i, name in enumerate(names) if name == "inject"] or None,
        "pipeline_model_parallel_size": 1,
        "pipeline_model_parallel_layout": None,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "micro_batch_size": 1,
        "global_batch_size": max(ranks.world_size // ranks.tensor_model_parallel_size, 1),
        "use_distributed_optimizer": False,
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
        "dry_run": False,
    }
    if ranks.num_experts:
        changes["moe_layer_freq"] = [int(kind.endswith("_experts")) for kind in kinds]
    if again.recompute_granularity == "full":
        changes |= dict.fromkeys(("recompute_granularity", "recompute_method", "recompute_num_layers"))
    return argparse.Namespace(**{**as_mapping(args), **changes})


def synthetic_batch(
    stats: PlanStats, settings: PlanSettings, *, image_size: int, tile_ranks: int = 1
) -> MicroBatch:
    """Micro-batch of one sample with the tiles and rows of `stats`: tiles first, then supervised text."""
    per_tile = settings.high_grid**2
    length, visual = stats.deep_rows, stats.projected_tiles * per_tile
    is_visual = np.arange(length) < visual
    # Static boundaries may send more rows to the output layer; only text can be supervised.
    labels = np.where(np.arange(length) >= max(visual, length - stats.output_rows), 1, IGNORE)
    plan = build_plan([np.ones(length, int)], [labels], [is_visual], settings)
    share = plan.tile_capacity // tile_ranks
    tiles = torch.randint(0, 256, (share, 3, image_size, image_size), dtype=torch.uint8)
    return MicroBatch(device_plan(plan), to_device(tiles))


class Stopwatch:
    """Measures the median seconds of a forward and of a backward pass."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats

    def time(self, run: Callable[[], tuple[Tensor, ...]]) -> Cost:
        """Seconds of `run` and of its backward pass; it returns the outputs to differentiate, anew each time."""
        forward, backward = [], []
        for _ in range(self.repeats + 1):
            start = self._now()
            outputs = run()
            middle = self._now()
            differentiated = [x for x in outputs if x.requires_grad]
            gradients = [torch.ones_like(x) for x in differentiated]
            ready = self._now()
            if differentiated:
                torch.autograd.backward(differentiated, gradients)
            backward.append(self._now() - ready)
            forward.append(middle - start)
        # The first repetition warms up caches and kernels.
        return Cost(statistics.median(forward[1:]), statistics.median(backward[1:]))

    @staticmethod
    def _now() -> float:
        platform.synchronize()
        return time.perf_counter()


def reduced_model(args: argparse.Namespace) -> InternVLX:
    """Model of validated arguments on this device, as training builds it."""
    config = core_transformer_config_from_args(args)
    model = build_stage(args, config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    model.to(device=platform.device(), dtype=config.params_dtype)
    model.train()
    return model


def measure(args: argparse.Namespace, batch: MicroBatch, kinds: list[str], repeats: int = 5) -> Profile:
    """Time the parts of the model of validated arguments, reduced to `kinds`. Megatron must be initialized."""
    model = reduced_model(args)
    watch, plan = Stopwatch(repeats), batch.plan
    assert batch.tiles is not None
    first = watch.time(lambda: _first(model, batch))
    rows, features = (x.detach() for x in _first(model, batch))
    frozen = settings_from(args, TrainSettings).freeze_vision
    features.requires_grad_(not frozen)
    inputs = model.decoder_inputs(plan, features)
    context = None if frozen else features
    costs: dict[str, Cost] = {}
    rows.requires_grad_()
    for kind, layer in zip(kinds, model.language_model.decoder.layers, strict=True):

        def run(layer: Any = layer, rows: Tensor = rows) -> tuple[Tensor, ...]:
            return (layer(rows, None, context=context, packed_seq_params=inputs)[0],)

        costs[kind] = watch.time(run)
        rows = run()[0].detach().requires_grad_()
    last = watch.time(lambda: (_last(model, rows, plan).sum(),))
    return Profile(first, last, costs, {})


def _first(model: InternVLX, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    assert batch.tiles is not None
    features = model.encode(batch.tiles, batch.plan)
    return model.embed(batch.plan, features), features


def _last(model: InternVLX, rows: Tensor, plan: Any) -> Tensor:
    llm = model.language_model
    weight = llm.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    hidden = llm.decoder.final_layernorm(rows)
    return model._loss(
        hidden_states=hidden, output_layer=llm.output_layer, output_weight=weight, context=plan
    )


def with_recomputation(profile: Profile, full: bool) -> Profile:
    """Profile with full recomputation, where every backward pass runs the forward pass first."""
    if not full:
        return profile
    kinds = {name: Cost(cost.forward, cost.backward + cost.forward) for name, cost in profile.kinds.items()}
    return replace(profile, kinds=kinds)
