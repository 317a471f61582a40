"""Every class of arithmetic maps both ways, and its order is what its documentation says."""

import pytest
import torch

from megatron_internvlx.checkpoint.ops import GateUp, Rows, Same, SplitQKV, VisionQKV, our_shape

H, G, D, X = 8, 2, 3, 5


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (Same(), [(4, X)]),
        (Rows(4), [(4, X)]),
        (VisionQKV(H), [(3 * H * D, X)]),
        (VisionQKV(H), [(3 * H * D,)]),
        (SplitQKV(H, G), [(H * D, X), (G * D, X), (G * D, X)]),
        (SplitQKV(H, G), [(H * D,), (G * D,), (G * D,)]),
        (SplitQKV(H, H), [(H * D, X)] * 3),
        (GateUp(), [(7, X), (7, X)]),
    ],
)
def test_there_and_back(op, shapes) -> None:
    parts = [numbered(*shape) + 1000 * i for i, shape in enumerate(shapes)]
    ours = op.to_ours(parts)
    assert tuple(ours.shape) == our_shape(tuple(shapes))
    back = op.to_theirs(ours)
    assert len(back) == len(parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))


def test_vision_rows_go_head_by_head() -> None:
    released = torch.tensor([[100 * part + head] for part in range(3) for head in range(H) for _ in range(D)])
    ours = VisionQKV(H).to_ours([released]).view(H, 3, D)
    assert ours[:, :, 0].tolist() == [[head, 100 + head, 200 + head] for head in range(H)]


def test_groups_hold_their_queries_then_key_then_value() -> None:
    q = torch.arange(H).repeat_interleave(D)
    k, v = 100 + torch.arange(G).repeat_interleave(D), 200 + torch.arange(G).repeat_interleave(D)
    ours = SplitQKV(H, G).to_ours([q, k, v]).view(G, H // G + 2, D)[:, :, 0]
    assert ours.tolist() == [[0, 1, 2, 3, 100, 200], [4, 5, 6, 7, 101, 201]]


def test_vocabulary_loses_its_padding() -> None:
    padded = torch.cat([numbered(4, X), torch.zeros(3, X)])
    assert torch.equal(Rows(4).to_theirs(padded)[0], numbered(4, X))
