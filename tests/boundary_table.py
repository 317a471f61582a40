"""Bytes over every pipeline boundary and direction, measured, against the formula of docs/lvtc.md.

    python -m tests.boundary_table       # writes benchmarks/results/boundary-DATE.md

A small model on gloo ranks: what is sent does not depend on where it runs, and the formula has no free
constant. Messages are also counted at torch.distributed, so that shape messages (int64) would show.
"""

import os
import platform as machine
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo ranks, also where there is a GPU
from tests import layouts  # isort: skip  (sets Megatron up)
import torch
from megatron.training import get_args

from megatron_internvlx.data.plan import SequencePlan
from megatron_internvlx.model.sizes import model_sizes
from megatron_internvlx.parallel.layout import boundary_content
from tests.distributed import Pool
from tests.layout_cases import SETTINGS, Case, Runner, expand

CASES = [
    Case(4, "lvtc", "pp=4"),
    Case(4, "frozen", "pp=4"),
    Case(4, "frozen", "pp=4 static"),
    Case(2, "three", "pp=2 per_stage=2"),
    Case(4, "lvtc", "tp=2 sp pp=2 static"),
]
FLOAT = 4  # bytes


@contextmanager
def counted_sends(sent: Counter) -> Iterator[None]:
    """Counts what torch.distributed is asked to send, by type of element."""
    original = torch.distributed.isend

    def isend(tensor, *args, **kwargs):
        sent[tensor.dtype] += 1
        return original(tensor, *args, **kwargs)

    # Batched operations are compared with the function of the inner module, and call it.
    with (
        mock.patch.object(torch.distributed, "isend", isend),
        mock.patch.object(torch.distributed.distributed_c10d, "isend", isend),
    ):
        yield


def measure(changes: list[str], **options: Any) -> dict[str, Any]:
    """One step on a rank: what its boundaries carried, and the formula's value for each of its plans."""
    sent: Counter = Counter()
    with counted_sends(sent):
        result = layouts.train(changes, **options)
    messages = {"boundary": sent[torch.float32], "shape": sent[torch.int64]}
    return {
        "traffic": result["traffic"], "messages": messages, "formula": expected(get_args(), options["kind"])
    }  # fmt: skip


def formula(plan: SequencePlan, args: Any, next_layer: int, direction: str) -> int:
    """Bytes of one micro-batch over one boundary on one rank; rows and features of its TP share."""
    sizes = model_sizes(args)
    content = boundary_content(next_layer, sizes.injection_layers)
    hidden = args.hidden_size
    elements = (plan.deep if content.deep else plan.shallow).length * hidden
    tiles = args.max_tiles_per_pack if args.boundary == "static" else max(plan.num_tiles, 1)
    if content.carry and not (direction == "backward" and args.freeze_vision):
        features = tiles * sizes.features_per_tile
        # Sent as rows of width h, as many on every TP rank.
        whole = hidden * (args.tensor_model_parallel_size if args.sequence_parallel else 1)
        elements += -(-features // whole) * whole
    return elements * FLOAT // (args.tensor_model_parallel_size if args.sequence_parallel else 1)


def expected(args: Any, kind: str) -> dict[tuple[int, str], int]:
    """Bytes of a step by (boundary, direction), on one TP rank; stages of equally many layers."""
    settings = layouts.synthetic_plan_settings(args)
    plans = [layouts.micro_batch(n, kind, settings).plan for n in range(layouts.MICRO_BATCHES)]
    stages = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    return {
        (b, way): sum(formula(plan, args, (b + 1) * args.num_layers // stages, way) for plan in plans)
        for b in range(stages - 1)
        for way in ("forward", "backward")
    }


def rows(runner: Runner, case: Case) -> Iterator[str]:
    """The table's lines for one configuration."""
    setting = SETTINGS[case.setting]
    job = partial(measure, weights=runner.weights(case.setting), kind=setting.kind)
    results = runner.pool.run(case.ranks, job, [*setting.arguments.split(), *expand(case.layout)])
    for (boundary, way), size in sorted(results[0]["formula"].items()):
        found = [r["traffic"][boundary, way] for r in results if (boundary, way) in r["traffic"]]
        assert {measured for _, measured in found} == {size}, f"{case.name}: {found} is not {size}"
        yield f"| {case.name} | {boundary} | {way} | {found[0][0]} | {found[0][1]} | {size} | |"
    sent = sum(r["messages"]["boundary"] for r in results)
    received = sum(messages for r in results for messages, _ in r["traffic"].values())
    assert sent == received, f"{sent} messages sent, {received} received"
    shapes = sum(r["messages"]["shape"] for r in results)
    assert shapes == 0, f"{shapes} shape messages"
    yield f"| {case.name} | all ranks | both | {sent} | | | {shapes} |"


def report(runner: Runner) -> Iterator[str]:
    """The file, line by line."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    yield f"# Bytes between pipeline stages, {date.today()}"
    yield ""
    yield (
        f"`python -m tests.boundary_table`, commit {commit}, torch {torch.__version__}, "
        f"megatron-core {version('megatron-core')}, {machine.machine()} CPU, gloo."
    )
    yield ""
    yield (
        "One step of four micro-batches, fp32, per TP rank; 8 layers, h = 32, c and P of the tiny encoder. "
        "Boundary b follows virtual stage b. Settings and layout words: docs/layouts.md. Measured equals the "
        "formula to the byte, or the benchmark stops."
    )
    yield ""
    yield "| configuration (ranks) | boundary | direction | messages | bytes | formula | shape messages |"
    yield "|---|---|---|---|---|---|---|"
    for case in CASES:
        yield from rows(runner, case)


def main() -> None:
    """Run all configurations and write the table."""
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool()
        try:
            lines = list(report(Runner(pool, Path(folder))))
        finally:
            pool.close()
    target = Path(__file__).parents[1] / "benchmarks" / "results" / f"boundary-{date.today()}.md"
    target.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
