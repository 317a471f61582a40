"""Costs of every decoder layer, the vision encoder, the loss and every boundary, in seconds and bytes.

Two sources of seconds: FLOPs over a sustained rate, or a profile measured on the target machine by
`ivlx plan --measure`. Costs are those of one micro-batch that stands for all, on one
tensor-parallel group; its `PlanStats` count computed rows, padding included.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_internvlx.model.sizes import ModelSizes
from megatron_internvlx.parallel.layout import StageLayers, boundary_content
from megatron_internvlx.planning.activations import MemoryModel, chunk_activations
from megatron_internvlx.planning.flops import (
    BackwardSettings,
    FlopsByPart,
    PlanStats,
    Work,
    forward_flops,
    training_flops,
)


@dataclass(frozen=True)
class Machine:
    """Rates that turn FLOPs and bytes into seconds."""

    flops: float = 400e12
    """Sustained FLOP/s of one device, not its peak."""
    bandwidth: float = 50e9
    """Bytes per second between two pipeline stages, per tensor-parallel rank."""
    latency: float = 20e-6
    """Seconds per message."""

    @classmethod
    def assumed(cls, *, fp8: bool, local: bool = False) -> Machine:
        """Assumed, unmeasured rates: an H100 on 400 Gbit/s that sustains 400 TFLOP/s in bf16 or 600 in FP8.

        With `local`, CPU cores of one machine that reach 50 GFLOP/s per rank.
        """
        return cls(50e9, 2e9, 100e-6) if local else cls(600e12 if fp8 else 400e12)


@dataclass(frozen=True)
class Cost:
    """Seconds of one micro-batch."""

    forward: float
    backward: float


@dataclass(frozen=True)
class StageMemory:
    """Bytes per device that limit a split."""

    state: tuple[float, ...]
    """Per layer: weights, gradients and optimizer state."""
    activations: tuple[float, ...]
    """Per layer: kept for the backward pass of one micro-batch, without the carried features."""
    first_state: float = 0.0
    first_activations: float = 0.0
    last_state: float = 0.0
    last_activations: float = 0.0
    working: tuple[float, ...] = ()
    """Per layer: bytes that recomputation brings back; the largest of a rank's layers counts, once. (): none."""
    first_working: float = 0.0
    """Bytes that recomputation of the vision encoder brings back."""
    carried: float = 0.0
    """ViT features that a stage with layers keeps of one micro-batch."""
    carriers: int = 0
    """Stages that start before this layer carry them."""
    limit: float = float("inf")
    """A split whose fullest rank needs more is not allowed."""


@dataclass(frozen=True)
class LayerCosts:
    """Costs that determine the pipeline's time; see `search.find_plan`."""

    layers: tuple[Cost, ...]
    """Per decoder layer, its injection included."""
    first: Cost
    """Vision encoder, entry projector and embedding: with the first stage."""
    last: Cost
    """Output layer and loss: with the last stage."""
    boundaries: tuple[Cost, ...]
    """[layers + 1] Time to move what crosses a boundary in front of layer i, and its gradient."""

    @property
    def total(self) -> float:
        """Seconds of compute of a micro-batch, over all stages."""
        return sum(cost.forward + cost.backward for cost in (*self.layers, self.first, self.last))


def _seconds(works: Iterable[Work], settings: BackwardSettings, rate: float) -> Cost:
    part = FlopsByPart(tuple(works))
    return Cost(part.total / rate, (training_flops(part, settings).hardware - part.total) / rate)


def costs_from_flops(
    sizes: ModelSizes,
    stats: PlanStats,
    settings: BackwardSettings,
    machine: Machine,
    *,
    tensor_parallel: int = 1,
    sequence_parallel: bool = True,
) -> LayerCosts:
    """Costs from counted FLOPs; every part is assumed to run at the same rate."""
    flops = forward_flops(sizes, stats)
    rate = machine.flops * tensor_parallel
    layers = [
        _seconds((w for w in flops.works if w.layer == layer), settings, rate)
        for layer in range(sizes.layers)
    ]
    outside = [w for w in flops.works if w.layer is None]
    return LayerCosts(
        tuple(layers),
        first=_seconds((w for w in outside if w.part != "output"), settings, rate),
        last=_seconds((w for w in outside if w.part == "output"), settings, rate),
        boundaries=boundary_costs(
            sizes, stats, settings, machine, shards=tensor_parallel if sequence_parallel else 1
        ),
    )


