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
from megatron_internvlx.training.replay import (
    EXACT_LIMIT,
    LIMIT,
    FirstReplay,
    GraphDiffers,
    compared,
    gather_again,
    numbers_of,
)

RESET = "reset_param_sync_dispatch_state"


def precision(fp8: str | None = None, recipe: str = "delayed") -> Precision:
    return Precision(True, False, fp8, recipe, False, False, "transformer_engine", 1, False)


def numbers(*values: float, least: float = 0.0) -> torch.Tensor:
    return torch.tensor([values, [least] * len(values)])


def test_what_a_run_is_held_to() -> None:
    """Deterministic mode names any difference; delayed scales change with each pass, other recipes keep nothing."""
    usual, exact = (Execution(None, "full_iteration", deterministic_mode=on) for on in (False, True))
    assert FirstReplay.of(usual, precision()) == FirstReplay(LIMIT)
    assert FirstReplay.of(exact, precision()) == FirstReplay(EXACT_LIMIT, exact=True)
    assert FirstReplay.of(usual, precision("hybrid", "tensorwise")).skipped is None
    delayed = FirstReplay.of(usual, precision("hybrid"))
    assert delayed.describe(None).startswith(
        "not compared with steps without it: each pass over a step changes"
    )
    assert FirstReplay.of(usual, precision()).describe(2e-5).endswith("(largest difference 2.0e-05)")
    assert FirstReplay.of(exact, precision()).describe(0.0).endswith("(largest difference 0.0e+00)")
    assert (
        FirstReplay.of(exact, precision())
        .describe(2e-5)
        .startswith("WARNING: its first replay differs by 2.0e-05")
    )


def test_a_difference_counts_relative_to_the_value() -> None:
    single()
    expected = numbers(2.0, 1e-3, 0.0)
    check = FirstReplay(1e-2).check
    assert check(expected, expected) == 0
    assert check(expected * 1.009, expected) == pytest.approx(9e-3, rel=1e-3)
    with pytest.raises(GraphDiffers, match=r"by 2.0e-02, more than 0.01 \(this rank: 0.00102 and 0.001\)"):
        check(numbers(2.0, 1.02e-3, 0.0), expected)
    with pytest.raises(GraphDiffers, match="this rank: 1e-09 and 0"):  # a pack without a loss
        check(numbers(2.0, 1e-3, 1e-9), expected)
    assert check(numbers(1.02e-3), numbers(1e-3, least=0.01)) == pytest.approx(2e-3, rel=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_only_what_the_graph_spoils_is_its_fault(bad: float) -> None:
    """A loss that is not finite without a graph ends training by another message."""
    single()
    good, spoilt = numbers(2.0, 1.0), numbers(2.0, bad)
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
        FirstReplay().check(numbers(1.0, 1.0), numbers(1.0, 1.0))


def test_losses_and_all_gradient_buffers_are_compared() -> None:
    """Those of experts too, and in fp32: in bf16 the square of a small gradient is lost."""
    buffers = [SimpleNamespace(grad_data=torch.tensor(grad)) for grad in ([3.0, 4.0], [0.0], [1e-3])]
    buffers[2].grad_data = buffers[2].grad_data.bfloat16()
    chunks = [
        SimpleNamespace(buffers=buffers[:1], expert_parallel_buffers=[]),
        SimpleNamespace(buffers=buffers[1:2], expert_parallel_buffers=buffers[2:]),
    ]
    found = numbers_of([{"loss": torch.tensor([6.0, 2.0])}, {"loss": torch.tensor([7.0, 3.0])}], chunks)
    assert found[0].tolist() == pytest.approx([6, 7, 5, 0, 1e-3], rel=1e-2)
    assert found[1].tolist() == pytest.approx([2e-3, 3e-3, 0, 0, 0])
    assert found.dtype == torch.float32


def test_the_recorded_pass_gathers_what_a_save_has_gathered() -> None:
    """Only where passes gather parameters at all."""
    sharded, whole = (
        mock.Mock(**{"ddp_config.overlap_param_gather": on}, spec_set=["ddp_config", RESET])
        for on in (True, False)
    )
    gather_again([sharded, whole])
    assert getattr(sharded, RESET).call_count == 1 and not getattr(whole, RESET).called


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
    set_back = keep_random_state()
    first, second = drawn(), drawn()
    assert len(first) > 2 and first != second
    for _ in range(2):
        set_back()
        assert drawn() == first


def test_a_step_is_recorded_between_two_passes_of_the_same_numbers() -> None:
    """What is drawn while it is recorded differs, so that numbers fixed at that moment show."""
    single()
    order: list[Any] = []
    chunk = mock.Mock(buffers=[SimpleNamespace(grad_data=torch.ones(2))], expert_parallel_buffers=[])
    chunk.zero_grad_buffer = lambda: order.append("zero")

    def step(name: str) -> Any:
        def passes() -> list[dict[str, torch.Tensor]]:
            order.append((name, tuple(drawn())))
            return [{"loss": torch.tensor([3.0, 1.0])}]

        return passes

    reports, difference = compared(FirstReplay(), [chunk], step("plain"), step("record"), step("replay"))
    plain, first, record, second, replay = order
    assert (first, second, plain[0], record[0], replay[0]) == ("zero", "zero", "plain", "record", "replay")
    assert plain[1] == replay[1] != record[1]
    assert difference == 0 and reports[0]["loss"][0] == 3


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
