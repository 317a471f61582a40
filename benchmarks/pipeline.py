"""Pipeline steps measured against the simulation: planned, uniform and worst splits.

    python -m benchmarks.pipeline            # quick: fewer repetitions
    python -m benchmarks.pipeline --full

Real: two ranks, one core each. Each round measures the layers' costs anew, on both ranks at the same time since
they share caches and memory in the steps too, simulates every split with them, and times the splits; an error
compares the two within its round. Emulated: four ranks share two cores, so computing would measure the
sharing; there every layer sleeps its cost instead, forward and backward, and what is tested is the schedule
(Megatron's own), the messages and their order, not the costs.
Timed is Megatron's forward_backward_func, without the optimizer; the slowest rank counts.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Two and four ranks of gloo, also where there is a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
from megatron_internvlx import platform

platform.setup()

from benchmarks.common import ROOT, ratio, spread, table, write  # noqa: E402
from benchmarks.step_time import argv as model_arguments  # noqa: E402
from megatron_internvlx.planning.costs import Cost, LayerCosts  # noqa: E402
from megatron_internvlx.planning.search import (  # noqa: E402
    Problem,
    evaluate,
    find_plan,
    layout_string,
    uniform_counts,
)
from megatron_internvlx.planning.simulate import Schedule  # noqa: E402
from testing.rank_pool import Pool  # noqa: E402

SIZE = {
    "image": 224, "patch": 14, "vision_hidden": 256, "vision_layers": 4, "vision_heads": 4, "vision_ffn": 1024,
    "hidden": 512, "layers": 8, "heads": 8, "kv_heads": 8, "ffn": 1408, "vocab": 1024, "expand": 2,
}  # fmt: skip
SAMPLES = [(4, 64)]
TOKENIZER = ROOT / "tests" / "golden" / "data" / "tokenizers" / "qwen2_fast"
# Seconds that layers sleep: shallow layers a third of deep ones, an encoder of two deep layers.
SLEEP = {"shallow": 0.02, "deep": 0.06, "expand": 0.08, "first": 0.12, "last": 0.04}
BATCHES = 8  # micro-batches per step
HEAD = [
    "PP x VPP", "split", "layout", "simulated bubble", "simulated ms, median (range)",
    "measured ms, median (range)", "error", "of the planned, simulated", "measured",
]  # fmt: skip
ERROR = HEAD.index("error")


class Pace:
    """A module takes `seconds` forward and twice that backward, what it computes included."""

    def __init__(self, module: torch.nn.Module, seconds: float) -> None:
        self.seconds = seconds
        self.pass_: dict[str, float] = {}
        module.register_forward_pre_hook(self._enter, with_kwargs=True)
        module.register_forward_hook(self._leave)

    def _enter(self, _module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # One record per pass: other forward passes come between this one and its backward pass.
        self.pass_ = {"forward": time.perf_counter(), "for": 2 * self.seconds}
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": Entry.apply(kwargs["hidden_states"], self.pass_)}
        return (Entry.apply(args[0], self.pass_), *args[1:]), kwargs

    def _leave(self, _module: Any, _inputs: Any, output: Any) -> Any:
        wait_until(self.pass_["forward"] + self.seconds)
        first, *rest = output if isinstance(output, tuple) else (output,)
        first = Exit.apply(first, self.pass_)
        return (first, *rest) if isinstance(output, tuple) else first


def wait_until(moment: float) -> None:
    """Sleep until the performance counter shows this."""
    time.sleep(max(moment - time.perf_counter(), 0))


class Entry(torch.autograd.Function):
    """Where a module's forward pass begins and its backward pass ends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pass_: dict[str, float]) -> Tensor:
        """Hand on."""
        ctx.pass_, pass_["learns"] = pass_, ctx.needs_input_grad[0]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Sleep what is left of the backward pass."""
        wait_until(ctx.pass_["backward"] + ctx.pass_["for"])
        return gradient, None


class Exit(torch.autograd.Function):
    """Where a module's forward pass ends and its backward pass begins."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pass_: dict[str, float]) -> Tensor:
        """Hand on a copy: Megatron's loss works in place on the logits."""
        ctx.pass_ = pass_
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Note the time. Pixels have no gradient, so their Entry sees no backward pass: sleep here instead."""
        ctx.pass_["backward"] = time.perf_counter()
        if not ctx.pass_["learns"]:
            time.sleep(ctx.pass_["for"])
        return gradient, None


def _pace(model: list) -> None:
    """Give every layer, the encoder and the loss their time."""
    from megatron.core.utils import unwrap_model

    for stage in unwrap_model(model):
        for layer in stage.language_model.decoder.layers:
            kind = "expand" if layer.injection is not None else "deep" if layer.is_deep else "shallow"
            Pace(layer, SLEEP[kind])
        if stage.pre_process:
            Pace(stage.vision_model, SLEEP["first"])
        if stage.post_process:
            Pace(stage.language_model.output_layer, SLEEP["last"])


def run(arguments: list[str], micro_batches: list, steps: int, paced: bool) -> list[float]:
    """On a rank: seconds of forward_backward_func, step by step."""
    from benchmarks.trainer import Trainer, training

    trainer = Trainer(arguments, micro_batches)
    if paced:
        _pace(trainer.model)
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
    # The first takes memory that later ones use again.
    return seconds[1:]


def profile(arguments: list[str]) -> dict[str, tuple[float, float]]:
    """On one rank: seconds of each kind of layer, by the planner's own measurement."""
    from megatron.training.arguments import parse_args
    from megatron.training.global_vars import set_global_variables
    from megatron.training.initialize import initialize_megatron

    from benchmarks.trainer import tokens_of
    from megatron_internvlx import arguments as ours
    from megatron_internvlx.data.plan import build_plan
    from megatron_internvlx.parallel.batch import MicroBatch
    from megatron_internvlx.parallel.device_plan import device_plan
    from megatron_internvlx.planning.measure import measure, reduce_to_kinds
    from megatron_internvlx.training.provider import plan_settings

    saved, sys.argv = sys.argv, ["profile", *arguments]
    try:
        args = parse_args(ours.add_our_arguments)
    finally:
        sys.argv = saved
    kinds = ["shallow", "expand", "deep"]
    args = reduce_to_kinds(args, kinds)
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
    rounds: Iterable[LayerCosts],
    schedule: Schedule,
    arguments: list[str],
    steps: int,
    paced: bool,
) -> list[list[str]]:
    """Rows: simulated and measured time of every split; `rounds` gives each round's costs when it begins.

    The first round of the real model is not counted: memory that a process takes for the first time costs it some
    5 % of a step.
    """
    micro_batches = [SAMPLES if not paced else [(1, 8)]] * schedule.micro_batches
    chosen: dict[str, tuple[int, ...]] = {}
    simulated: dict[str, list[float]] = defaultdict(list)
    bubbles: dict[str, list[float]] = defaultdict(list)
    measured: dict[str, list[float]] = defaultdict(list)
    for costs in rounds:
        chosen = chosen or splits(costs, schedule)
        for name, counts in chosen.items():
            layout = ["--pipeline-model-parallel-size", str(schedule.pipeline)]
            layout += ["--pipeline-model-parallel-layout", layout_string(counts)]
            job = partial(run, [*arguments, *layout], micro_batches, steps, paced)
            ranks = pool.run(schedule.pipeline, job, timeout=500)
            measured[name].append(statistics.median(max(step) for step in zip(*ranks, strict=True)))
            found = evaluate(costs, schedule, counts)
            simulated[name].append(found.seconds)
            bubbles[name].append(found.bubble)
    rows = []
    for name, counts in chosen.items():
        if not paced and len(measured[name]) > 1:
            del measured[name][0], simulated[name][0], bubbles[name][0]
        errors = [s / m - 1 for s, m in zip(simulated[name], measured[name], strict=True)]
        rows.append(
            [
                f"{schedule.pipeline} x {schedule.chunks}", name, layout_string(counts),
                f"{statistics.median(bubbles[name]):.1%}", spread(simulated[name]), spread(measured[name]),
                f"{statistics.median(errors):+.1%} ({min(errors):+.1%} to {max(errors):+.1%})",
                f"{ratio(simulated[name], simulated['planned']):.2f}",
                f"{ratio(measured[name], measured['planned']):.2f}",
            ]
        )  # fmt: skip
    return rows


