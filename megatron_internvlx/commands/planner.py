"""Implementation of `plan.py`, separate because Megatron must be set up before these imports."""

from __future__ import annotations

import argparse
import datetime
import os
from dataclasses import replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import parse_args
from megatron.training.global_vars import set_global_variables

from megatron_internvlx import arguments, platform
from megatron_internvlx.arguments import add_our_arguments
from megatron_internvlx.config import RunSettings, TrainSettings, VisionSettings, settings_from
from megatron_internvlx.megatron_settings import Parallelism
from megatron_internvlx.model.sizes import ModelSizes, model_sizes
from megatron_internvlx.planning import costs as cost
from megatron_internvlx.planning.activations import MemoryModel
from megatron_internvlx.planning.dryrun import GIB, RESERVE_GIB, text_table
from megatron_internvlx.planning.measure import (
    layer_kinds,
    reduce_to_kinds,
    synthetic_batch,
    with_recomputation,
)
from megatron_internvlx.planning.propose import layouts, propose_expansions, propose_parallelism
from megatron_internvlx.planning.search import PipelinePlan, evaluate, find_plan, uniform_counts
from megatron_internvlx.planning.simulate import Schedule
from megatron_internvlx.planning.timeline import draw_timeline
from megatron_internvlx.planning.workload import Workload
from megatron_internvlx.precision import Precision
from megatron_internvlx.ranks import is_first_rank

NVLINK = 300e9  # sustained bytes per second and GPU of a tensor-parallel all-gather, assumed for H100


def fill_unused_arguments(args: argparse.Namespace) -> None:
    """Set missing arguments that only the optimizer and the loader need, because nothing is trained."""
    given = vars(args)
    if given["lr"] is None:
        given["lr"] = max(given["min_lr"], given["lr_warmup_init"], 1e-3)
    given["train_iters"] = given["train_iters"] or (None if given["train_samples"] else 1_000_000)
    for name in ("data", "tokenizer_model"):
        given[name] = given[name] or "none"


