"""`pretrain_vlm.py --dry-run`: what a run would look like on any number of GPUs, without one.

Memory is that of the fullest micro-batch: as many tiles as fit, and every text row supervised.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_internvlx.config import DataSettings, RunSettings, TrainSettings, settings_from
from megatron_internvlx.model.settings import compression_plan, vision_config
from megatron_internvlx.parallel.layout import boundary_content, layout_name
from megatron_internvlx.planning.activations import ActivationModel, rank_activations
from megatron_internvlx.planning.costs import Machine, costs_from_flops
from megatron_internvlx.planning.flops import BackwardSettings, PlanStats, forward_flops, training_flops
from megatron_internvlx.planning.memory import Layout, RankState, StateSizes, rank_state
from megatron_internvlx.planning.parameters import ModelShape, parameters
from megatron_internvlx.planning.search import PipelinePlan, evaluate
from megatron_internvlx.planning.simulate import Schedule
from megatron_internvlx.precision import row_alignment

GIB = 1 << 30
# CUDA context, NCCL buffers, Transformer Engine's and cuBLAS's workspaces, fragmentation.
RESERVE_GIB = 6.0


@dataclass(frozen=True)
class Boundary:
    """What one rank sends to the next stage per micro-batch."""

    layer: int
    """0-based decoder layer behind the boundary."""
    rows: int
    """Decoder rows per rank."""
    carried: int
    """Rows of width h that carry vision features."""
    size: int
    """Bytes; the backward pass returns as many for the decoder rows, and for a trained encoder all."""


@dataclass(frozen=True)
class Stage:
    """One pipeline stage as a rank of it sees it."""

    rank: int
    chunks: tuple[tuple[int, int], ...]
    injections: tuple[int, ...]
    state: RankState
    activations: dict[str, int]
    working: int
    """Bytes that recomputation brings back on top."""
    flying: list[int]
    boundaries: tuple[Boundary, ...]
    """One per model chunk but the model's last."""
    flops: int
    """Of one micro-batch, forward and backward, recomputation included, over all its TP ranks."""

    @property
    def total(self) -> int:
        """Bytes, without the reserve."""
        return self.state.total + sum(self.activations.values()) + self.working


@dataclass(frozen=True)
class Plan:
    """A checked run."""

    args: argparse.Namespace
    shape: ModelShape
    layout: Layout
    stats: PlanStats
    micro_batches: int
    stages: tuple[Stage, ...]
    pipeline: PipelinePlan
    """The step in the planner's simulation, by FLOPs at an assumed rate."""

    @property
    def fullest(self) -> Stage:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.total)


def full_micro_batch(args: argparse.Namespace, shape: ModelShape) -> PlanStats:
    """The micro-batch with as many tiles as the arguments admit, its text rows all supervised.

    Raises ValueError when not even one tile fits.
    """
    train, data = settings_from(args, TrainSettings), settings_from(args, DataSettings)
    plan = shape.compression
    per_tile = plan.high_grid**2
    fitting = args.seq_length // per_tile
    if not fitting:
        raise ValueError(
            f"--seq-length {args.seq_length} holds no tile of {per_tile} tokens: make it longer, "
            "or --high-ratio smaller"
        )
    largest = data.max_tiles + (not data.no_thumbnail and data.max_tiles > 1)
    tiles = min(fitting, train.max_tiles_per_pack or (largest * args.micro_batch_size))
    rows = args.seq_length * (1 if train.max_tiles_per_pack else args.micro_batch_size)
    shallow = rows - tiles * (per_tile - plan.low_grid**2) if plan.lvtc else 0
    if plan.lvtc and train.boundary == "static" and train.shallow_seq_length:
        if train.shallow_seq_length < shallow and train.max_tiles_per_pack is None:
            raise ValueError(
                f"--shallow-seq-length {train.shallow_seq_length} is less than the {shallow} shallow rows "
                "of a full micro-batch"
            )
        shallow = train.shallow_seq_length
    text = rows - tiles * per_tile
    return PlanStats(
        vision_tiles=tiles,
        projected_tiles=tiles,
        upsampled_tiles=tiles if plan.lvtc else 0,
        shallow_rows=shallow,
        shallow_squares=shallow**2,
        deep_rows=rows,
        deep_squares=rows**2,
        output_rows=text,
    )


def check(args: argparse.Namespace) -> Plan:
    """Everything that a run with these parsed arguments needs. Raises ValueError if it cannot run."""
    try:
        config = core_transformer_config_from_args(args)
        layout = Layout.from_args(args, config)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(str(error) or "Megatron refuses this layout (an assertion)") from error
    shape = ModelShape.from_args(args, vision_config(args), compression_plan(args))
    _check_division(args, shape, layout)
    stats = full_micro_batch(args, shape)
    micro_batches = args.global_batch_size // (args.micro_batch_size * layout.data)
    sizes, frozen = StateSizes.from_args(args), BackwardSettings.from_args(args)
    model = ActivationModel(shape, layout, frozen, sizes.weight, args.transformer_impl == "local")
    stages = tuple(
        _stage(config, model, rank, sizes, stats, micro_batches) for rank in range(layout.pipeline)
    )
    plan = Plan(
        args, shape, layout, stats, micro_batches, stages, _simulated(args, model, stats, micro_batches)
    )
    _check_memory(plan)
    return plan


