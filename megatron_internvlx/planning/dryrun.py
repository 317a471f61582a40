"""`pretrain_vlm.py --dry-run`: layout, memory and work of a run on any number of GPUs, without one.

Memory is that of the fullest micro-batch: as many tiles as fit, and every text row supervised that may be.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_internvlx.config import (
    DataSettings,
    RunSettings,
    TrainSettings,
    VisionSettings,
    misaligned,
    settings_from,
)
from megatron_internvlx.data.decode import ranks_cut
from megatron_internvlx.megatron_settings import Execution, Parallelism
from megatron_internvlx.parallel.layout import carried_rows, layout_name
from megatron_internvlx.planning.activations import MemoryModel, forward_bytes, rank_activations
from megatron_internvlx.planning.costs import Machine, boundary_rows, costs_from_flops
from megatron_internvlx.planning.epoch import Epoch
from megatron_internvlx.planning.flops import PlanStats, forward_flops, training_flops
from megatron_internvlx.planning.loading import Loading, loading, loading_figures
from megatron_internvlx.planning.memory import RankState
from megatron_internvlx.planning.parameters import parameters
from megatron_internvlx.planning.search import PipelinePlan, evaluate
from megatron_internvlx.planning.simulate import Schedule
from megatron_internvlx.planning.trained import trained_lines, trained_parameters
from megatron_internvlx.planning.workload import Workload
from megatron_internvlx.precision import Precision

GIB = 1 << 30
# CUDA context, NCCL buffers, Transformer Engine's and cuBLAS's workspaces, fragmentation.
RESERVE_GIB = 6.0


@dataclass(frozen=True)
class Boundary:
    """Message from one rank to the next stage, per micro-batch."""

    layer: int
    """0-based decoder layer behind the boundary."""
    rows: int
    """Decoder rows per rank."""
    carried: int
    """Rows of width h that carry vision features."""
    size: int
    """Bytes; the backward pass returns those of the decoder rows, with a trained encoder those of the features too."""


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: layers, memory and messages of one of its ranks."""

    rank: int
    chunks: tuple[tuple[int, int], ...]
    injections: tuple[int, ...]
    state: RankState
    activations: dict[str, int]
    working: int
    """Bytes that recomputation brings back on top."""
    flying: list[int]
    """Micro-batches in flight per model chunk."""
    boundaries: tuple[Boundary, ...]
    """One per model chunk but the model's last."""
    flops: int
    """Forward and backward pass of one micro-batch, recomputation included, over all its TP ranks."""
    inputs: int = 0
    """Bytes of the tiles in the buffers that a CUDA graph of the step reads; 0 without one."""
    evaluation: int = 0
    """Bytes of an evaluation's forward pass beside the memory that a CUDA graph keeps; 0 without one."""

    @property
    def total(self) -> int:
        """Bytes, without the reserve."""
        return (
            self.state.total + sum(self.activations.values()) + self.working + self.inputs + self.evaluation
        )


