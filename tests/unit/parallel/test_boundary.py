"""What crosses a boundary, its size, and the way there and back."""

from tests.single import single  # isort: skip  (sets Megatron up)
import pytest
import torch
from torch.distributed import group

from megatron_internvlx.parallel.boundary import BoundaryFormat, Budget, take_carried
from megatron_internvlx.parallel.layout import boundary_content
from tests.unit.parallel.plans import plan

LENGTH, WIDTH, HIDDEN = 17, 6, 8


def form(**options) -> BoundaryFormat:
    single()
    return BoundaryFormat(HIDDEN, WIDTH, LENGTH, sequence_parallel=False, group=group.WORLD, **options)


@pytest.mark.parametrize(
    ("next_layer", "deep", "carry"),
    [
        (0, False, True),
        (2, False, True),
        (3, True, True),
        (5, True, True),
        (6, True, False),
        (8, True, False),
    ],
)
def test_content_between_expansion_and_last_injection(next_layer: int, deep: bool, carry: bool) -> None:
    """Expansion at the entry of layer 2, injections at 4 and 5: features go no further than to layer 5."""
    content = boundary_content(next_layer, (2, 4, 5))
    assert (content.deep, content.carry) == (deep, carry)


def test_without_lvtc_only_deep_rows_cross() -> None:
    assert all(boundary_content(n, ()).deep and not boundary_content(n, ()).carry for n in range(4))


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("budget", [None, Budget(40, 60, 5)])
def test_round_trip(gradient: bool, budget: Budget | None) -> None:
    """Rows and features arrive as they were; a frozen encoder's travel beside the rows."""
    boundary = form(carry_gradient=gradient, budget=budget)
    content, planned = boundary_content(2, (2,)), plan(tiles=(2, 1), budget=budget)
    rows = torch.randn(planned.shallow.length, 1, HIDDEN, requires_grad=True)
    features = torch.randn(planned.encoded_tiles, LENGTH, WIDTH, requires_grad=gradient)
    message = boundary.join(rows * 1, features, content, planned)
    expected = boundary.local_rows(content, planned)
    carried = message.carried.shape[0] if not gradient else message.shape[0] - len(rows)
    assert (len(rows), carried) == expected
    assert carried == -(-(budget.tiles if budget else 3) * LENGTH * WIDTH // HIDDEN)
    arrived, back = boundary.split(message, content, planned)
    assert torch.equal(arrived, rows) and torch.equal(back, features)
    assert take_carried(message) is None
    (arrived.sum() + (2 * back).sum() * gradient).backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))
    if gradient:
        assert torch.equal(features.grad, torch.full_like(features, 2.0))


def test_a_message_of_another_length_is_refused() -> None:
    content, planned = boundary_content(2, (2,)), plan(tiles=(1,))
    with pytest.raises(RuntimeError, match=r"received 3 rows, expected \d+ decoder rows"):
        form().split(torch.zeros(3, 1, HIDDEN), content, planned)
