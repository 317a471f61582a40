"""When two passes over a step count as the same, and what is put back between them."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from tests.single import single  # isort: skip  (sets Megatron up)
import torch
from megatron.core.tensor_parallel import random

from megatron_internvlx.megatron_settings import Execution
from megatron_internvlx.platform.rng import keep_random_state
from megatron_internvlx.precision import Precision
from megatron_internvlx.training.replay import LIMIT, FirstReplay, GraphDiffers, numbers_of, start_again


def precision(fp8: str | None = None, recipe: str = "delayed") -> Precision:
    return Precision(True, False, fp8, recipe, False, False, "transformer_engine", 1, False)


def test_what_a_run_is_held_to() -> None:
    """Bit for bit in deterministic mode; delayed scales change with each pass, other recipes keep nothing."""
    usual, exact = (Execution(None, "full_iteration", deterministic_mode=on) for on in (False, True))
    assert FirstReplay.of(usual, precision()) == FirstReplay(LIMIT)
    assert FirstReplay.of(exact, precision()) == FirstReplay(0.0)
    assert FirstReplay.of(usual, precision("hybrid", "tensorwise")).skipped is None
    assert "delayed scales" in FirstReplay.of(usual, precision("hybrid")).skipped


def test_a_difference_counts_relative_to_the_value() -> None:
    single()
    expected = torch.tensor([2.0, 1e-3, 0.0])
    check = FirstReplay(1e-2).check
    assert check(expected, expected) == 0
    assert check(expected * 1.009, expected) == pytest.approx(9e-3, rel=1e-3)
    with pytest.raises(GraphDiffers, match=r"by 2.0e-02, more than 0.01 \(this rank: 0.00102 and 0.001\)"):
        check(torch.tensor([2.0, 1.02e-3, 0.0]), expected)
    with pytest.raises(GraphDiffers, match="this rank: 1e-09 and 0"):  # a pack without a loss
        check(torch.tensor([2.0, 1e-3, 1e-9]), expected)
    with pytest.raises(GraphDiffers, match="more than 0 "):
        FirstReplay(0.0).check(torch.nextafter(expected, torch.tensor(9.0)), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_only_what_the_graph_spoils_is_its_fault(bad: float) -> None:
    """A loss that is not finite without a graph ends training by another message."""
    single()
    good, spoilt = torch.tensor([2.0, 1.0]), torch.tensor([2.0, bad])
    with pytest.raises(GraphDiffers, match="by inf"):
        FirstReplay().check(spoilt, good)
    assert FirstReplay().check(spoilt, spoilt) == FirstReplay().check(good, spoilt) == 0


def test_the_worst_rank_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the others would wait for it in the next collective."""
    single()

    def reduced(value: torch.Tensor, op: Any) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        value.fill_(0.5)

    monkeypatch.setattr(torch.distributed, "all_reduce", reduced)
    with pytest.raises(GraphDiffers, match=r"by 5.0e-01.*this rank: 1 and 1"):
        FirstReplay().check(torch.ones(2), torch.ones(2))


def test_losses_and_all_gradient_buffers_are_compared() -> None:
    """Those of experts too, and in fp32: in bf16 the square of a small gradient is lost."""
    buffers = [SimpleNamespace(grad_data=torch.tensor(grad)) for grad in ([3.0, 4.0], [0.0], [1e-3])]
    buffers[2].grad_data = buffers[2].grad_data.bfloat16()
    chunks = [
        SimpleNamespace(buffers=buffers[:1], expert_parallel_buffers=[]),
        SimpleNamespace(buffers=buffers[1:2], expert_parallel_buffers=buffers[2:]),
    ]
    found = numbers_of([{"loss": torch.tensor([6.0, 2.0])}, {"loss": torch.tensor([7.0, 2.0])}], chunks)
    assert found.tolist() == pytest.approx([6, 7, 5, 0, 1e-3], rel=1e-2)
    assert found.dtype == torch.float32


def drawn() -> list[float]:
    """Of the default generator and of each of the tracker's."""
    tracker = random.get_cuda_rng_tracker()
    values = [torch.rand(1).item()]
    for name in tracker.get_states():
        with tracker.fork(name):
            values.append(torch.rand(1).item())
    return values


def test_the_same_numbers_are_drawn_again() -> None:
    single()
    drawn()
    chunk, set_back = mock.Mock(), keep_random_state()
    first, second = drawn(), drawn()
    assert len(first) > 2 and first != second
    for _ in range(2):
        start_again([chunk], set_back)
        assert drawn() == first
    assert chunk.zero_grad_buffer.call_count == 2


def test_generators_of_graphs_are_set_back_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded graph draws from these objects, whose positions a copy of Megatron's tracker shares."""
    single()
    generator = torch.Generator().manual_seed(3)
    tracker = mock.Mock(**{"get_states.return_value": {"model": generator}})
    monkeypatch.setattr(random, "get_cuda_rng_tracker", lambda: tracker)
    set_back = keep_random_state()
    first = torch.rand(4, generator=generator)
    set_back()
    assert torch.equal(torch.rand(4, generator=generator), first)
    assert tracker.set_states.call_args.args[0]["model"] is generator
