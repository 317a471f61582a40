"""The pool of ranks: results, failures, hangs, deaths, and nothing left behind."""

import os
import sys
import time

import pytest
import torch

from tests.distributed import Pool, RankError, init_parallel


def rank_sum(scale: float) -> tuple[int, float]:
    x = torch.ones(1) * scale
    torch.distributed.all_reduce(x)
    return torch.distributed.get_rank(), x.item()


def fail_on(rank: int) -> None:
    print("before the failure")
    if torch.distributed.get_rank() == rank:
        raise ValueError("this rank fails")
    torch.distributed.barrier()


def leave_on(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        os._exit(3)
    torch.distributed.barrier()


def wait_for_nobody() -> None:
    if torch.distributed.get_rank() == 0:
        time.sleep(3600)
    torch.distributed.barrier()


def layout(tp: int) -> tuple[int, int]:
    from megatron.core import parallel_state

    init_parallel(tp=tp)
    torch.distributed.all_reduce(torch.ones(1), group=parallel_state.get_tensor_model_parallel_group())
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
    )


def started_with() -> float:
    """Seconds of computing of this process, if Megatron came with it from the server."""
    assert "testing.preload" in sys.modules, "see what `python -c 'import testing.preload'` says"
    return time.process_time()


def test_ranks_are_cheap(pool: Pool) -> None:
    """Importing Megatron would take 4 s; measured 0.02 s (and 10 MB of memory per rank)."""
    with_others = Pool()
    try:
        assert max(with_others.run(2, started_with)) < 1.5
    finally:
        with_others.close()


def test_results_come_in_the_order_of_the_ranks(pool: Pool) -> None:
    assert pool.run(3, rank_sum, 2.0) == [(0, 6.0), (1, 6.0), (2, 6.0)]
    assert pool.run(1, rank_sum, 2.0) == [(0, 2.0)]


def test_jobs_leave_no_groups(pool: Pool) -> None:
    assert pool.run(2, layout, 2) == [(2, 1)] * 2
    assert pool.run(2, layout, 1) == [(1, 2)] * 2


def test_the_first_failure_is_told(pool: Pool) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1: .*ValueError: this rank fails.*before the failure"):
        pool.run(2, fail_on, 1)
    assert pool.run(2, rank_sum, 1.0) == [(0, 2.0), (1, 2.0)]


def test_a_dead_rank_is_told(pool: Pool) -> None:
    with pytest.raises(RankError, match="rank 0: died with exit code 3"):
        pool.run(2, leave_on, 0)
    assert pool.run(2, rank_sum, 1.0) == [(0, 2.0), (1, 2.0)]


def test_a_hang_ends_with_stacks(pool: Pool) -> None:
    with pytest.raises(RankError, match=r"(?s)no answer in time from ranks \[0, 1\].*wait_for_nobody"):
        pool.run(2, wait_for_nobody, timeout=3)
    assert pool.run(2, rank_sum, 1.0) == [(0, 2.0), (1, 2.0)]
