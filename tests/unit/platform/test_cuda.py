"""The patches for GPUs, as far as they run without one."""

import pytest
import torch

from megatron_internvlx.platform import cuda


@pytest.fixture
def barriers(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What torch's barrier is called with; ranks of the groups "ours" and "theirs", over NCCL or gloo."""
    called: list[tuple] = []

    def backend(group: str) -> str:
        if group == "theirs":
            raise ValueError("Invalid process group specified")
        return "gloo" if group == "gloo" else "nccl"

    monkeypatch.setattr(torch.distributed, "barrier", lambda *args, **more: called.append((*args, more)))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: -1 if group == "theirs" else 0)
    monkeypatch.setattr(torch.distributed, "get_backend", backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    cuda._barriers_name_their_device()
    return called


def test_barriers_over_nccl_name_this_gpu(barriers: list[tuple]) -> None:
    torch.distributed.barrier("ours")
    torch.distributed.barrier("ours", device_ids=[1])
    torch.distributed.barrier("gloo", True, timeout=5)
    assert barriers == [
        ("ours", False, [3], {}),
        ("ours", False, [1], {}),
        ("gloo", True, None, {"timeout": 5}),
    ]


def test_a_barrier_of_other_ranks_is_left_to_torch(barriers: list[tuple]) -> None:
    """It warns and returns."""
    torch.distributed.barrier("theirs")
    assert barriers == [("theirs", False, None, {})]
