"""A number that is not finite ends a run with a graph, from the entry script to its files: no checkpoint has it.

There are no CUDA graphs on a CPU: the step runs with the stand-ins of `test_first_replay`. All else is the run's own,
Megatron's optimizer and saves included.
"""

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests import entry  # isort: skip  (sets Megatron up)
import torch
from megatron.training import get_args, training

from megatron_internvlx import files
from megatron_internvlx.lifecycle import resume
from megatron_internvlx.megatron_settings import Execution
from megatron_internvlx.precision import Precision
from megatron_internvlx.training import graph
from megatron_internvlx.training.graph import StepGraph
from tests.distributed import Pool, RankError
from tests.parallel.test_first_replay import stand_ins
from tools import make_demo_data

# The first step has no graph, the second records it; the bad number is met in a replay.
BAD = 3

ARGUMENTS = (
    "--recipe examples/demo/demo.yaml --pipeline-model-parallel-size 1 --loader-workers 0 --log-interval 1 "
    f"--train-iters {BAD + 1} --lr-decay-iters {BAD + 1} --lr-warmup-fraction 0 --save-interval 1 --auto-resume "
    "--micro-batch-size 1 --global-batch-size 2 --boundary static --max-tiles 2 --max-tiles-per-pack 3 "
    # As the checks set it for a graph.
    "--shallow-seq-length 128 --cuda-graph-warmup-steps 1 --no-check-for-nan-in-loss-and-grad"
).split()


def bad_weight(weight: torch.nn.Parameter) -> None:
    """One element."""
    weight.data.view(-1)[0] = torch.nan


def bad_gradient(weight: torch.nn.Parameter) -> None:
    """The step's loss stays finite."""
    weight.register_hook(lambda gradient: gradient + torch.inf)


PLANTED: dict[str, Callable[[torch.nn.Parameter], None]] = {"loss": bad_weight, "gradient norm": bad_gradient}


def run(arguments: list[str], bad: str) -> None:
    """Train with a graph; one weight gets a bad number just before step BAD."""
    record, train, call = graph.record_steps, training.train, StepGraph.__call__
    steps: list[int] = []

    def record_steps(execution: Execution, precision: Precision) -> None:
        record(replace(execution, cuda_graph_impl="full_iteration"), precision)

    def in_graph(*args: Any, **kwargs: Any) -> Any:
        get_args().cuda_graph_impl = "full_iteration"  # not before: a CPU has no generators for graphs
        return train(*args, **kwargs)

    def planted(self: StepGraph, *args: Any, **kwargs: Any) -> Any:
        steps.append(len(steps) + 1)
        if steps[-1] == BAD:
            PLANTED[bad](next(kwargs["model"][0].parameters()))
        return call(self, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(stand_ins())
        for owner, name, function in (
            (graph, "record_steps", record_steps),
            (training, "train", in_graph),
            (StepGraph, "__call__", planted),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        entry.run(arguments)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    assert make_demo_data.main(["--out", str(folder), "--train", "16", "--val", "4"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("bad", PLANTED)
def test_a_bad_number_ends_the_run_before_its_checkpoint(
    pool: Pool, demo: Path, tmp_path: Path, bad: str
) -> None:
    """The run's state names the step and what is bad; the newest checkpoint is the one before."""
    data = ("--data", str(demo / "meta.json"), "--tokenizer-model", str(demo / "tokenizer"))
    told = rf"BadNumbers: step {BAD}: {bad} (nan|inf).*; nothing of this step is saved"
    with pytest.raises(RankError, match=told):
        pool.run(1, partial(run, bad=bad), [*ARGUMENTS, *data, "--save", str(tmp_path)])
    state = resume.RunState.read(tmp_path)
    assert state.status == "failed" and re.search(told, state.reason)
    assert sorted(files.iterations(tmp_path)) == [1, 2]
    assert (tmp_path / files.TRACKER).read_text() == str(BAD - 1)
    assert all(resume.fault(files.checkpoint_directory(tmp_path, step)) is None for step in (1, 2))