def measured_costs(pool: Pool, arguments: list[str], message: float, rounds: int) -> Iterator[LayerCosts]:
    """Costs of the real model, measured when they are asked for."""
    for _ in range(rounds):
        ranks = pool.run(2, partial(profile, arguments), timeout=500)
        parts = {
            name: tuple(statistics.mean(rank[name][way] for rank in ranks) for way in (0, 1))
            for name in ranks[0]
        }
        print(", ".join(f"{name} {f * 1e3:.0f}+{b * 1e3:.0f}" for name, (f, b) in parts.items()), flush=True)
        yield layer_costs(parts, SIZE["layers"], SIZE["expand"], message)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="more repetitions")
    full = parser.parse_args().full
    rounds, steps = (6, 3) if full else (1, 2)
    pool = Pool()
    try:
        real = [*model_arguments(SIZE, "pvtc", 1, TOKENIZER), "--global-batch-size", str(BATCHES)]
        # The rows of the deep phase: 16 patches per side, halved. Before the expansion there are fewer, with the
        # encoder's output beside them: up to twice the bytes, and still a thousandth of a layer's time.
        moving = max(pool.run(2, partial(message, sum(tiles * 64 + text for tiles, text in SAMPLES))))
        costs = measured_costs(pool, real, moving, rounds)
        real_rows = compare(pool, costs, Schedule(2, 1, BATCHES), real, steps, paced=False)
        print("\n".join(table([HEAD, *real_rows])), flush=True)
        tiny = {**SIZE, "image": 56, "vision_hidden": 32, "vision_layers": 1, "vision_ffn": 32, "hidden": 32}
        tiny |= {"layers": 12, "expand": 4, "heads": 4, "kv_heads": 4, "ffn": 32, "vocab": 64}
        emulated = [*model_arguments(tiny, "pvtc", 1, TOKENIZER), "--global-batch-size", str(BATCHES)]
        asleep = {name: (seconds, 2 * seconds) for name, seconds in SLEEP.items()}
        sleeping = [layer_costs(asleep, tiny["layers"], tiny["expand"], moving)] * min(rounds, 2)
        emulated_rows = []
        for schedule in (Schedule(4, 1, BATCHES), Schedule(4, 2, BATCHES), Schedule(2, 2, BATCHES)):
            emulated_rows += compare(pool, sleeping, schedule, emulated, steps, paced=True)
            print("\n".join(table([HEAD, *emulated_rows])), flush=True)
    finally:
        pool.close()
    lines = [
        f"{BATCHES} micro-batches per step. {rounds} rounds (of several the first is not counted), emulated "
        f"{min(rounds, 2)}, in which the splits take turns; a time is the median of {steps - 1} steps. "
        f"A message takes {moving * 1e3:.1f} ms (measured alone). Worst: of all splits without an empty stage. "
        "Error: simulated over measured, less 1, median and range of the rounds.",
        "",
        "## Real: two ranks, one core each",
        "",
        *table([HEAD, *real_rows]),
        "",
        "## Emulated: layers take "
        + ", ".join(f"{k} {v * 1e3:.0f}" for k, v in SLEEP.items())
        + " ms forward, twice backward, asleep; two cores for all ranks",
        "",
        *table([HEAD, *emulated_rows]),
    ]
    command = f"python -m benchmarks.pipeline{' --full' if full else ''}"
    worst = max(abs(float(row[ERROR].split("%")[0])) for row in [*real_rows, *emulated_rows])
    lines += ["", f"Largest median error: {worst:.1f} %; 10 % are allowed."]
    write(f"pipeline{'' if full else '-quick'}", "Pipeline: measured against simulated", command, lines)
    # One round of one step, as in the quick form, is too noisy to judge by.
    sys.exit(full and worst > 10)


if __name__ == "__main__":
    main()