def boundary_rows(sizes: ModelSizes, stats: PlanStats, layer: int) -> tuple[int, int]:
    """Decoder rows, and elements of carried ViT features, in front of a layer, over all TP ranks."""
    content = boundary_content(layer, sizes.injection_layers)
    features = stats.projected_tiles * sizes.features_per_tile if content.carry else 0
    return stats.deep_rows if content.deep else stats.shallow_rows, features


def boundary_costs(
    sizes: ModelSizes, stats: PlanStats, settings: BackwardSettings, machine: Machine, *, shards: int = 1
) -> tuple[Cost, ...]:
    """Time of every possible boundary in bf16; the features of a frozen encoder get no gradient."""
    costs = []
    for layer in range(sizes.layers + 1):
        rows, features = boundary_rows(sizes, stats, layer)
        back = rows * sizes.hidden + (features if settings.reaches("vision") else 0)
        forward, backward = (
            machine.latency + 2 * elements / shards / machine.bandwidth
            for elements in (rows * sizes.hidden + features, back)
        )
        costs.append(Cost(forward, backward))
    return tuple(costs)


def stage_memory(model: MemoryModel, stats: PlanStats, limit: float) -> StageMemory:
    """Bytes per layer on one rank, by the formulas of the dry run.

    The loss of the one micro-batch that is being computed counts once, not per micro-batch in flight.
    """
    empty = StageLayers(0, 0)

    def state(rank: int, layers: StageLayers) -> float:
        stages = tuple((layers if r == rank else empty,) for r in range(3))
        return replace(model, layout=replace(model.layout, pipeline=3, stages=stages)).state(rank).total

    layers = [StageLayers(i, i + 1) for i in range(model.sizes.layers)]
    single = [chunk_activations(model, x, stats, first=False, last=False) for x in layers]
    carried = [model.carried_features(x, stats) for x in layers]
    first = chunk_activations(model, empty, stats, first=True, last=False)
    return StageMemory(
        tuple(state(1, x) for x in layers),
        tuple(float(one.total - features) for one, features in zip(single, carried, strict=True)),
        first_state=state(0, empty),
        first_activations=float(first.total),
        last_state=state(2, empty) + model.output(stats),
        limit=limit,
        working=tuple(float(one.working) for one in single),
        first_working=float(first.working),
        carried=float(carried[0]),
        carriers=max(model.sizes.injection_layers, default=-1) + 1,
    )


@dataclass(frozen=True)
class Profile:
    """Measured seconds of the kinds of layers; written and read as JSON."""

    first: Cost
    last: Cost
    kinds: dict[str, Cost]
    """Seconds of shallow, expand, deep and inject layers, as far as the model has them."""
    about: dict[str, Any]
    """Model, workload, hardware and versions, for readers of the file."""

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON."""
        content = {
            "about": self.about,
            "first": vars(self.first),
            "last": vars(self.last),
            "kinds": {name: vars(cost) for name, cost in self.kinds.items()},
        }
        Path(path).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile. Raises ValueError naming the file."""
        try:
            content = json.loads(Path(path).read_text())
            kinds = {name: Cost(**cost) for name, cost in content["kinds"].items()}
            return cls(Cost(**content["first"]), Cost(**content["last"]), kinds, content.get("about", {}))
        except OSError as error:
            raise ValueError(f"profile {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"profile {path} is not one that --measure wrote: {error!r}") from error


def layer_kind(sizes: ModelSizes, layer: int) -> str:
    """Kind of a layer: shallow, expand, deep or inject, with `_experts` behind for a mixture of experts."""
    injections = sizes.injection_layers
    if layer in injections:
        kind = "expand" if layer == injections[0] else "inject"
    else:
        kind = "shallow" if layer < sizes.shallow_layers else "deep"
    return kind + ("_experts" if layer in sizes.expert_layers else "")


def costs_from_profile(profile: Profile, sizes: ModelSizes, boundaries: tuple[Cost, ...]) -> LayerCosts:
    """Costs of the model's layers by their kinds. Raises ValueError if a kind was not measured."""
    kinds = [layer_kind(sizes, layer) for layer in range(sizes.layers)]
    missing = sorted(set(kinds) - set(profile.kinds))
    if missing:
        raise ValueError(
            f"the profile has no {', '.join(missing)} layers (it has {', '.join(sorted(profile.kinds))}): "
            "measure it again with this model's settings"
        )
    return LayerCosts(tuple(profile.kinds[kind] for kind in kinds), profile.first, profile.last, boundaries)
