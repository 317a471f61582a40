"""Attention of Transformer Engine on packed queries, keys and values, with a stand-in of its module."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_internvlx.platform import packed_attention

S, T, N, D = 5, 2, 3, 4


def engine() -> Any:
    """A module with the names of Transformer Engine's that are used; it notes what it is called with."""
    module: Any = ModuleType(packed_attention._TE_MODULE)
    module.given = []

    class DotProductAttention(nn.Module):
        __module__ = packed_attention._TE_MODULE

        def forward(self, query=None, key=None, value=None, qkv_layer=None, qkv_interleave_dim=None, **more):
            module.given.append((query, key, value, qkv_layer, qkv_interleave_dim, more))
            cut = module._unpack_packed_qkv  # looked up when called, as there
            parts = cut(qkv_layer, None, query, key, value, "sbhd", qkv_interleave_dim, None)
            assert parts[3] == "layout"
            q, k, v = (part.flatten(2) for part in parts[:3])
            return q + 10 * k + 100 * v

    def unpack(qkv_layer, kv_layer, query, key, value, qkv_format, interleave_dim, inference_params):
        if qkv_layer is None:
            return query, key, value, "layout"
        return *(qkv_layer.select(interleave_dim, i) for i in range(3)), "layout"

    module.DotProductAttention, module._unpack_packed_qkv = DotProductAttention, unpack
    return module


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = engine()
    monkeypatch.setitem(sys.modules, packed_attention._TE_MODULE, module)
    yield module


def megatrons(fake: Any) -> nn.Module:
    """Megatron's wrapper, which must not be asked: it takes queries, keys and values apart."""

    class Wrapper(fake.DotProductAttention):
        def forward(self, *_: Any, **__: Any) -> Tensor:
            raise AssertionError("the layout would be found out by pointers")

    return Wrapper()


def test_the_packed_buffer_is_handed_over(fake: Any) -> None:
    """As one buffer and where it interleaves, so that no pointers are compared."""
    qkv = torch.randn(S, T, N, 3, D)
    packed_attention.attend_packed(megatrons(fake), qkv)
    ((query, key, value, packed, dim, more),) = fake.given
    assert query is key is value is None
    assert packed is qkv and packed.shape[dim] == 3 and dim == -2
    assert more == {"attn_mask_type": "no_mask"}


def test_the_buffer_gets_one_gradient_without_copies(fake: Any) -> None:
    """Slices whose gradients lie in one buffer are joined as that buffer; asking twice wraps once."""
    core, qkv = megatrons(fake), torch.randn(S, T, N, 3, D, requires_grad=True)
    plain = fake._unpack_packed_qkv
    output = packed_attention.attend_packed(core, qkv)
    joining = fake._unpack_packed_qkv
    assert joining is not plain
    packed_attention.attend_packed(core, qkv)
    assert fake._unpack_packed_qkv is joining
    q, k, v = (part.flatten(2) for part in qkv.unbind(-2))
    torch.testing.assert_close(output, q + 10 * k + 100 * v)

    # As attention's backward pass writes them: slices of one buffer.
    written = torch.randn(S, T, N, 3, D)
    parts = joining(qkv, None, None, None, None, "sbhd", -2, None)[:3]
    (joined,) = torch.autograd.grad(parts, qkv, written.unbind(-2))
    assert joined.data_ptr() == written.data_ptr() and torch.equal(joined, written)


def test_other_layouts_are_cut_as_before(fake: Any) -> None:
    """Queries, keys and values that came apart are not touched."""
    packed_attention._join_packed_gradients(fake)
    apart = tuple(torch.randn(S, T, N, D) for _ in range(3))
    found = fake._unpack_packed_qkv(None, None, *apart, "sbhd", None, None)
    assert all(map(lambda ours, theirs: ours is theirs, found[:3], apart)) and found[3] == "layout"
