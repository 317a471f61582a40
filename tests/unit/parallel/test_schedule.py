"""The order of messages, against what both ends of every link must agree on."""

from itertools import islice

import pytest

from testing import preload  # noqa: F401  # isort: skip  (sets Megatron up)
from megatron_internvlx.parallel.schedule import message_order, repeat_runs

# pipeline stages, chunks, micro-batches, group size: with and without a remainder
SCHEDULES = [(2, 2, 4, 2), (2, 2, 5, 3), (4, 2, 4, 4), (4, 3, 8, 4), (4, 2, 12, 8), (3, 4, 7, 4)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_both_ends_agree(schedule: tuple[int, int, int, int]) -> None:
    pp, chunks, micro_batches, group = schedule
    orders = [message_order(rank, pp, chunks, micro_batches, group) for rank in range(pp)]
    for rank, order in enumerate(orders):
        after = orders[(rank + 1) % pp]
        wraps = int(rank == pp - 1)
        assert after.receive_forward == [chunk + wraps for chunk in order.send_forward]
        # Gradients come back for exactly the outputs that were sent, each chunk's in its order.
        assert sorted(order.receive_backward) == sorted(order.send_forward)
    for virtual in range(pp * chunks):
        rank, chunk = virtual % pp, virtual // pp
        assert orders[rank].receive_forward.count(chunk) == (micro_batches if virtual else 0)
        last = virtual == pp * chunks - 1
        assert orders[rank].receive_backward.count(chunk) == (0 if last else micro_batches)


def test_two_stages_of_two_chunks() -> None:
    """By hand: groups of two micro-batches, chunk 0 then chunk 1."""
    first, last = (message_order(rank, 2, 2, 4, 2) for rank in (0, 1))
    assert first.send_forward == last.receive_forward == [0, 0, 1, 1, 0, 0, 1, 1]
    assert last.send_forward == [0, 0, 0, 0]
    assert first.receive_forward == [1, 1, 1, 1]
    assert first.receive_backward == [1, 1, 0, 0, 1, 1, 0, 0]
    assert last.receive_backward == [0, 0, 0, 0]


def test_the_next_run_may_have_another_number_of_micro_batches() -> None:
    runs = iter([[0, 1], [0, 0, 1, 1]])
    assert list(islice(repeat_runs(lambda: next(runs)), 6)) == [0, 1, 0, 0, 1, 1]
