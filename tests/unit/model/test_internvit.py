import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.single import decoder_config, single  # isort: skip  (sets Megatron up)
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_internvlx.model import internvit_layers
from megatron_internvlx.model.attention import GraphSafeAttention
from megatron_internvlx.model.internvit import InternViT, internvit_transformer_config
from megatron_internvlx.model.internvit_config import PRESETS, InternViTConfig, internvit_preset
from megatron_internvlx.model.internvit_layers import LayerScaleDropPath
from megatron_internvlx.platform.packed_attention import attend_packed, graph_safe_kernels
from tests.golden_weights import GOLDEN

TINY = InternViTConfig(
    hidden_size=24,
    num_layers=4,
    num_heads=3,
    ffn_hidden_size=40,
    patch_size=4,
    image_size=12,
    initializer_range=0.2,
)


class Group:
    """Stands for the language model's tensor-parallel group of two."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 2


def build(
    vit: InternViTConfig = TINY,
    *,
    recompute: bool = False,
    group=None,
    seed: int = 1,
    attention: str = "megatron",
    **parent,
) -> InternViT:
    single(seed)
    return InternViT(
        vit,
        internvit_transformer_config(vit, decoder_config(**parent), recompute=recompute),
        group,
        attention,
    )


def tiles(count: int, size: int = 12) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def test_presets_are_the_released_architectures() -> None:
    released = json.loads((GOLDEN / "real_configs.json").read_text())
    config = released["InternViT-300M-448px (vision_config of InternVL2-2B/8B)"]["config"]
    assert InternViTConfig.from_hf(config) == PRESETS["internvit_300m"]
    assert PRESETS["internvit_300m"].to_hf() == config
    assert PRESETS["internvit_300m"].tokens_per_tile == released["geometry_448"]["vit_tokens"]
    for name in ("internlm2_tiny", "qwen2_tiny"):
        config = json.loads((GOLDEN / "models" / name / "config.json").read_text())["vision_config"]
        preset = {"internlm2_tiny": "internvit_tiny", "qwen2_tiny": "internvit_tiny_rms"}[name]
        assert InternViTConfig.from_hf(config) == PRESETS[preset]


def test_6b_has_25_heads_and_its_parameter_count() -> None:
    """5.54e9 parameters with 45 layers, 5.91e9 with 48, as InternVL's model zoo states (5.5B and 5.9B)."""
    for name, billions in (("internvit_6b", 5.54), ("internvit_6b_48l", 5.91)):
        vit = PRESETS[name]
        c, f = vit.hidden_size, vit.ffn_hidden_size
        layer = 4 * c * c + c + 2 * c * f + f + c + 2 * c + 2 * c + 2 * c
        total = vit.num_layers * layer + (vit.num_channels * vit.patch_size**2 + 2 + vit.tokens_per_tile) * c
        assert total == pytest.approx(billions * 1e9, rel=2e-3)
    assert vit.num_heads == 25


@pytest.mark.parametrize("preset", PRESETS)
def test_hf_round_trip(preset: str) -> None:
    assert InternViTConfig.from_hf(PRESETS[preset].to_hf()) == PRESETS[preset]


def test_impossible_settings() -> None:
    with pytest.raises(ValueError, match="not a multiple of num_heads 5"):
        replace(TINY, num_heads=5)
    with pytest.raises(ValueError, match=r"-5\.\.4"):
        replace(TINY, select_layer=5)
    with pytest.raises(ValueError, match="only 0 is"):
        InternViTConfig.from_hf({"dropout": 0.1})
    with pytest.raises(ValueError, match="internvit_300m"):
        internvit_preset("vit")
    with pytest.raises(ValueError, match="13x12 pixels"):
        build()(torch.zeros(1, 3, 13, 12))


def test_initial_weights_depend_on_the_seed_only() -> None:
    """Ranks of one tensor-parallel group, whose Megatron generators differ, draw the same weights."""
    first, second, other = build(), build(group=Group(1)), build(seed=2)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
    assert not torch.equal(first.embeddings.class_embedding, other.embeddings.class_embedding)
    assert first.encoder.layers[0].mlp.linear_fc1.weight.std().item() == pytest.approx(0.2, rel=0.1)
    assert first.encoder.layers[3].mlp.linear_fc2.bias.abs().max() == 0
    before = torch.get_rng_state()
    InternViT(TINY, first.config)
    assert torch.equal(torch.get_rng_state(), before), "building an encoder must not move the generator"


