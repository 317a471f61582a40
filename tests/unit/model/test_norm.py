import pytest
import torch

from tests.single import decoder_config  # isort: skip  (sets Megatron up)
from megatron_internvlx.model.norm import LayerNorm, RMSNorm, norm_builder


def test_rms_norm_in_fp32() -> None:
    x = torch.randn(5, 3, 16) * 1e-3  # small enough that eps matters
    norm = norm_builder("RMSNorm", "local")(config=decoder_config(), hidden_size=16, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    assert torch.allclose(norm(x), torch.nn.functional.rms_norm(x, (16,), norm.weight, 1e-6), atol=1e-6)


def test_rms_norm_casts_before_the_weight() -> None:
    """The released order: statistics in fp32, cast to bf16, then times the weight."""
    x = torch.randn(64, 32).bfloat16()
    norm = RMSNorm(decoder_config(bf16=True, params_dtype=torch.bfloat16), 32, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x32 = x.float()
    normalized = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), norm.weight * normalized.bfloat16())
    assert not torch.equal(norm(x), (norm.weight.float() * normalized).bfloat16())


def test_layer_norm_has_torchs_names_and_values() -> None:
    ours = norm_builder("LayerNorm", "local")(config=decoder_config(), hidden_size=8, eps=1e-6)
    torchs = torch.nn.LayerNorm(8, eps=1e-6)
    torch.nn.init.normal_(torchs.weight)
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(4, 8)
    assert torch.equal(ours(x), torchs(x))


@pytest.mark.parametrize("parallel", [False, True])
def test_weights_carry_sequence_parallel(parallel: bool) -> None:
    config = decoder_config(tensor_model_parallel_size=2, sequence_parallel=parallel)
    norm = LayerNorm(config, 8)
    assert norm.weight.sequence_parallel is parallel
    assert norm.bias.sequence_parallel is parallel
    assert RMSNorm(config, 8).weight.sequence_parallel is parallel


def test_unknown_kinds() -> None:
    with pytest.raises(ValueError, match="RMSNorm, LayerNorm"):
        norm_builder("BatchNorm", "local")
    with pytest.raises(ValueError, match="local or transformer_engine"):
        norm_builder("RMSNorm", "other")
    with pytest.raises(ValueError, match="zero-centered"):
        RMSNorm(decoder_config(layernorm_zero_centered_gamma=True), 8)