def _simulated(
    args: argparse.Namespace, model: ActivationModel, stats: PlanStats, micro_batches: int
) -> PipelinePlan:
    layout = model.layout
    costs = costs_from_flops(
        model.shape,
        stats,
        model.backward,
        Machine.assumed(fp8=bool(args.fp8), local=args.transformer_impl == "local"),
        tensor_parallel=layout.tensor,
        sequence_parallel=layout.sequence_parallel,
    )
    schedule = Schedule(layout.pipeline, len(layout.stages[0]), micro_batches, args.overlap_p2p_comm)
    return evaluate(costs, schedule, layout.counts)


def _check_division(args: argparse.Namespace, shape: ModelShape, layout: Layout) -> None:
    t = layout.tensor
    wrong = [
        f"{name} {value} is not a multiple of {flag} {by}"
        for name, value, flag, by in (
            ("attention heads", shape.heads, "--tensor-model-parallel-size", t),
            ("key-value groups", shape.kv_groups, "--tensor-model-parallel-size", t),
            ("MLP width", shape.ffn, "--tensor-model-parallel-size", t),
            ("experts", shape.experts, "--expert-model-parallel-size", layout.expert),
            ("--global-batch-size", args.global_batch_size, "data-parallel ranks x micro-batch size",
             layout.data * args.micro_batch_size),
        )
        if value % by
    ]  # fmt: skip
    if args.fp8 and args.seq_length % (rows := row_alignment(args)):
        wrong.append(
            f"--seq-length {args.seq_length} is not a multiple of {rows}, which the precision and sequence "
            f"parallelism of this layout need: use {-(-args.seq_length // rows) * rows}"
        )
    if wrong:
        raise ValueError("; ".join(wrong))


def _stage(
    config: TransformerConfig,
    model: ActivationModel,
    rank: int,
    sizes: StateSizes,
    stats: PlanStats,
    micro_batches: int,
) -> Stage:
    shape, layout = model.shape, model.layout
    chunks = layout.stages[rank]
    parts, working, flying = rank_activations(model, rank, stats, micro_batches)
    layers = {layer for chunk in chunks for layer in range(chunk.first, chunk.end)}
    ends = [chunk.end for chunk in chunks if chunk.end < config.num_layers]
    return Stage(
        rank,
        tuple((chunk.first, chunk.end) for chunk in chunks),
        tuple(k for k in shape.compression.injection_layers if k in layers),
        rank_state(shape, layout, rank, sizes, model.backward),
        parts,
        working,
        flying,
        tuple(_boundary(model, end, stats) for end in ends),
        _stage_flops(model, layers, rank, stats),
    )


def _stage_flops(model: ActivationModel, layers: set[int], rank: int, stats: PlanStats) -> int:
    forward = forward_flops(model.shape, stats)
    last = rank == model.layout.pipeline - 1
    mine = tuple(
        work
        for work in forward.works
        if work.layer in layers or (work.layer is None and (last if work.part == "output" else rank == 0))
    )
    return training_flops(type(forward)(mine), model.backward).hardware


