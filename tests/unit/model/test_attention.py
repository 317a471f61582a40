import pytest
import torch

from tests.single import decoder_config, single  # isort: skip  (sets Megatron up)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType

from megatron_internvlx.model.attention import PackedDotProductAttention

HEADS, GROUPS, WIDTH = 8, 2, 4


def pack(*lengths: int, qkv_format: str = "sbhd") -> PackedSeqParams:
    packed = PackedSeqParams(qkv_format=qkv_format)
    packed.segment_lengths = lengths
    return packed


def core(mask: AttnMaskType, **changes: object) -> PackedDotProductAttention:
    config = decoder_config(num_attention_heads=HEADS, num_query_groups=GROUPS, **changes)
    return PackedDotProductAttention(config, 1, mask, "self")


def dense(q, k, v, allowed):
    """Attention with the whole score matrix; `[S, B, heads, width]`, mask `[S, S]`."""
    k, v = (x.repeat_interleave(q.size(2) // k.size(2), dim=2) for x in (k, v))
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    scores = (q @ k.mT * q.size(-1) ** -0.5).masked_fill(~allowed, float("-inf")).softmax(-1)
    return (scores @ v).permute(2, 0, 1, 3).flatten(2)


def inputs(size: int, batch: int = 1):
    shapes = [(size, batch, n, WIDTH) for n in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(s, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("mask", [AttnMaskType.causal, AttnMaskType.no_mask])
@pytest.mark.parametrize("lengths", [(11,), (3, 8), (0, 5, 1, 0, 5), (1,) * 11])
def test_equals_a_block_diagonal_mask(mask: AttnMaskType, lengths: tuple[int, ...]) -> None:
    """Worst measured difference 5e-7; one token of a neighbour seen gives more than 1e-2."""
    tensors = inputs(11)
    allowed = torch.block_diag(*[torch.ones(n, n) for n in lengths]).bool()
    if mask is AttnMaskType.causal:
        allowed = allowed.tril()
    output = core(mask)(*tensors, None, packed_seq_params=pack(*lengths))
    expected = dense(*tensors, allowed)
    cotangent = torch.randn_like(expected)
    ours = torch.autograd.grad((output * cotangent).sum(), tensors)
    theirs = torch.autograd.grad((expected * cotangent).sum(), tensors)
    for a, b in zip((output, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=0)


def test_batch_without_a_pack_and_mask_type_of_the_call() -> None:
    tensors = inputs(7, batch=3)
    allowed = torch.ones(7, 7).bool()
    attention = core(AttnMaskType.no_mask)
    torch.testing.assert_close(attention(*tensors, None), dense(*tensors, allowed), atol=5e-6, rtol=0)
    causal = attention(*tensors, None, attn_mask_type=AttnMaskType.causal)
    torch.testing.assert_close(causal, dense(*tensors, allowed.tril()), atol=5e-6, rtol=0)


def test_thd_inputs() -> None:
    tensors = inputs(6)
    attention, packed = core(AttnMaskType.causal), pack(4, 2, qkv_format="thd")
    flat = attention(*(x.squeeze(1) for x in tensors), None, packed_seq_params=packed)
    assert torch.equal(flat[:, None], attention(*tensors, None, packed_seq_params=packed))


def test_no_tokens_or_tiles_keep_the_graph() -> None:
    for size, batch in ((0, 1), (5, 0)):
        tensors = inputs(size, batch)
        output = core(AttnMaskType.causal)(*tensors, None)
        assert output.shape == (size, batch, HEADS * WIDTH)
        assert all(g is not None for g in torch.autograd.grad(output.sum(), tensors))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_selective_recompute_is_exact(dropout: float) -> None:
    results = []
    for recompute in (False, True):
        single()
        config = decoder_config(
            num_query_groups=GROUPS,
            attention_dropout=dropout,
            recompute_granularity="selective" if recompute else None,
            recompute_modules=["core_attn"],
        )
        submodules = SelfAttentionSubmodules(
            ColumnParallelLinear, PackedDotProductAttention, RowParallelLinear
        )
        layer = SelfAttention(config, submodules, 1, AttnMaskType.causal)
        x = torch.randn(9, 1, 32, requires_grad=True)
        output, _ = layer(x, None, packed_seq_params=pack(4, 5))
        output.square().sum().backward()
        results.append((output, x.grad, layer.linear_qkv.weight.grad))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_refuses_what_it_would_get_wrong() -> None:
    tensors = inputs(6)
    attention = core(AttnMaskType.causal)
    with pytest.raises(ValueError, match="add up to 5 tokens but the pack has 6"):
        attention(*tensors, None, packed_seq_params=pack(3, 2))
    with pytest.raises(ValueError, match="no segment_lengths"):
        attention(*tensors, None, packed_seq_params=PackedSeqParams(qkv_format="thd"))
    with pytest.raises(ValueError, match="not a mask"):
        attention(*tensors, torch.ones(1, 1, 6, 6).bool())
    with pytest.raises(ValueError, match="causal or no_mask"):
        core(AttnMaskType.padding)
    with pytest.raises(ValueError, match="transformer_engine"):
        core(AttnMaskType.causal, window_size=(2, 0))
