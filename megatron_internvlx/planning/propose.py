"""Proposals around a plan: where the expansion balances best, and TP/PP/DP for a number of GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from megatron_internvlx.model.sizes import ModelSizes
from megatron_internvlx.planning.costs import LayerCosts, StageMemory
from megatron_internvlx.planning.search import PipelinePlan, find_plan
from megatron_internvlx.planning.simulate import Schedule

# Proposals are many; each may be a little off the best split.
_FRONTIER = 3_000


def _proof_mark(plan: PipelinePlan) -> str:
    """`not proven` for a plan whose search was cut, so that a better split may exist; else nothing."""
    return "" if plan.proven else "not proven"


def with_expansion(sizes: ModelSizes, layer: int) -> ModelSizes:
    """Sizes of the model with its expansion at `layer`; later injections keep their distance to it.

    Raises ValueError if LVTC is off.
    """
    old = sizes.injection_layers
    if not old:
        raise ValueError("the model has no expansion to move: LVTC is off (--expand-layer is not set)")
    moved = sorted({min(layer + k - old[0], sizes.layers - 1) for k in old})
    return replace(sizes, injection_layers=tuple(moved))


@dataclass(frozen=True)
class Expansion:
    """A place for the expansion and the best split for it."""

    layer: int
    plan: PipelinePlan
    work: float
    """Compute of a micro-batch, relative to the model as it is."""
    fits: bool = True
    """The plan fits the memory; if none was found that does, this is the plan without a limit."""

    @property
    def mark(self) -> str:
        """Remark for a table: `does not fit`, `not proven` or nothing."""
        return _proof_mark(self.plan) if self.fits else "does not fit"

    @property
    def efficiency(self) -> float:
        """Share of the ranks' time in which they compute."""
        return 1 - self.plan.bubble


def propose_expansions(
    sizes: ModelSizes,
    schedule: Schedule,
    costs: Callable[[ModelSizes], LayerCosts],
    layers: Iterable[int] | None = None,
    memory: Callable[[ModelSizes], StageMemory] | None = None,
) -> list[Expansion]:
    """Places for the expansion within an eighth of the depth around the model's, best balanced first.

    A lower layer always costs more work; the comparison is of how evenly the work spreads. Places
    where no split fits the memory come last; without `memory` every place fits.
    """
    here, reach = sizes.shallow_layers, max(sizes.layers // 8, 1)
    places = layers or range(max(here - reach, 1), min(here + reach, sizes.layers - 1) + 1)
    base = costs(sizes).total
    found = []
    for layer in places:
        moved = with_expansion(sizes, layer)
        seconds, limited = costs(moved), memory(moved) if memory else None
        try:
            plan, fits = find_plan(seconds, schedule, limited, frontier=_FRONTIER), True
        except ValueError:  # no split fits
            assert limited is not None
            free = replace(limited, limit=float("inf"))
            plan, fits = find_plan(seconds, schedule, free, frontier=_FRONTIER), False
        found.append(Expansion(layer, plan, seconds.total / base, fits))
    return sorted(found, key=lambda x: (not x.fits, x.plan.bubble))


@dataclass(frozen=True)
class Parallelism:
    """Division of the GPUs into tensor, pipeline and data parallelism, and its best plan."""

    tensor: int
    pipeline: int
    chunks: int
    data: int
    micro_batches: int
    plan: PipelinePlan
    seconds: float
    """Seconds of a step: the pipeline, and tensor-parallel communication on top."""

    @property
    def mark(self) -> str:
        """Remark for a table: `not proven` or nothing."""
        return _proof_mark(self.plan)


def layouts(
    sizes: ModelSizes, gpus: int, per_node: int, global_batch: int
) -> Iterator[tuple[int, int, int, int]]:
    """(TP, PP, VPP, DP) that divide the GPUs, the heads and the batch; TP stays inside a node."""
    for tensor in (1, 2, 4, 8, 16):
        if tensor > per_node or gpus % tensor or sizes.heads % tensor or sizes.kv_groups % tensor:
            continue
        for pipeline in (1, 2, 4, 8, 16):
            if gpus % (tensor * pipeline) or pipeline > sizes.layers:
                continue
            data = gpus // (tensor * pipeline)
            if global_batch % data or (pipeline > 1 and global_batch // data < pipeline):
                continue
            for chunks in (1, 2):
                batches = global_batch // data
                if chunks == 1 or (pipeline > 1 and not batches % pipeline and 2 * pipeline <= sizes.layers):
                    yield tensor, pipeline, chunks, data


def propose_parallelism(
    sizes: ModelSizes,
    candidates: Iterable[tuple[int, int, int, int]],
    global_batch: int,
    costs: Callable[[int], LayerCosts],
    memory: Callable[[int, int, int], StageMemory],
    communication: Callable[[int], float],
) -> list[Parallelism]:
    """Layouts that fit the memory, fastest first.

    Args:
        sizes: the model.
        candidates: (TP, PP, VPP, DP), for example from `layouts`.
        global_batch: micro-batches per step over all replicas.
        costs: TP -> costs of a micro-batch.
        memory: (TP, PP, DP) -> bytes.
        communication: TP -> seconds of tensor-parallel communication of a micro-batch over all layers.
    """
    found = []
    for tensor, pipeline, chunks, data in candidates:
        batches = global_batch // data
        schedule = Schedule(pipeline, chunks, batches)
        try:
            plan = find_plan(costs(tensor), schedule, memory(tensor, pipeline, data), frontier=_FRONTIER)
        except ValueError:  # no split fits
            continue
        busy = plan.seconds * (1 - plan.bubble)
        share = communication(tensor) * batches / pipeline
        seconds = plan.seconds * (1 + share / busy)
        found.append(Parallelism(tensor, pipeline, chunks, data, batches, plan, seconds))
    return sorted(found, key=lambda x: x.seconds)
