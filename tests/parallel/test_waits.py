"""No device synchronization in a stage's forward and backward pass."""

from functools import partial
from typing import Any
from unittest import mock

import pytest

from tests import layouts  # isort: skip  (sets Megatron up)
import torch
from megatron.core.pipeline_parallel import schedules

from megatron_internvlx.model.internvlx import InternVLX
from megatron_internvlx.model.lvtc import LVTCInjection
from tests.distributed import Pool
from tests.layout_cases import expand
from tests.waits import Waits


def watched(changes: list[str], **options: Any) -> dict[str, Any]:
    """`layouts.train`, noting what waits inside the model's forward pass and the schedule's backward."""
    found: list[str] = []
    passes = []

    def watch(original):
        def call(*args, **kwargs):
            passes.append(original.__name__)
            with Waits() as waits:
                result = original(*args, **kwargs)
            found.extend(waits.found)
            return result

        return call

    with (
        mock.patch.object(InternVLX, "forward", watch(InternVLX.forward)),
        mock.patch.object(schedules, "custom_backward", watch(schedules.custom_backward)),
    ):
        layouts.train(changes, **options)
    return {"found": sorted(set(found)), "passes": sorted(passes)}


def with_a_wait(changes: list[str], **options: Any) -> dict[str, Any]:
    original = LVTCInjection.forward

    def forward(self, rows, features, plan):
        assert rows.sum().item() is not None
        return original(self, rows, features, plan)

    with mock.patch.object(LVTCInjection, "forward", forward):
        return watched(changes, **options)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp=2 sp pp=2", "tp=2 sp pp=2 full static"])
def test_no_wait_in_forward_and_backward(pool: Pool, layout: str) -> None:
    results = pool.run(4, partial(watched, kind="packed"), [*expand(layout), "--inject-layers", "5", "6"])
    for result in results:
        assert result["passes"] == ["custom_backward"] * 4 + ["forward"] * 4
        assert result["found"] == []


@pytest.mark.slow
def test_a_wait_is_noticed(pool: Pool) -> None:
    (result,) = pool.run(1, partial(with_a_wait, kind="packed"), [])
    assert any(entry.startswith("item") for entry in result["found"])


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: bool(x),
        lambda x: x.cpu(),
        lambda x: x.expand(3).nonzero(),
        lambda x: x.expand(3)[x.expand(3) > 0],
        lambda x: torch.masked_select(x, x > 0),
    ],
)
def test_what_is_noticed(operation) -> None:
    with Waits() as waits:
        operation(torch.ones(()))
    assert waits.found


def test_what_is_not_noticed() -> None:
    x = torch.arange(6.0, requires_grad=True)
    with Waits() as waits:
        y = x.index_select(0, torch.tensor([1, 2])).view(2)
        y = y.masked_fill(y > 1, 0.0)
        z = x.detach().clone()
        z[z > 2] = 0.0
        y.sum().backward()
    assert not waits.found
