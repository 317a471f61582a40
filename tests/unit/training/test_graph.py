"""What surrounds the recording of a step: kept buffers, counting, and the check of every step's numbers."""

import math
import os
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
import torch

from tests.unit.parallel.plans import plan  # isort: skip  (sets Megatron up)
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import training

from megatron_internvlx.megatron_settings import Execution
from megatron_internvlx.parallel.batch import MicroBatch
from megatron_internvlx.parallel.boundary import Budget
from megatron_internvlx.precision import Precision
from megatron_internvlx.training import graph as graph_module
from megatron_internvlx.training.graph import (
    BadNumbers,
    BatchBuffers,
    StepGraph,
    record_steps,
    release_graph,
    stop_at_bad_numbers,
)
from megatron_internvlx.training.replay import FirstReplay
from megatron_internvlx.training.step import ForwardStep
from tests.single import single

BUDGET = Budget(20, 40, 3)
PRECISION = Precision(True, False, None, "delayed", False, False, "transformer_engine", 1, False)


def batch(*tiles: int) -> MicroBatch:
    """A micro-batch of samples with so many tiles."""
    return MicroBatch(plan(tiles, BUDGET), torch.full((3, 1), sum(tiles), dtype=torch.uint8))


def test_buffers_stay_and_contents_change() -> None:
    """The n-th micro-batch of every step is at the same place."""
    kept = BatchBuffers()
    kept.fill([batch(1), batch(2, 1)])
    places = [part.data_ptr() for kept_one in kept.batches for part in (kept_one.plan.flat, kept_one.tiles)]
    incoming = [batch(0), batch(1, 1)]
    kept.fill(incoming)
    assert [part.data_ptr() for one in kept.batches for part in (one.plan.flat, one.tiles)] == places
    for ours, theirs in zip(kept.batches, incoming, strict=True):
        assert torch.equal(ours.plan.flat, theirs.plan.flat) and torch.equal(ours.tiles, theirs.tiles)
        assert torch.equal(ours.plan.deep.cu_seqlens, theirs.plan.deep.cu_seqlens)
        assert ours.plan.host is None


def test_a_buffer_is_of_static_plans() -> None:
    with pytest.raises(AssertionError, match="without static boundaries differ"):
        MicroBatch(plan((1,)), None).clone()


def test_evaluation_is_not_recorded() -> None:
    """Its iterator goes to the schedule as it is; in training the buffers do, and count when they are filled."""
    seen: list[object] = []
    step = ForwardStep()

    def schedule(**given: object) -> None:
        seen.append(given["data_iterator"])
        if isinstance(given["data_iterator"], list):
            step.next_batch(iter(graph.buffers.batches), counted=True)  # of a buffer: not once more

    graph = StepGraph(schedule, cuda_graph_warmup_steps=9)
    data = iter([batch(1), batch(2, 1), batch(3)])
    common = {"model": [None], "seq_length": 1, "forward_step_func": step}
    graph(data_iterator=data, forward_only=True, num_microbatches=2, **common)
    assert seen == [data] and step.take().tiles == 0
    graph(data_iterator=data, forward_only=False, num_microbatches=2, **common)
    assert isinstance(seen[1], list) and next(seen[1][0]) is graph.buffers.batches[0]
    assert step.take().tiles == 1 + 3
    assert next(data).plan.host.num_tiles == 3  # two of them were taken
    graph.reset_cuda_graph()


def test_a_graph_that_is_not_compared_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """With FP8's delayed scales it is recorded from the step's own micro-batches, in one pass."""
    said, passes = [], []
    monkeypatch.setattr(StepGraph, "first_replay", FirstReplay(skipped="because"))
    monkeypatch.setattr(graph_module, "print_rank_0", said.append)
    monkeypatch.setattr(
        FullCudaGraphWrapper, "__call__", lambda self, **given: passes.append(given) or "reports"
    )
    graph = StepGraph(None, cuda_graph_warmup_steps=0)
    graph.buffers.fill([batch(2)])
    given = {"data_iterator": iter([batch(1)]), "forward_only": False, "num_microbatches": 1, "model": []}
    assert graph(**given, forward_step_func=ForwardStep()) == "reports"
    assert len(passes) == len(graph.buffers.batches) == 1
    assert said == ["CUDA graph of 1 micro-batches recorded; not compared with steps without it: because"]


def test_an_error_of_the_recording_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, **given: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(StepGraph, "first_replay", FirstReplay(skipped="because"))
    monkeypatch.setattr(FullCudaGraphWrapper, "__call__", broken)
    given = {"data_iterator": iter([batch(1)]), "forward_only": False, "num_microbatches": 1, "model": []}
    graph = StepGraph(None, cuda_graph_warmup_steps=0)
    graph.buffers.fill([batch(2)])
    with pytest.raises(RuntimeError, match="illegal memory") as error:
        graph(**given, forward_step_func=ForwardStep())
    assert error.value.__notes__ == [
        "while a CUDA graph of the step was recorded and replayed; --cuda-graph-impl none trains without it"
    ]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_bad_numbers_end_training_at_once(loss: float, norm: float) -> None:
    """The step is named, and what of it is bad; nothing after it runs, a save least of all."""
    step = stop_at_bad_numbers(lambda **_: ({"loss": torch.tensor(loss)}, 0, False, False, 0, norm, 0, 0))
    bad = "loss" if not math.isfinite(loss) else "gradient norm"
    with pytest.raises(BadNumbers, match=rf"step 12: {bad} (nan|inf).*nothing of this step is saved"):
        step(iteration=11)


