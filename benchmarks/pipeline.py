"""Pipeline steps measured against the simulation: planned, uniform and worst splits.

    python -m benchmarks.pipeline            # quick: fewer repetitions
    python -m benchmarks.pipeline --full

Real: two ranks, one core each, the costs from `measure` on one core of this machine. Emulated: four ranks
share two cores, so computing would measure the sharing; there every layer sleeps its cost instead, forward
and backward, and what is tested is the schedule (Megatron's own), the messages and their order, not the costs.
Timed is Megatron's forward_backward_func, without the optimizer; the slowest rank counts.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_internvlx import platform

platform.setup()

from benchmarks.common import ROOT, spread, table, write  # noqa: E402
from benchmarks.step_time import argv as model_arguments  # noqa: E402
from megatron_internvlx.parallel.costs import Cost, LayerCosts  # noqa: E402
from megatron_internvlx.parallel.planner import (  # noqa: E402
    Problem,
    evaluate,
    find_plan,
    layout_string,
    uniform_counts,
)
from megatron_internvlx.parallel.simulate import Schedule  # noqa: E402
from tests.distributed import Pool  # noqa: E402

SIZE = {
    "image": 224, "patch": 14, "vision_hidden": 256, "vision_layers": 4, "vision_heads": 4, "vision_ffn": 1024,
    "hidden": 512, "layers": 8, "heads": 8, "kv_heads": 8, "ffn": 1408, "vocab": 1024, "expand": 4,
}  # fmt: skip
SAMPLES = [(4, 64)]
TOKENIZER = ROOT / "tests" / "golden" / "data" / "tokenizers" / "qwen2_fast"
# Seconds that layers sleep: shallow layers a third of deep ones, an encoder of two deep layers.
SLEEP = {"shallow": 0.02, "deep": 0.06, "expand": 0.08, "first": 0.12, "last": 0.04}


class Nap(torch.autograd.Function):
    """A copy that takes its time in both directions: twice as long backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        """Sleep and hand on."""
        ctx.seconds = seconds
        time.sleep(seconds)
        # Not a view: Megatron's loss works in place on the logits.
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Sleep twice as long."""
        time.sleep(2 * ctx.seconds)
        return gradient, None


def _with_naps(model: list) -> None:
    """Every layer, the encoder and the loss sleep after what little they compute."""
    from megatron.core.utils import unwrap_model

    for stage in unwrap_model(model):
        for layer in stage.language_model.decoder.layers:
            kind = "expand" if layer.injection is not None else "deep" if layer.is_deep else "shallow"
            layer.register_forward_hook(partial(_nap_after, SLEEP[kind]))
        if stage.pre_process:
            stage.vision_model.register_forward_hook(partial(_nap_after, SLEEP["first"]))
        if stage.post_process:
            stage.language_model.output_layer.register_forward_hook(partial(_nap_after, SLEEP["last"]))


def _nap_after(seconds: float, _module: Any, _inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (Nap.apply(output[0], seconds), *output[1:])
    return Nap.apply(output, seconds)


def run(arguments: list[str], micro_batches: list, steps: int, naps: bool) -> list[float]:
    """On a rank: seconds of forward_backward_func, step by step."""
    from benchmarks.trainer import Trainer, training

    trainer = Trainer(arguments, micro_batches)
    if naps:
        _with_naps(trainer.model)
    seconds: list[float] = []
    function = training.get_forward_backward_func()

    def timed(*args: Any, **kwargs: Any) -> Any:
        torch.distributed.barrier()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    for step in range(steps):
        training.train_step(
            trainer.forward_step, trainer.iterator, trainer.model, trainer.optimizer, trainer.scheduler,
            trainer.config, timed, step, pg_collection=trainer.groups, p2p_communicator=trainer.communicator,
        )  # fmt: skip
    # The first two take memory that later ones use again.
    return seconds[2:]


def profile(arguments: list[str]) -> dict[str, tuple[float, float]]:
    """On one rank: seconds of each kind of layer, by the planner's own measurement."""
    from megatron.training.arguments import parse_args
    from megatron.training.global_vars import set_global_variables
    from megatron.training.initialize import initialize_megatron

    from benchmarks.trainer import tokens_of
    from megatron_internvlx import arguments as ours
    from megatron_internvlx.data.plan import build_plan
    from megatron_internvlx.parallel.batch import MicroBatch, device_plan
    from megatron_internvlx.parallel.measure import measure, reduce_to_kinds
    from megatron_internvlx.training.data import plan_settings

    saved, sys.argv = sys.argv, ["profile", *arguments]
    try:
        args = parse_args(ours.add_our_arguments)
    finally:
        sys.argv = saved
    kinds = ["shallow", "expand", "deep"]
    reduce_to_kinds(args, kinds)
    ours.check_arguments(args)
    ours.validate(args)
    set_global_variables(args)
    initialize_megatron()
    settings = plan_settings(args)
    plan = build_plan(*tokens_of(SAMPLES, settings.high_grid**2, args.vocab_size), settings)
    tiles = torch.randint(
        0, 256, (plan.tile_capacity, 3, args.image_size, args.image_size), dtype=torch.uint8
    )
    found = measure(args, MicroBatch(device_plan(plan), tiles), kinds, repeats=15)
    costs = {**found.kinds, "first": found.first, "last": found.last}
    return {name: (cost.forward, cost.backward) for name, cost in costs.items()}


def layer_costs(
    parts: dict[str, tuple[float, float]], layers: int, expand: int, message: float
) -> LayerCosts:
    """Costs of the model from the parts' seconds."""
    kinds = ["shallow" if i < expand else "expand" if i == expand else "deep" for i in range(layers)]
    return LayerCosts(
        tuple(Cost(*parts[kind]) for kind in kinds),
        Cost(*parts["first"]),
        Cost(*parts["last"]),
        (Cost(message, message),) * (layers + 1),
    )