class Task:
    """Planning task: a run's arguments as model shape, workload, machine and schedule."""

    def __init__(self, options: argparse.Namespace) -> None:
        args = arguments.parse(fill_unused_arguments)
        self.options, self.run = options, settings_from(args, RunSettings)
        self.preset = settings_from(args, TrainSettings).model_preset
        self.world_size = settings_from(args, Parallelism).world_size
        self.model, self.work = MemoryModel.from_args(args), Workload.from_args(args)
        self.sizes, self.layout = self.model.sizes, self.model.layout
        self.stats = self.work.full_micro_batch(self.sizes)
        assumed = cost.Machine.assumed(fp8=bool(settings_from(args, Precision).fp8), local=self.model.local)
        self.machine = cost.Machine(
            options.tflops * 1e12 if options.tflops else assumed.flops,
            options.bandwidth * 1e9 if options.bandwidth else assumed.bandwidth,
            options.latency * 1e-6 if options.latency is not None else assumed.latency,
        )
        self.schedule = self._schedule()

    def _schedule(self) -> Schedule:
        options, layout = self.options, self.layout
        pipeline, given = options.pipeline or layout.pipeline, len(layout.stages[0])
        chunks = options.virtual or (given if pipeline == layout.pipeline else 1)
        world, ranks = self.world_size, layout.tensor * pipeline
        if world % ranks and options.micro_batches is None:
            raise ValueError(
                f"{world} GPUs cannot be divided into TP {layout.tensor} x PP {pipeline}: use another "
                "--pipeline, or set --micro-batches"
            )
        batches = options.micro_batches or max(self.work.packs // max(world // ranks, 1), 1)
        return Schedule(pipeline, chunks, batches, layout.overlap or chunks != given)

    def costs(self, sizes: ModelSizes | None = None, tensor: int | None = None) -> cost.LayerCosts:
        """Costs of the layers, from the profile if one is given, else from FLOPs."""
        sizes, settings = sizes or self.sizes, self.model.backward
        if settings.full_layers:
            settings = replace(settings, full_layers=frozenset(range(sizes.layers)))
        # Rows do not depend on the position of the expansion, so the micro-batch is the same for any model.
        counted = cost.costs_from_flops(
            sizes,
            self.stats,
            settings,
            self.machine,
            tensor_parallel=tensor or self.layout.tensor,
            sequence_parallel=self.layout.sequence_parallel,
        )
        if not self.options.profile:
            return counted
        profile = with_recomputation(cost.Profile.load(self.options.profile), bool(settings.full_layers))
        return cost.costs_from_profile(profile, sizes, counted.boundaries)

    def memory(
        self, tensor: int, pipeline: int, data: int, sizes: ModelSizes | None = None
    ) -> cost.StageMemory:
        """Memory per layer and limit of a GPU, in bytes."""
        limit = self.run.gpu_memory_gib
        layout = replace(self.layout, tensor=tensor, pipeline=pipeline, data=data, expert_data=data)
        model = replace(self.model, sizes=sizes or self.sizes, layout=layout)
        return cost.stage_memory(model, self.stats, (limit - RESERVE_GIB) * GIB if limit else float("inf"))

    def communication(self, tensor: int) -> float:
        """Seconds of tensor-parallel communication per micro-batch, not overlapped: 8 transfers of a layer's rows."""
        if tensor == 1:
            return 0.0
        rows = sum(self.model.rows(layer, self.stats) for layer in range(self.sizes.layers))
        moves = 8 + 4 * bool(self.model.backward.full_layers)
        return moves * rows * self.sizes.hidden * 2 * (tensor - 1) / tensor / NVLINK


def plan(options: argparse.Namespace) -> None:
    """Find the best split and print it with a comparison. Raises ValueError."""
    task = Task(options)
    schedule, tensor = task.schedule, task.layout.tensor
    data = max(task.world_size // (tensor * schedule.pipeline), 1)
    memory = task.memory(tensor, schedule.pipeline, data)
    costs = task.costs()
    best = find_plan(costs, schedule, memory)
    plans = {"planned": best}
    given = _requested_split(task)
    if given and given != best.counts:
        plans["as given"] = evaluate(costs, schedule, given, memory)
    uniform = uniform_counts(task.sizes.layers, schedule.stages)
    plans["uniform"] = evaluate(costs, schedule, uniform, memory)
    print("\n".join(_head(task, costs)), end="\n\n")
    print("\n".join(_stages(best, costs)), end="\n\n")
    print("\n".join(_comparison(plans)), end="\n\n")
    one = "one stage: no --pipeline-model-parallel-layout is needed"
    print(f"--pipeline-model-parallel-layout '{best.layout}'" if schedule.stages > 1 else one)
    if not best.proven:
        print("(the search was stopped early, so a slightly better split may exist)")
    if options.timeline:
        draw_timeline(plans, options.timeline)
        print(f"timeline: {options.timeline}")
    if options.expansions:
        print("\n" + "\n".join(_expansions(task)))
    if options.gpus:
        print("\n" + "\n".join(_parallelism(task)))


def _requested_split(task: Task) -> tuple[int, ...] | None:
    """Split of the arguments, or None if it has other stages than the plan."""
    layout, schedule = task.layout, task.schedule
    same = layout.pipeline == schedule.pipeline and len(layout.stages[0]) == schedule.chunks
    return layout.counts if same else None


def _head(task: Task, costs: cost.LayerCosts) -> list[str]:
    stats, machine = task.stats, task.machine
    flops = f"FLOPs at {machine.flops / 1e12:g} TFLOP/s per GPU"
    source = f"measured, {task.options.profile}" if task.options.profile else flops
    sizes, schedule = task.sizes, task.schedule
    link = f"{machine.bandwidth / 1e9:g} GB/s and {machine.latency * 1e6:g} us per message"
    return [
        f"model        {task.preset or ''} {sizes.layers} layers, expansion at layer "
        f"{sizes.shallow_layers or '-'}, injections {list(sizes.injection_layers)}",
        f"micro-batch  {stats.projected_tiles} tiles, {stats.shallow_rows:,} shallow and "
        f"{stats.deep_rows:,} deep rows",
        f"schedule     TP {task.layout.tensor}, PP {schedule.pipeline}, VPP {schedule.chunks}, "
        f"{schedule.micro_batches} micro-batches",
        f"costs        {source}; {link}",
        f"             vision and entry {_ms(costs.first)} ms, layer 0 {_ms(costs.layers[0])} ms, "
        f"last layer {_ms(costs.layers[-1])} ms, loss {_ms(costs.last)} ms (forward + backward)",
    ]


def _ms(one: cost.Cost) -> str:
    return f"{one.forward * 1e3:.2f} + {one.backward * 1e3:.2f}"


def _stages(best: PipelinePlan, costs: cost.LayerCosts) -> list[str]:
    pipeline = best.schedule.pipeline
    rows = [["rank", "layers", "work ms", "of mean", "memory GiB"]]
    ends = [sum(best.counts[: i + 1]) for i in range(len(best.counts))]
    mean = sum(best.rank_seconds) / pipeline
    for rank in range(pipeline):
        spans = [
            f"{ends[s] - best.counts[s]}-{ends[s] - 1}" if best.counts[s] else "-"
            for s in range(rank, len(ends), pipeline)
        ]
        work = best.rank_seconds[rank]
        memory = f"{best.memory[rank] / GIB:.1f}" if best.memory else "-"
        rows.append([str(rank), " + ".join(spans), f"{work * 1e3:.1f}", f"{work / mean:.2f}", memory])
    return text_table(rows)


def _comparison(plans: dict[str, PipelinePlan]) -> list[str]:
    rows = [["split", "step ms", "bubble", "imbalance", "fullest GiB", "layers per stage"]]
    for name, one in plans.items():
        memory = f"{max(one.memory) / GIB:.1f}" if one.memory else "-"
        cells = [f"{one.seconds * 1e3:.1f}", f"{one.bubble:.1%}", f"{one.imbalance:.1%}", memory]
        rows.append([name, *cells, " ".join(map(str, one.counts))])
    return text_table(rows)


def _expansions(task: Task) -> list[str]:
    tensor, pipeline = task.layout.tensor, task.schedule.pipeline
    data = max(task.world_size // (tensor * pipeline), 1)
    found = propose_expansions(
        task.sizes,
        task.schedule,
        task.costs,
        memory=lambda sizes: task.memory(tensor, pipeline, data, sizes),
    )
    rows = [["expansion at", "work", "step ms", "bubble", "imbalance", "layout", ""]]
    for one in found[:8]:
        cells = [f"{one.work:.2f}x", f"{one.plan.seconds * 1e3:.1f}", f"{one.plan.bubble:.1%}"]
        rows.append([str(one.layer), *cells, f"{one.plan.imbalance:.1%}", one.plan.layout, one.mark])
    return ["where the expansion balances best:", *text_table(rows)]


def _parallelism(task: Task) -> list[str]:
    options, packs = task.options, task.work.packs
    if options.profile:
        raise ValueError(
            "--gpus compares tensor-parallel sizes, but a profile is for one size: remove --profile"
        )
    if task.sizes.experts:
        raise ValueError("--gpus does not place experts; use --pipeline for a given layout")
    found = propose_parallelism(
        task.sizes,
        layouts(task.sizes, options.gpus, options.gpus_per_node, packs),
        packs,
        lambda tensor: task.costs(tensor=tensor),
        task.memory,
        task.communication,
    )
    if not found:
        return [f"no layout of {options.gpus} GPUs fits the model into {task.run.gpu_memory_gib} GiB"]
    rows = [["TP", "PP", "VPP", "DP", "micro-batches", "step ms", "bubble", "fullest GiB", ""]]
    for one in found[:8]:
        memory = max(one.plan.memory or (0,)) / GIB
        sizes = [str(x) for x in (one.tensor, one.pipeline, one.chunks, one.data, one.micro_batches)]
        rows.append([*sizes, f"{one.seconds * 1e3:.0f}", f"{one.plan.bubble:.1%}", f"{memory:.1f}", one.mark])
    return [f"for {options.gpus} GPUs, fastest first:", *text_table(rows)]


def measure(options: argparse.Namespace) -> None:
    """Measure one layer of each kind on this machine, and write the profile. Raises ValueError."""
    from megatron.training.initialize import initialize_megatron

    from megatron_internvlx.planning.measure import measure as measure_layers
    from megatron_internvlx.training.provider import plan_settings

    platform.quiet_prints()
    args = parse_args(add_our_arguments)
    fill_unused_arguments(args)
    given = vars(args)
    given["max_position_embeddings"] = given["max_position_embeddings"] or given["seq_length"]
    given["padded_vocab_size"] = None
    whole = model_sizes(args)
    stats = Workload.from_args(args).full_micro_batch(whole)
    kinds = layer_kinds(whole)
    args = reduce_to_kinds(args, kinds)
    arguments.check_arguments(args)
    arguments.validate(args)
    set_global_variables(args)
    grouped = torch.distributed.is_initialized()
    if not grouped and "MASTER_ADDR" not in os.environ:  # one process, without torchrun
        torch.distributed.init_process_group(
            platform.backend(), store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    initialize_megatron()
    tensor = ProcessGroupCollection.use_mpu_process_groups().tp.size()
    batch = synthetic_batch(
        stats,
        plan_settings(args),
        image_size=settings_from(args, VisionSettings).image_size,
        tile_ranks=tensor,
    )
    profile = measure_layers(args, batch, kinds, options.repeats)
    about = {
        "model": settings_from(args, TrainSettings).model_preset,
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "tensor_parallel": tensor,
        "micro_batch": vars(stats),
    }
    if is_first_rank():
        replace(profile, about=about).save(options.measure)
        print(f"profile: {options.measure}")
    if not grouped:
        torch.distributed.destroy_process_group()