@dataclass(frozen=True)
class Plan:
    """Checked run: sizes, layout and costs."""

    parallel: Parallelism
    precision: Precision
    run: RunSettings
    layout_name: str
    model: MemoryModel
    work: Workload
    stats: PlanStats
    stages: tuple[Stage, ...]
    pipeline: PipelinePlan
    """The step in the planner's simulation, by FLOPs at an assumed rate."""
    machine: Machine
    """The assumed rates."""
    loading: Loading

    @property
    def fullest(self) -> Stage:
        """Stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def epoch(self) -> Epoch | None:
        """Epoch over `--dry-run-pictures`; None without."""
        pictures = self.run.dry_run_pictures
        return Epoch.of(pictures, self.work, self.pipeline.seconds) if pictures else None

    @property
    def flops(self) -> int:
        """FLOPs of a step over all replicas, forward and backward, recomputation included."""
        return self.work.packs * sum(stage.flops for stage in self.stages)


def check(args: argparse.Namespace) -> Plan:
    """Plan of a run with validated arguments. Raises ValueError if it cannot run."""
    model, work = MemoryModel.from_args(args), Workload.from_args(args)
    precision = settings_from(args, Precision)
    _check_division(precision, model, work)
    stats = work.full_micro_batch(model.sizes)
    schedule = model.layout.schedule(work.packs // model.layout.data)
    stages = tuple(_stage(model, rank, stats, schedule) for rank in range(model.layout.pipeline))
    inputs = graph_inputs(args, model.layout.tensor, schedule.micro_batches)
    if inputs:
        # What the recording allocates stays the graph's own: as much as a step keeps at a time, for torch empties its
        # cache of the steps before, but an evaluation cannot use it.
        stages = (replace(stages[0], inputs=inputs, evaluation=forward_bytes(model, stats)), *stages[1:])
    machine = Machine.assumed(fp8=bool(precision.fp8), local=model.local)
    pipeline = _simulate(model, stats, schedule, machine)
    plan = Plan(
        settings_from(args, Parallelism),
        precision,
        settings_from(args, RunSettings),
        layout_name(settings_from(args, Parallelism)),
        model,
        work,
        stats,
        stages,
        pipeline,
        machine,
        _loading(args, model, work, stats, pipeline),
    )
    _check_memory(plan)
    return plan


def _loading(
    args: argparse.Namespace, model: MemoryModel, work: Workload, stats: PlanStats, pipeline: PipelinePlan
) -> Loading:
    data, layout = settings_from(args, DataSettings), model.layout
    return loading(
        data,
        files=ranks_cut(data, on_gpu=settings_from(args, Execution).on_gpu),
        tiles=stats.projected_tiles,
        tile_size=settings_from(args, VisionSettings).image_size,
        rows=work.seq_length,
        micro_batch_size=work.micro_batch_size,
        seconds=pipeline.seconds / pipeline.schedule.micro_batches,
        world=settings_from(args, Parallelism).world_size,
        tensor=layout.tensor,
        replicas=layout.data,
    )


def graph_inputs(args: argparse.Namespace, tensor: int, micro_batches: int) -> int:
    """Bytes of a rank's tiles of all micro-batches of a step, which a CUDA graph keeps; 0 without one.

    Args:
        args: validated arguments.
        tensor: tensor-parallel ranks, which share the tiles of a micro-batch.
        micro_batches: number per step and replica.
    """
    if settings_from(args, Execution).cuda_graph_impl != "full_iteration":
        return 0
    budget = settings_from(args, TrainSettings).max_tiles_per_pack
    assert budget is not None  # of static boundaries, without which there is no graph
    return micro_batches * -(-budget // tensor) * 3 * settings_from(args, VisionSettings).image_size ** 2


def _simulate(model: MemoryModel, stats: PlanStats, schedule: Schedule, machine: Machine) -> PipelinePlan:
    layout = model.layout
    costs = costs_from_flops(
        model.sizes,
        stats,
        model.backward,
        machine,
        tensor_parallel=layout.tensor,
        sequence_parallel=layout.sequence_parallel,
    )
    return evaluate(costs, schedule, layout.counts)


def _check_division(precision: Precision, model: MemoryModel, work: Workload) -> None:
    layout, sizes, t = model.layout, model.sizes, model.layout.tensor
    wrong = [
        f"{name} {value} is not a multiple of {flag} {by}"
        for name, value, flag, by in (
            ("attention heads", sizes.heads, "--tensor-model-parallel-size", t),
            ("key-value groups", sizes.kv_groups, "--tensor-model-parallel-size", t),
            ("MLP width", sizes.ffn, "--tensor-model-parallel-size", t),
            ("experts", sizes.experts, "--expert-model-parallel-size", layout.expert),
            ("--global-batch-size", work.global_batch_size, "data-parallel ranks x micro-batch size",
             layout.data * work.micro_batch_size),
        )
        if value % by
    ]  # fmt: skip
    if precision.fp8 and (text := misaligned("--seq-length", work.seq_length, precision.row_alignment)):
        wrong.append(text)
    if wrong:
        raise ValueError("; ".join(wrong))


def _stage(model: MemoryModel, rank: int, stats: PlanStats, schedule: Schedule) -> Stage:
    sizes, layout = model.sizes, model.layout
    chunks = layout.stages[rank]
    layers = {layer for chunk in chunks for layer in range(chunk.first, chunk.end)}
    return Stage(
        rank,
        tuple((chunk.first, chunk.end) for chunk in chunks),
        tuple(k for k in sizes.injection_layers if k in layers),
        model.state(rank),
        *rank_activations(model, rank, stats, schedule),
        tuple(_boundary(model, chunk.end, stats) for chunk in chunks if chunk.end < sizes.layers),
        _stage_flops(model, layers, rank, stats),
    )


def _boundary(model: MemoryModel, layer: int, stats: PlanStats) -> Boundary:
    """Message in front of a layer, as `parallel/boundary.py` packs it."""
    hidden, layout = model.sizes.hidden, model.layout
    shards = layout.tensor if layout.sequence_parallel else 1
    rows, features = boundary_rows(model.sizes, stats, layer)
    rows, carried = rows // shards, carried_rows(features, hidden, shards) // shards
    return Boundary(layer, rows, carried, (rows + carried) * hidden * model.width)


def _stage_flops(model: MemoryModel, layers: set[int], rank: int, stats: PlanStats) -> int:
    forward = forward_flops(model.sizes, stats)
    last = rank == model.layout.pipeline - 1
    mine = tuple(
        work
        for work in forward.works
        if work.layer in layers or (work.layer is None and (last if work.part == "output" else rank == 0))
    )
    return training_flops(type(forward)(mine), model.backward).hardware


def _check_memory(plan: Plan) -> None:
    limit = plan.run.gpu_memory_gib
    needed = plan.fullest.total / GIB + RESERVE_GIB
    if limit is None or needed <= limit:
        return
    backward, layout = plan.model.backward, plan.model.layout
    unused = {
        "--recompute-granularity full": not backward.full_layers,
        "--vision-recompute": not backward.vision_recompute and backward.reaches("vision"),
        "--use-distributed-optimizer": not plan.model.per_parameter.distributed,
    }
    remedies = [flag for flag, off in unused.items() if off]
    remedies += [f"more tensor (now {layout.tensor}) or pipeline parallelism (now {layout.pipeline})"]
    raise ValueError(
        f"stage {plan.fullest.rank} needs {needed:.1f} GiB per GPU ({RESERVE_GIB:.0f} of it reserve) and the "
        f"GPU has {limit:g}: use {', '.join(remedies)}, or a shorter --seq-length than {plan.work.seq_length}"
        f"\n{describe(plan)}"
    )


def describe(plan: Plan) -> str:
    """Report of a plan, as text."""
    return "\n".join([*_head(plan), "", *_stage_table(plan), "", *_memory_table(plan)])


def _head(plan: Plan) -> list[str]:
    layout, work, stats = plan.model.layout, plan.work, plan.stats
    counts = parameters(plan.model.sizes)
    chunks, visual = len(layout.stages[0]), stats.projected_tiles * plan.model.sizes.high_grid**2
    parallel = f"TP {layout.tensor}{' + SP' if layout.sequence_parallel else ''}, PP {layout.pipeline}"
    parallel += f", virtual stages {chunks}" if chunks > 1 else ""
    parallel += f", EP {layout.expert}" if plan.model.sizes.experts else ""
    return [
        f"model        {sum(counts.values()) / 1e9:.3f} B parameters: "
        + ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in counts.items() if count),
        *trained_lines(plan.model, f"{plan.precision.description}, {plan.precision.transformer_impl}"),
        f"layout       {plan.parallel.world_size} GPUs = {parallel}, DP {layout.data}",
        f"global batch {work.global_batch_size} = {work.micro_batch_size} per micro-batch x "
        f"DP {layout.data} x {plan.pipeline.schedule.micro_batches} micro-batches",
        *_pipeline_line(plan.pipeline),
        f"micro-batch  {stats.projected_tiles} tiles, {stats.deep_rows:,} deep rows ({visual:,} visual)"
        + (f", {stats.shallow_rows:,} shallow rows" if stats.shallow_rows else ", LVTC off")
        + (f", {stats.output_rows:,} to the output layer" if work.static else ""),
        f"step         {work.packs * stats.deep_rows:,} tokens at most ({work.packs * stats.shallow_rows:,} in "
        f"the shallow phase), {_flops_text(plan.flops)}",
        *([plan.epoch.line(plan.machine.flops)] if plan.epoch else []),
        *plan.loading.lines(),
    ]


def _flops_text(flops: int) -> str:
    return f"{flops / 1e15:,.2f} PFLOP" if flops > 1e14 else f"{flops / 1e12:,.3f} TFLOP"


def _pipeline_line(pipeline: PipelinePlan) -> list[str]:
    if pipeline.schedule.pipeline == 1:
        return []
    busiest = f"busiest stage {1 + pipeline.imbalance:.2f}x the mean"
    line = f"pipeline     stages wait {pipeline.bubble:.1%} of the step (simulated from FLOPs), {busiest}"
    return [line + ("; ivlx plan looks for a better split" if pipeline.imbalance > 0.1 else "")]


def text_table(rows: list[list[str]]) -> list[str]:
    """Lines of a table with right-aligned cells."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _stage_table(plan: Plan) -> list[str]:
    heads = "stage layers projectors parameters/rank trained work MiB-sent rows carried"
    rows = [heads.split()]
    mean = sum(stage.flops for stage in plan.stages) / len(plan.stages)
    for stage in plan.stages:
        spans = ",".join(f"{a}-{b - 1}" if b > a else "-" for a, b in stage.chunks)
        projectors = (["entry"] if stage.rank == 0 else []) + [str(k) for k in stage.injections]
        sends = stage.boundaries
        rows.append(
            [
                str(stage.rank),
                spans,
                ",".join(projectors) or "-",
                f"{stage.state.parameters:,}",
                f"{stage.state.trainable:,}",
                f"{stage.flops / mean:.2f}x",
                ",".join(f"{b.size / (1 << 20):.1f}" for b in sends) or "-",
                ",".join(f"{b.rows}" for b in sends) or "-",
                ",".join(f"{b.carried}" for b in sends) or "-",
            ]
        )
    return text_table(rows)


