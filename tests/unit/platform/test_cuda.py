"""The patches for GPUs, as far as they run without one."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from tests.single import single  # noqa: F401  isort: skip  (sets Megatron up)
import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_internvlx import platform
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


class Streams:
    """Stand-in of CUDA's streams: which one is current, and which waits for which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.waits = "Megatron's", []
        for name in ("current_stream", "default_stream", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def _of(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, wait_stream=lambda other: self.waits.append((name, other.name, self.current))
        )

    def current_stream(self) -> SimpleNamespace:
        return self._of(self.current)

    def default_stream(self) -> SimpleNamespace:
        return self._of("default")

    @contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before


@pytest.mark.parametrize(
    ("recorded", "stream", "waits"),
    [
        ("none", "default", [("default", "Megatron's"), ("Megatron's", "default")]),
        ("full_iteration", "Megatron's", []),
    ],
)
def test_gradients_are_added_up_where_they_come_from(
    monkeypatch: pytest.MonkeyPatch, recorded: str, stream: str, waits: list[tuple[str, str]]
) -> None:
    """DDP makes its nodes of accumulation on the stream of training; with a graph, on that of the capture."""
    streams, seen = Streams(monkeypatch), []

    def build(self: object, config: object, *args: object, **more: object) -> None:
        seen.append((streams.current, config, args, more))

    monkeypatch.setattr(DistributedDataParallel, "__init__", build)
    cuda.patch_megatron()
    config = SimpleNamespace(cuda_graph_impl=recorded)
    DistributedDataParallel(config, "ddp", module="model")
    assert seen == [(stream, config, ("ddp",), {"module": "model"})]
    # Both wait outside of it, on Megatron's stream.
    assert streams.waits == [(*pair, "Megatron's") for pair in waits]
    assert streams.current == "Megatron's"


def test_torch_is_told_of_the_stale_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its warning about another stream than the gradient's is switched off; this torch has the switch."""
    given: list[bool] = []
    monkeypatch.setattr(torch.distributed, "barrier", torch.distributed.barrier)  # is patched too
    monkeypatch.setattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", given.append)
    cuda.patch_torch()
    assert given == [False]


def test_a_torch_without_the_switch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "barrier", torch.distributed.barrier)
    monkeypatch.delattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch")
    cuda.patch_torch()


def test_setup_on_a_gpu_applies_these_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the filters of a GPU run; none of those for CPUs."""
    called: list[object] = []
    monkeypatch.setattr(platform, "_CUDA", True)
    monkeypatch.setattr(platform, "_done", None)
    monkeypatch.setattr(platform, "quiet_logs", lambda *, on_cpu: called.append(on_cpu))
    for owner, name, word in (
        (cuda, "patch_torch", "torch"),
        (cuda, "patch_megatron", "Megatron"),
        (platform.cpu, "patch_torch", "CPU"),
        (platform.shared, "use_shipped_index_helper", "shared"),
        (platform.schedule, "allow_learning_rate_changes", "shared"),
        (platform.schedule, "announce_schedule_changes", "shared"),
    ):
        monkeypatch.setattr(owner, name, lambda word=word: called.append(word))
    assert platform.setup() == "cuda"
    assert called == [False, "torch", "Megatron", "shared", "shared", "shared"]