def test_parameters_are_marked_as_replicas() -> None:
    module = build()
    assert all(p.tile_parallel and not p.tensor_model_parallel for p in module.parameters())


def test_drop_path_rates_rise_over_the_layers() -> None:
    module = build(replace(TINY, drop_path_rate=0.3))
    rates = [layer.mlp_bda.drop_path_rate for layer in module.encoder.layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [layer.self_attn_bda.drop_path_rate for layer in module.encoder.layers] == rates


def test_drop_path_drops_whole_tiles_and_keeps_the_mean() -> None:
    single()
    end = LayerScaleDropPath(8, 0.5, 0.25, decoder_config())
    residual, branch = torch.randn(5, 4000, 8), torch.full((5, 4000, 8), 2.0)
    state = torch.get_rng_state()
    added = end(residual, branch) - residual
    assert torch.equal(torch.get_rng_state(), state), "the decoder's generator must not depend on the tiles"
    kept = added.abs().amax((0, 2)) > 0.5
    torch.testing.assert_close(added[:, kept], torch.full_like(added[:, kept], 1 / 0.75))
    assert added[:, ~kept].abs().max() < 1e-6
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert torch.equal(end.eval()(residual, branch), residual + 1)


@pytest.mark.parametrize("bf16", [False, True])
def test_recompute_is_exact_with_drop_path(bf16: bool) -> None:
    parent = {"bf16": True, "params_dtype": torch.bfloat16} if bf16 else {}
    results = []
    for recompute in (False, True):
        module = build(
            replace(TINY, drop_path_rate=0.5, qk_normalization=True), recompute=recompute, **parent
        )
        single(7)
        output = module(tiles(6))
        output.float().square().sum().backward()
        results.append((output, {n: p.grad for n, p in module.named_parameters()}))
    (output, grads), (output_again, grads_again) = results
    assert output.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert torch.equal(output, output_again)
    # A leaf sums its three gradients in another order; another drop-path mask gives differences above 0.1.
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_again[name], atol=0 if bf16 else 1e-3, rtol=1e-5, msg=name)


def test_positions_are_interpolated_for_other_sizes() -> None:
    module = build()
    assert module.embeddings.positions(3, 3) is module.embeddings.position_embedding
    wide = module.embeddings.positions(2, 5)
    assert wide.shape == (1, 11, 24)
    assert torch.equal(wide[:, 0], module.embeddings.position_embedding[:, 0])
    with torch.no_grad():
        module.embeddings.position_embedding[:, 1:] = 3.0
    torch.testing.assert_close(module.embeddings.positions(7, 4)[:, 1:], torch.full((1, 28, 24), 3.0))
    assert module(torch.zeros(2, 3, 8, 20)).shape == (2, 11, 24)


@pytest.mark.parametrize(("select", "run"), [(-1, 4), (4, 4), (-2, 3), (3, 3), (1, 1), (0, 0), (-5, 0)])
@pytest.mark.parametrize("recompute", [False, True])
def test_select_layer(select: int, run: int, recompute: bool) -> None:
    whole = build()
    module = build(replace(TINY, select_layer=select), recompute=recompute)
    module.load_state_dict(whole.state_dict())
    layers = whole.encoder.layers
    x = whole.embeddings(tiles(2)).transpose(0, 1)
    for layer in layers[:run]:
        x, _ = layer(hidden_states=x, attention_mask=None)
    output = module(tiles(2))
    torch.testing.assert_close(output, x.transpose(0, 1), atol=1e-6, rtol=0)
    output.square().sum().backward()
    for i, layer in enumerate(module.encoder.layers):
        assert all(
            p.requires_grad is (i < run) and (p.grad is None) is (i >= run) for p in layer.parameters()
        )


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_encoder_keeps_no_graph_but_drops_paths(recompute: bool) -> None:
    module = build(replace(TINY, drop_path_rate=0.9), recompute=recompute)
    module.freeze()
    output = module(tiles(8))
    assert not output.requires_grad
    assert not torch.equal(output, module(tiles(8)))
    module.eval()
    assert torch.equal(module(tiles(8)), module(tiles(8)))


@pytest.mark.parametrize("recompute", [False, True])
def test_evaluation_keeps_no_graph(recompute: bool) -> None:
    module = build(recompute=recompute)
    with torch.no_grad():
        assert not module(tiles(2)).requires_grad
        module.eval()
        assert not module(tiles(2)).requires_grad