def _memory_table(plan: Plan) -> list[str]:
    names = ("vision", "projectors", "shallow", "deep", "output")
    graph = ["inputs", "evaluation"] if any(stage.inputs for stage in plan.stages) else []
    heads = ["weights", "gradients", "optimizer", *names, "recompute", *graph, "total", "in flight"]
    rows = [["GiB per rank", *heads]]
    for stage in plan.stages:
        state = stage.state
        sizes = [state.weights, state.gradients, state.optimizer, *(stage.activations[n] for n in names)]
        sizes += [stage.working, *([stage.inputs, stage.evaluation] if graph else []), stage.total]
        cells = [f"{size / GIB:.2f}" for size in sizes]
        rows.append([f"stage {stage.rank}", *cells, "+".join(map(str, stage.flying))])
    limit = plan.run.gpu_memory_gib
    note = f"fullest {plan.fullest.total / GIB:.1f} + {RESERVE_GIB:.0f} GiB reserve"
    return [*text_table(rows), note + (f" of {limit:g} GiB" if limit else "")]


def run(args: argparse.Namespace) -> int:
    """Print the report and return 0, or the reason why the run cannot start and return 2."""
    try:
        plan = check(args)
    except ValueError as error:
        print(f"pretrain_vlm.py: this cannot run: {error}", file=sys.stderr)
        return 2
    print(describe(plan))
    if path := settings_from(args, RunSettings).dry_run_json:
        try:
            Path(path).write_text(json.dumps(figures(plan), indent=1) + "\n")
        except OSError as error:
            raise ValueError(f"--dry-run-json {path}: {error.strerror}") from error
    return 0


def figures(plan: Plan) -> dict[str, Any]:
    """Results for other tools: sizes in bytes, work in FLOP, lengths in tokens."""
    sizes, work = plan.model.sizes, plan.work
    return {
        "parameters": sum(parameters(sizes).values()),
        "trainable_parameters": trained_parameters(plan.model),
        "world_size": plan.parallel.world_size,
        "data_parallel": plan.model.layout.data,
        "micro_batches": plan.pipeline.schedule.micro_batches,
        "tokens_per_step": work.packs * plan.stats.deep_rows,
        "tokens_per_tile": sizes.high_grid**2,
        "shallow_tokens_per_tile": sizes.entry_grid**2,
        "flop_per_step": plan.flops,
        "pipeline_bubble": plan.pipeline.bubble,
        "pipeline_imbalance": plan.pipeline.imbalance,
        "epoch_seconds": plan.epoch.seconds if plan.epoch else None,
        "memory_per_gpu": plan.fullest.total,
        "layout": plan.layout_name,
        **loading_figures(plan.loading),
    }
