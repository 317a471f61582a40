"""The first replay of a step's graph is compared with the step: training goes on as without a graph, or ends.

There are no CUDA graphs on a CPU. The stand-in repeats the recorded schedule on the recorded micro-batches' buffers;
mistakes of the kinds that a recording makes are planted in it. Unlike a graph it computes while it is recorded, and
runs the schedule's Python in each replay. The rest is as in a run: Megatron's loop, its recorder under ours, DDP.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest

from tests import layouts  # isort: skip  (sets Megatron up)
import torch
from megatron.training import get_args, training

from megatron_internvlx.megatron_settings import Execution
from megatron_internvlx.platform.rng import keep_random_state
from megatron_internvlx.precision import Precision
from megatron_internvlx.training import graph, replay
from megatron_internvlx.training.graph import StepGraph
from megatron_internvlx.training.replay import GraphDiffers
from tests.distributed import Pool
from tests.layout_cases import ALWAYS, expand

STEPS, WARM_UP = 5, 2
DROP = "--projector-drop-path 0.3 --vision-drop-path 0.3"
GRAPH = ("static", "--cuda-graph-warmup-steps", str(WARM_UP), "--train-iters", str(STEPS))
BF16 = Precision(True, False, None, "delayed", False, False, "transformer_engine", 1, False)


class Recording:
    """Stand-in of `torch.cuda.CUDAGraph`."""

    current: "Recording | None" = None
    mistake = ""

    def register_generator_state(self, state: Any) -> None:
        """A replay draws from the generators themselves."""

    def keep(self, function: Callable[..., list], given: dict[str, Any]) -> list:
        """The buffers hold the micro-batches of the step before."""
        self.batches = list(given["data_iterator"][0])
        self.set_back = keep_random_state()
        function(**given | {"data_iterator": [iter(self.batches)]})
        if self.mistake == "recorded packs":
            self.batches = copy.deepcopy(self.batches)
        self.function, self.given, self.reports = function, given, []
        return self.reports

    def replay(self) -> None:
        """Results come in the same object each time."""
        if self.mistake == "recorded numbers":
            self.set_back()
        self.reports[:] = self.function(**self.given | {"data_iterator": [iter(self.batches)]})
        if self.mistake == "memory":
            self.given["model"][0].buffers[0].grad_data[3:5] = 7


@contextmanager
def recording(made: Recording, **_: Any) -> Iterator[None]:
    """Stand-in of `torch.cuda.graph`."""
    Recording.current = made
    yield
    Recording.current = None


def recordable() -> Callable[..., list]:
    """Megatron's schedule, which a recording keeps instead of running it."""
    schedule = SCHEDULE()

    def run(**given: Any) -> list:
        return Recording.current.keep(schedule, given) if Recording.current else schedule(**given)

    return run


SCHEDULE = training.get_forward_backward_func


@contextmanager
def stand_ins(mistake: str = "") -> Iterator[list[str]]:
    """Within it steps are recorded by stand-ins, once `graph.record_steps` is called; yields the printed lines."""
    said: list[str] = []
    with ExitStack() as stack:
        for owner, names in {
            torch.cuda: {"CUDAGraph": Recording, "graph": recording, "graph_pool_handle": tuple},
            training: {
                "get_forward_backward_func": lambda **_: recordable(),
                "FullCudaGraphWrapper": training.FullCudaGraphWrapper,
                "train_step": training.train_step,
            },
            graph: {"print_rank_0": said.append},
            Recording: {"mistake": mistake},
        }.items():
            stack.enter_context(mock.patch.multiple(owner, **names))
        try:
            yield said
        finally:
            StepGraph.reset_cuda_graph(mock.Mock())


def recorded(changes: list[str], mistake: str = "", **options: Any) -> dict[str, Any]:
    """`layouts.train` with its steps in a graph; its printed line, or its error, is in "said"."""
    with ExitStack() as stack:
        said = stack.enter_context(stand_ins(mistake))
        if mistake == "other numbers":
            stack.enter_context(mock.patch.object(replay, "keep_random_state", lambda: lambda: None))
        if mistake == "gradients kept":
            stack.enter_context(mock.patch.object(replay, "zero_gradients", lambda model: None))
        graph.record_steps(Execution(None, "full_iteration", deterministic_mode=True), BF16)
        build = layouts.Run

        def in_graph(changes: list[str]) -> layouts.Run:
            run = build(changes)
            get_args().cuda_graph_impl = "full_iteration"  # not before: a CPU has no generators for graphs
            return run

        stack.enter_context(mock.patch.object(layouts, "Run", in_graph))
        try:
            return {**layouts.train(changes, **options), "said": said}
        except GraphDiffers as error:
            return {"said": [str(error)]}


def words(layout: str) -> list[str]:
    static, *more = GRAPH
    return [*ALWAYS.split(), *DROP.split(), *expand(f"{layout} {static}"), *more]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, ""),
        pytest.param(2, "zero overlap", marks=pytest.mark.slow),
        pytest.param(2, "tp=2 sp", marks=pytest.mark.heavy),
    ],
)
def test_training_goes_on_bit_for_bit(pool: Pool, ranks: int, layout: str) -> None:
    """Losses and gradient norms of all steps, drop path included; the extra passes leave nothing behind."""
    keep = ("weights",)
    plain = pool.run(ranks, partial(layouts.train, keep=keep), words(layout))
    found = pool.run(ranks, partial(recorded, keep=keep), words(layout))
    for ours, theirs in zip(found, plain, strict=True):
        assert ours["losses"] == theirs["losses"] and len(ours["losses"]) == STEPS
        assert ours["norms"] == theirs["norms"]
    for name, weight in plain[0]["weights"].items():
        assert torch.equal(found[0]["weights"][name], weight), name
    assert found[0]["said"] == [
        f"CUDA graph of {4 // len(found) if 'zero' in layout else 4} micro-batches recorded; its first replay gives "
        "the losses and gradient norms of the step without it (largest difference 0.0e+00)"
    ]


@pytest.mark.parametrize(
    "mistake", ["recorded packs", "recorded numbers", "other numbers", "gradients kept", "memory"]
)
def test_a_graph_that_computes_something_else_ends_training(pool: Pool, mistake: str) -> None:
    """Packs or random numbers as recorded, other random numbers, gradients of the pass before, memory of others."""
    (found,) = pool.run(1, partial(recorded, mistake=mistake), words(""))
    assert "losses" not in found, found["said"]
    assert "nothing of it is saved. --cuda-graph-impl none trains without it" in found["said"][0]