def formula(qkv_STN3D: torch.Tensor) -> torch.Tensor:
    """Softmax attention of every tile and head, written out, `[S, T, N*D]`."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in qkv_STN3D.unbind(-2))
    weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
    return (weights @ v).permute(2, 0, 1, 3).flatten(2)


def test_torchs_attention_is_the_formula() -> None:
    """On the packed output of the projection; values and gradients, of which the packed buffer gets one."""
    core = build(attention="torch").encoder.layers[0].self_attention.core_attention
    assert type(core) is GraphSafeAttention
    qkv = torch.randn(10, 3, 3, 3, 8, dtype=torch.float64, requires_grad=True)
    ours, plain = attend_packed(core, qkv), formula(qkv)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)
    cotangent = torch.randn_like(ours)
    gradients = [torch.autograd.grad(x, qkv, cotangent)[0] for x in (ours, plain)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("qk_normalization", [False, True])
def test_torchs_attention_trains_alike(recompute: bool, qk_normalization: bool) -> None:
    """On the CPU it is the same operation, so the bits are the same, drop path and recomputation included."""
    vit = replace(TINY, drop_path_rate=0.5, qk_normalization=qk_normalization)
    results = []
    for attention in ("megatron", "torch"):
        module = build(vit, recompute=recompute, attention=attention)
        output = module(tiles(5))
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in module.parameters())])
    assert all(map(torch.equal, *results))


def test_torchs_attention_takes_the_place_of_transformer_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the attention itself does: the linear layers stay Transformer Engine's."""
    engine = SimpleNamespace(
        column_parallel_linear=lambda: lambda **_: "linear", core_attention=lambda: "attention"
    )
    monkeypatch.setattr(internvit_layers, "get_backend", lambda impl: {"transformer_engine": engine}[impl])
    config = SimpleNamespace(transformer_impl="transformer_engine", normalization="LayerNorm")
    found = {
        name: internvit_layers.internvit_block_spec(TINY, config, name)
        .layer_specs[0]
        .submodules.self_attention
        for name in ("megatron", "torch")
    }
    assert found["megatron"].submodules.core_attention == "attention"
    assert found["torch"].submodules.core_attention is GraphSafeAttention
    assert found["torch"].submodules.linear_qkv() == "linear"


def test_cudnns_attention_is_never_torchs_choice() -> None:
    asked = (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.flash_sdp_enabled)
    with graph_safe_kernels(torch.device("cuda")):
        assert [ask() for ask in asked] == [False, True]
        assert not torch.backends.cuda.math_sdp_enabled()
    assert isinstance(graph_safe_kernels(torch.device("cpu")), nullcontext)


@pytest.mark.parametrize("recompute", [False, True])
def test_no_tiles_give_zero_gradients(recompute: bool) -> None:
    """A rank without tiles still takes part in the sum of gradients."""
    module = build(replace(TINY, drop_path_rate=0.5, qk_normalization=True), recompute=recompute)
    output = module(tiles(0))
    assert output.shape == (0, 10, 24)
    output.sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_tiles_do_not_see_each_other() -> None:
    module = build()
    together = module(tiles(5))
    changed = tiles(5)
    changed[1:] += 1
    assert torch.equal(module(changed)[0], together[0])
    assert not torch.equal(module(changed)[1], together[1])
    # Another batch size takes other matrix kernels: 2.7e-6 of up to 7.9 on one machine, 0 on another.
    alone = torch.cat([module(tile[None]) for tile in tiles(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_checkpoint_has_one_writer_over_all_replicas(tmp_path) -> None:
    modules = [build(replace(TINY, qk_normalization=True), group=Group(rank)) for rank in (0, 1)]
    states = [module.sharded_state_dict(prefix="vision_model.") for module in modules]
    assert [{entry.replica_id for entry in state.values()} for state in states] == [{(0, 0, 0)}, {(0, 1, 0)}]
    tensors = [name for name, entry in states[0].items() if isinstance(entry, ShardedTensor)]
    assert len(tensors) == len(list(modules[0].parameters()))
    (tmp_path / "saved").mkdir()
    dist_checkpointing.save(states[0], str(tmp_path / "saved"))
    other = build(replace(TINY, qk_normalization=True, select_layer=-2), seed=9)
    loaded = dist_checkpointing.load(
        other.sharded_state_dict(prefix="vision_model."), str(tmp_path / "saved")
    )
    other.load_state_dict({name.removeprefix("vision_model."): tensor for name, tensor in loaded.items()})
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, modules[0].get_parameter(name)), name