def _boundary(model: ActivationModel, layer: int, stats: PlanStats) -> Boundary:
    """As parallel/boundary.py packs it."""
    shape, layout = model.shape, model.layout
    content = boundary_content(layer, shape.compression.injection_layers)
    shards = layout.tensor if layout.sequence_parallel else 1
    rows = (stats.deep_rows if content.deep else stats.shallow_rows) // shards
    elements = stats.projected_tiles * shape.vision.tokens_per_tile * shape.vision.hidden_size
    carried = -(-elements // (shape.hidden * shards)) if content.carry else 0
    return Boundary(layer, rows, carried, (rows + carried) * shape.hidden * model.width)


def _check_memory(plan: Plan) -> None:
    limit = settings_from(plan.args, RunSettings).gpu_memory_gib
    needed = plan.fullest.total / GIB + RESERVE_GIB
    if limit is None or needed <= limit:
        return
    args = plan.args
    unused = {
        "--recompute-granularity full": args.recompute_granularity != "full",
        "--vision-recompute": not args.vision_recompute and not args.freeze_vision,
        "--use-distributed-optimizer": not args.use_distributed_optimizer,
    }
    remedies = [flag for flag, off in unused.items() if off]
    remedies += [
        f"more tensor (now {plan.layout.tensor}) or pipeline parallelism (now {plan.layout.pipeline})"
    ]
    raise ValueError(
        f"stage {plan.fullest.rank} needs {needed:.1f} GiB per GPU ({RESERVE_GIB:.0f} of it reserve) and "
        f"the GPU has {limit:g}: use {', '.join(remedies)}, or a shorter --seq-length than {args.seq_length}"
        f"\n{describe(plan)}"
    )


def describe(plan: Plan) -> str:
    """The report, as text."""
    return "\n".join([*_head(plan), "", *_stage_table(plan), "", *_memory_table(plan)])


def _head(plan: Plan) -> list[str]:
    args, layout, stats, m = plan.args, plan.layout, plan.stats, plan.micro_batches
    counts = parameters(plan.shape)
    frozen = [n for n in ("vision", "projectors", "llm") if getattr(args, f"freeze_{n}")]
    chunks = len(layout.stages[0])
    flops = sum(stage.flops for stage in plan.stages)
    packs = args.global_batch_size // args.micro_batch_size
    visual = stats.projected_tiles * plan.shape.compression.high_grid**2
    parallel = f"TP {layout.tensor}{' + SP' if layout.sequence_parallel else ''}, PP {layout.pipeline}"
    parallel += f", virtual stages {chunks}" if chunks > 1 else ""
    parallel += f", EP {layout.expert}" if plan.shape.experts else ""
    precision = ("fp8 " + str(args.fp8_recipe)) if args.fp8 else str(args.params_dtype).removeprefix("torch.")
    return [
        f"model        {sum(counts.values()) / 1e9:.3f} B parameters: "
        + ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in counts.items() if count),
        f"trained      {'all' if not frozen else 'all but ' + ', '.join(frozen)}; {precision}, "
        f"{args.transformer_impl}",
        f"layout       {args.world_size} GPUs = {parallel}, DP {layout.data}",
        f"global batch {args.global_batch_size} = {args.micro_batch_size} per micro-batch x "
        f"DP {layout.data} x {m} micro-batches",
        *_waits(plan.pipeline),
        f"micro-batch  {stats.projected_tiles} tiles, {stats.deep_rows:,} deep rows ({visual:,} visual)"
        + (f", {stats.shallow_rows:,} shallow rows" if stats.shallow_rows else ", LVTC off"),
        f"step         {packs * stats.deep_rows:,} tokens at most ({packs * stats.shallow_rows:,} in the "
        f"shallow phase), {_work(packs * flops)}",
    ]


def _work(flops: int) -> str:
    return f"{flops / 1e15:,.2f} PFLOP" if flops > 1e14 else f"{flops / 1e12:,.3f} TFLOP"


def _waits(pipeline: PipelinePlan) -> list[str]:
    if pipeline.schedule.pipeline == 1:
        return []
    busiest = f"busiest stage {1 + pipeline.imbalance:.2f}x the mean"
    line = f"pipeline     stages wait {pipeline.bubble:.1%} of the step (simulated from FLOPs), {busiest}"
    return [line + ("; tools/plan_pipeline.py looks for a better split" if pipeline.imbalance > 0.1 else "")]


def _table(rows: list[list[str]]) -> list[str]:
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
    return _table(rows)


def _memory_table(plan: Plan) -> list[str]:
    names = ("vision", "projectors", "shallow", "deep", "output")
    rows = [["GiB per rank", "weights", "gradients", "optimizer", *names, "recompute", "total", "in flight"]]
    for stage in plan.stages:
        state = stage.state
        sizes = [state.weights, state.gradients, state.optimizer, *(stage.activations[n] for n in names)]
        cells = [f"{size / GIB:.2f}" for size in (*sizes, stage.working, stage.total)]
        rows.append([f"stage {stage.rank}", *cells, "+".join(map(str, stage.flying))])
    limit = settings_from(plan.args, RunSettings).gpu_memory_gib
    note = f"fullest {plan.fullest.total / GIB:.1f} + {RESERVE_GIB:.0f} GiB reserve"
    return [*_table(rows), note + (f" of {limit:g} GiB" if limit else "")]


def run(args: argparse.Namespace) -> int:
    """Print the report; returns 0, or 2 after saying why the run cannot start."""
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
    """What other tools read: sizes in bytes, work in FLOP, lengths in tokens."""
    packs = plan.args.global_batch_size // plan.args.micro_batch_size
    return {
        "parameters": sum(parameters(plan.shape).values()),
        "world_size": plan.args.world_size,
        "data_parallel": plan.layout.data,
        "micro_batches": plan.micro_batches,
        "tokens_per_step": packs * plan.stats.deep_rows,
        "tokens_per_tile": plan.shape.compression.high_grid**2,
        "shallow_tokens_per_tile": plan.shape.compression.entry_grid**2,
        "flop_per_step": packs * sum(stage.flops for stage in plan.stages),
        "pipeline_bubble": plan.pipeline.bubble,
        "pipeline_imbalance": plan.pipeline.imbalance,
        "memory_per_gpu": plan.fullest.total,
        "layout": layout_name(plan.args),
    }
