"""What an adapter adds to a weight, row by row, and the same adapter in Hugging Face names."""

import pytest
import torch

from megatron_internvlx.checkpoint.adapters import AdaptedWeight, adapted_weights, target_of_weight
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.hf_config import model_config
from megatron_internvlx.checkpoint.mapping import table
from megatron_internvlx.lora_settings import TARGETS, target_of
from megatron_internvlx.model.sizes import model_sizes
from tests.converting import FAMILIES, INTERNLM2, MARKS, Named, lvtc_config, native

RANK = 3


def adapted(config: dict, *targets: str) -> dict[str, AdaptedWeight]:
    marks = ["model."] if config["model_type"] == "internvl" else []
    ours = model_config({k: v for k, v in config.items() if k not in MARKS}, Named(*marks))
    sizes = model_sizes(ours.arguments)
    entries = table(sizes, ours.family, ours.layout)
    return {w.module: w for w in adapted_weights(sizes, entries, targets or TARGETS)}


def random_adapter(weight: AdaptedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    a, b = weight.shapes(RANK)
    return torch.randn(a, generator=generator), torch.randn(b, generator=generator)


LAYERS = {
    "grouped queries": (lvtc_config(), "language_model.decoder.layers.1.self_attention.linear_qkv"),
    "one matrix of all": (INTERNLM2, "language_model.decoder.layers.0.self_attention.linear_qkv"),
    "vision, one matrix": (INTERNLM2, "vision_model.encoder.layers.1.self_attention.linear_qkv"),
    "vision, separate": (native(), "vision_model.encoder.layers.1.self_attention.linear_qkv"),
    "gate and up": (lvtc_config(), "language_model.decoder.layers.3.mlp.linear_fc1"),
    "down": (lvtc_config(), "language_model.decoder.layers.3.mlp.linear_fc2"),
    "projector": (lvtc_config(), "projector.attn_local.linear_gate"),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_same_change_in_both_names(layer: str) -> None:
    """Row by row: row j of projection i gets B_j . (A_i x); Hugging Face's modules get the same matrix B A."""
    config, module = LAYERS[layer]
    weight = adapted(config)[module]
    a, b = random_adapter(weight)
    by_hand = torch.stack([b[j] @ a[i] for j, i in enumerate(weight.projections().tolist())])
    assert torch.allclose(weight.change(a, b, 2.0), 2 * by_hand, atol=1e-5)
    pairs = weight.to_theirs(a, b)
    theirs = [pair_b @ pair_a for pair_a, pair_b in pairs]
    assert torch.allclose(weight.entry.op.to_ours(theirs), by_hand, atol=1e-5)
    assert [tuple(t.shape) for t in theirs] == list(weight.entry.shapes)
    again = weight.from_theirs(pairs, RANK, seed=1)
    assert torch.equal(again[0], a) and torch.equal(again[1], b)


def test_rows_of_queries_keys_and_values() -> None:
    """Eight heads of width 8 in four groups: two heads of queries, one of keys, one of values each."""
    weight = adapted(lvtc_config())["language_model.decoder.layers.0.self_attention.linear_qkv"]
    assert weight.projections().tolist() == ([0] * 16 + [1] * 8 + [2] * 8) * 4
    vision = adapted(INTERNLM2)["vision_model.encoder.layers.0.self_attention.linear_qkv"]
    assert vision.projections().tolist() == ([0] * 16 + [1] * 16 + [2] * 16) * 2


def test_projection_without_an_adapter_gets_one_that_adds_zero() -> None:
    weight = adapted(lvtc_config())["language_model.decoder.layers.0.self_attention.linear_qkv"]
    a, b = random_adapter(weight)
    q, _, v = weight.to_theirs(a, b)
    again_a, again_b = weight.from_theirs([q, None, v], RANK, seed=1)
    of = weight.projections()
    assert torch.equal(again_b[of != 1], b[of != 1]) and not again_b[of == 1].any()
    assert torch.equal(again_a[0], a[0]) and 0 < float(again_a[1].abs().max()) <= 64**-0.5
    assert torch.equal(again_a, weight.from_theirs([q, None, v], RANK, seed=1)[0])
    assert not torch.equal(again_a, weight.from_theirs([q, None, v], RANK, seed=2)[0])


def test_one_adapter_of_a_fused_matrix_is_shared_by_its_projections() -> None:
    weight = adapted(INTERNLM2)["language_model.decoder.layers.0.self_attention.linear_qkv"]
    generator = torch.Generator().manual_seed(6)
    a, b = torch.randn(RANK, 64, generator=generator), torch.randn(128, RANK, generator=generator)
    ours = weight.from_theirs([(a, b)], RANK, seed=1)
    assert torch.allclose(weight.change(*ours, 1.0), weight.entry.op.to_ours([b @ a]), atol=1e-5)
    (wide_a, wide_b) = weight.to_theirs(*ours)[0]
    assert wide_a.shape == (3 * RANK, 64) and wide_b.shape == (128, 3 * RANK)
    wide_b[0, -1] = 1.0  # a query that meets the values' A
    with pytest.raises(ConversionError, match=r"attention.wqkv.weight: its adapter has rank 9, the others 3"):
        weight.from_theirs([(wide_a, wide_b)], RANK, seed=1)


def test_targets_are_those_of_training() -> None:
    """Only weights of the layers beside which training puts adapters, and of all targets some."""
    for config in (lvtc_config(), INTERNLM2, native(), FAMILIES["qwen3_moe"]):
        marks = ["model."] if config["model_type"] == "internvl" else []
        ours = model_config(config, Named(*marks))
        found = set()
        for entry in table(model_sizes(ours.arguments), ours.family, ours.layout):
            layer, _, leaf = entry.ours.rpartition(".")
            there = target_of(layer)
            found.add(there)
            assert target_of_weight(entry.ours) == (there if leaf == "weight" else None), entry.ours
        experts = {"decoder_mlp"} if "moe" in ours.family else set()
        assert found - {None} == set(TARGETS) - experts