@pytest.mark.parametrize("norm", [0.5, None])
def test_good_numbers_pass(norm: float | None) -> None:
    """Stages without a loss have none to check; a rank without parameters has no norm."""
    result = ({}, 0, False, False, 0, norm, 0, 0)
    assert stop_at_bad_numbers(lambda **_: result)(iteration=3) is result


def megatron_step(monkeypatch: pytest.MonkeyPatch, *losses: float) -> Callable[[], tuple]:
    """Megatron's own train_step, as its loop calls it, with a model and an optimizer that do nothing."""
    single()
    args = mock.MagicMock(
        vision_pretraining=False, modelopt_enabled=False, qk_clip=False, empty_unused_memory_level=0
    )
    off = ("params", "activations", "tokens_per_expert", "wgrads", "dgrads")
    args.configure_mock(
        **{f"save_{name}_interval": None for name in off}, reuse_grad_buf_for_mxfp8_param_ag=False
    )
    args.configure_mock(log_num_zeros_in_grad=False, log_max_attention_logit=False)
    rerun = mock.MagicMock()
    rerun.should_run_forward_backward.side_effect = [True, False]
    rerun.should_checkpoint_and_exit.return_value = (False, False, 0)
    optimizer = mock.MagicMock(**{"step.return_value": (True, 1.0, None)})
    chunk = mock.MagicMock(pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    stubs = {"get_args": args, "get_timers": mock.MagicMock(), "get_rerun_state_machine": rerun}
    for name, value in (stubs | {"get_num_microbatches": len(losses)}).items():
        monkeypatch.setattr(training, name, lambda value=value: value)
    monkeypatch.setattr(training, "get_attr_wrapped_model", lambda model, name: getattr(model, name))
    reports = [{"loss": torch.tensor([value, 1.0])} for value in losses]
    passes = lambda **_: reports  # noqa: E731
    scheduler = mock.MagicMock()
    return lambda: training.train_step(
        None, None, [chunk], optimizer, scheduler, None, passes, iteration=11, pg_collection=None
    )


def test_the_loop_s_own_step_names_a_bad_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one micro-batch among good ones, before the loop can log or save; asking twice wraps once."""
    monkeypatch.setattr(training, "train_step", training.train_step)
    monkeypatch.setattr(training, "FullCudaGraphWrapper", training.FullCudaGraphWrapper)
    plain = training.train_step
    record_steps(Execution(None, "none"), PRECISION)
    assert training.train_step is plain
    monkeypatch.setattr(StepGraph, "first_replay", FirstReplay())
    monkeypatch.delenv("NCCL_GRAPH_REGISTER", raising=False)
    kept = mock.Mock()
    monkeypatch.setattr(graph_module, "atexit", kept)
    how = Execution(None, "full_iteration", deterministic_mode=True), PRECISION
    record_steps(*how)
    assert StepGraph.first_replay.exact
    assert os.environ["NCCL_GRAPH_REGISTER"] == "0"
    assert training.FullCudaGraphWrapper is StepGraph and training.train_step.__wrapped__ is plain
    record_steps(*how)
    assert training.train_step.__wrapped__ is plain
    assert float(megatron_step(monkeypatch, 1.0, 3.0)()[0]["loss"]) == 2
    with pytest.raises(BadNumbers, match=r"step 12: loss nan; nothing of this step is saved"):
        megatron_step(monkeypatch, 1.0, math.nan)()
    kept.register.assert_called_with(release_graph)


@pytest.mark.parametrize("broken", [False, True])
def test_a_graph_is_destroyed_before_the_process_ends(monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    """NCCL waits for it; after an error of CUDA nothing can be destroyed, and nothing else fails for it."""
    recorded = mock.Mock(**{"reset.side_effect": RuntimeError("CUDA error") if broken else None})
    monkeypatch.setitem(FullCudaGraphWrapper.cuda_graph, "training", recorded)
    release_graph()
    release_graph()
    assert recorded.reset.call_count == 1 and FullCudaGraphWrapper.cuda_graph["training"] is None


def sizes(values: Iterator[MicroBatch]) -> set[tuple]:
    """Shapes of all tensors of the plans."""
    return {
        tuple(
            tuple(part.shape)
            for owner in (one.plan, one.plan.shallow, one.plan.deep)
            for part in vars(owner).values()
            if isinstance(part, torch.Tensor)
        )
        for one in values
    }


def test_static_plans_have_one_shape() -> None:
    """Whatever the samples: no tiles, all tiles, one sample, as many as fit; padding weighs nothing."""
    batches = [batch(*tiles) for tiles in ((0,), (3,), (1, 1, 1), (0, 0, 0))]
    assert len(sizes(iter(batches))) == 1
    for one in batches:
        host, device = one.plan.host, one.plan
        real = len(host.loss_rows)
        assert device.loss_weights.tolist() == [1] * real + [0] * (20 - real)
        assert (device.total_weight.item(), device.supervised.item()) == (real, real)
        assert device.real_tiles.tolist() == [1] * host.num_tiles + [0] * (3 - host.num_tiles)
        assert device.deep.cu_seqlens[-1] == 40 and (np.diff(device.deep.cu_seqlens) >= 0).all()
        assert device.deep.used.item() == sum(host.deep.segment_lengths[: len(host.sample_ids)])