def splits(costs: LayerCosts, schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """Planned, uniform, and the slowest of all splits that give every stage a layer."""
    layers, stages = len(costs.layers), schedule.stages
    inner = np.array(list(itertools.combinations(range(1, layers), stages - 1)))
    ends = np.concatenate([inner, np.full((len(inner), 1), layers)], axis=1)
    slowest = ends[Problem(costs, schedule).seconds(ends).argmax()]
    return {
        "planned": find_plan(costs, schedule).counts,
        "uniform": uniform_counts(layers, stages),
        "worst": tuple(int(n) for n in np.diff(slowest, prepend=0)),
    }


def message(rows: int, repeats: int = 40) -> float:
    """On two ranks: median seconds to move [rows, hidden] floats from one to the other."""
    rank = torch.distributed.get_rank()
    tensor, seconds = torch.zeros(rows, SIZE["hidden"]), []
    for _ in range(repeats):
        start = time.perf_counter()
        for sender in (0, 1):
            if rank == sender:
                torch.distributed.send(tensor, 1 - rank)
            else:
                torch.distributed.recv(tensor, 1 - rank)
        seconds.append((time.perf_counter() - start) / 2)
    return statistics.median(seconds)


def compare(
    pool: Pool,
    costs: LayerCosts,
    schedule: Schedule,
    arguments: list[str],
    rounds: int,
    steps: int,
    naps: bool,
) -> list[list[str]]:
    """Rows: simulated and measured time of every split, rounds interleaved."""
    chosen = splits(costs, schedule)
    micro_batches = [SAMPLES if not naps else [(1, 8)]] * schedule.micro_batches
    measured: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(rounds):
        for name, counts in chosen.items():
            layout = ["--pipeline-model-parallel-size", str(schedule.pipeline)]
            layout += ["--pipeline-model-parallel-layout", layout_string(counts)]
            job = partial(run, [*arguments, *layout], micro_batches, steps, naps)
            ranks = pool.run(schedule.pipeline, job, timeout=500)
            measured[name] += [max(step) for step in zip(*ranks, strict=True)]
    rows = []
    for name, counts in chosen.items():
        simulated = evaluate(costs, schedule, counts)
        median = statistics.median(measured[name])
        rows.append(
            [
                f"{schedule.pipeline} x {schedule.chunks}", name, layout_string(counts), f"{simulated.bubble:.1%}",
                f"{simulated.seconds * 1e3:.0f}", spread(measured[name]), f"{simulated.seconds / median - 1:+.1%}",
            ]
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="more repetitions")
    full = parser.parse_args().full
    rounds, steps = (3, 6) if full else (1, 3)
    head = [
        "PP x VPP",
        "split",
        "layout",
        "simulated bubble",
        "simulated ms",
        "measured ms, median (range)",
        "error",
    ]
    pool = Pool()
    try:
        batches = 8
        real = [*model_arguments(SIZE, "pvtc", 1, TOKENIZER), "--global-batch-size", str(batches)]
        parts = pool.run(1, profile, real)[0]
        # The rows of the deep phase: 16 patches per side, halved. Shallow ones are fewer, and cheaper to send.
        moving = max(pool.run(2, partial(message, sum(tiles * 64 + text for tiles, text in SAMPLES))))
        costs = layer_costs(parts, SIZE["layers"], SIZE["expand"], moving)
        real_rows = compare(pool, costs, Schedule(2, 1, batches), real, rounds, steps, naps=False)
        print("\n".join(table([head, *real_rows])), flush=True)
        tiny = {**SIZE, "image": 56, "vision_hidden": 32, "vision_layers": 1, "vision_ffn": 32, "hidden": 32}
        tiny |= {"layers": 12, "heads": 4, "kv_heads": 4, "ffn": 32, "vocab": 64}
        emulated = [*model_arguments(tiny, "pvtc", 1, TOKENIZER), "--global-batch-size", str(batches)]
        asleep = {name: (seconds, 2 * seconds) for name, seconds in SLEEP.items()}
        sleeping = layer_costs(asleep, tiny["layers"], tiny["expand"], moving)
        emulated_rows = []
        for schedule in (Schedule(4, 1, batches), Schedule(4, 2, batches), Schedule(2, 2, batches)):
            emulated_rows += compare(pool, sleeping, schedule, emulated, min(rounds, 2), 4, naps=True)
            print("\n".join(table([head, *emulated_rows])), flush=True)
    finally:
        pool.close()
    profiled = ", ".join(f"{name} {f * 1e3:.0f}+{b * 1e3:.0f}" for name, (f, b) in parts.items())
    lines = [
        f"{batches} micro-batches; {rounds} interleaved rounds of {steps - 2} steps, emulated {min(rounds, 2)} of 2. "
        f"A message takes {moving * 1e3:.1f} ms (measured alone). Worst: of all splits without an empty "
        "stage.",
        "",
        f"## Real: two ranks, one core each; profile in ms, forward+backward: {profiled}",
        "",
        *table([head, *real_rows]),
        "",
        "## Emulated: layers sleep their cost ("
        + ", ".join(f"{k} {v * 1e3:.0f}" for k, v in SLEEP.items())
        + " ms"
        " forward, twice backward), two cores for all ranks",
        "",
        *table([head, *emulated_rows]),
    ]
    command = f"python -m benchmarks.pipeline{' --full' if full else ''}"
    write(f"pipeline{'' if full else '-quick'}", "Pipeline: measured against simulated", command, lines)


if __name__ == "__main__":
    main()
