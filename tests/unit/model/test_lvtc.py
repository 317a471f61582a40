"""The whole model against an independent plain PyTorch implementation (fp32, CPU, one thread).

Measured worst absolute differences over all cases: losses 2.2e-6 (of up to 7), logits 5.5e-6, gradients
1.6e-6.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.whole_model import micro_batch, plan_for, whole_model  # isort: skip  (sets Megatron up)
from megatron_internvlx.data.plan import SequencePlan
from megatron_internvlx.model.internvit_config import InternViTConfig
from megatron_internvlx.model.internvlx import InternVLX
from tests.unit.model import lvtc_reference as reference

TOLERANCE = 1e-5
VOCABULARY, HIDDEN, LAYERS = 61, 32, 4
# 4x4 patches per tile with 1x1 shallow and 2x2 deep tokens, or 8x8 with 2x2 (1x1) and 4x4. Only from 2x2 on
# do bilinear and nearest upsampling differ.
SMALL = InternViTConfig(
    hidden_size=16, num_layers=1, num_heads=2, ffn_hidden_size=24, patch_size=4, image_size=16
)
LARGE = replace(SMALL, image_size=32)


def random_weights(model: InternVLX, seed: int) -> dict[str, Tensor]:
    """Overwrites every parameter, so that no gradient hides behind a 0 or a 1; returns copies."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            drawn = 0.2 * drawn + (0 if name.endswith("bias") else 1)
        elif name.endswith("linear.weight") or "linear_" in name or "output_layer" in name:
            drawn = drawn * parameter.shape[1] ** -0.5
        else:
            drawn = 0.25 * drawn
        parameter.data.copy_(drawn)
    return {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}


def sample(rng: np.random.Generator, tiles: int, per_tile: int, size: int) -> reference.Sample:
    """Text, tiles (in two groups if there are several) and two answers; the last token supervised."""
    ids, labels, visual = [], [], []

    def text(count: int, *, answer: bool = False) -> None:
        new = rng.integers(1, VOCABULARY, count).tolist()
        ids.extend(new)
        labels.extend(new if answer else [-100] * count)
        visual.extend([False] * count)

    def image(count: int) -> None:
        ids.extend([0] * count * per_tile)
        labels.extend([-100] * count * per_tile)
        visual.extend([True] * count * per_tile)

    text(int(rng.integers(1, 4)))
    image(tiles - tiles // 2)
    text(2)
    text(2, answer=True)
    image(tiles // 2)
    text(1)
    text(int(rng.integers(1, 4)), answer=True)
    pixels = torch.from_numpy(rng.standard_normal((tiles, 3, size, size)).astype(np.float32))
    return reference.Sample(ids, labels, visual, pixels)


def both(
    vit: InternViTConfig, compression: dict, *, tied: bool = False, **decoder
) -> tuple[InternVLX, reference.Model, dict[str, Tensor]]:
    """Our model, the reference's description of it, and the weights of both."""
    model = whole_model(
        vit,
        vocab_size=VOCABULARY,
        rotary_base=1000,
        compression=compression,
        share_embeddings_and_output_weights=tied,
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=40,
        num_attention_heads=4,
        num_query_groups=2,
        **decoder,
    )
    sizes, config = model.sizes, model.config
    described = reference.Model(
        patches=vit.patches_per_side,
        patch_size=vit.patch_size,
        vision_layers=vit.num_layers,
        vision_heads=vit.num_heads,
        layers=LAYERS,
        heads=4,
        groups=2,
        head_width=config.kv_channels,
        rotary_base=1000,
        norm_eps=config.layernorm_epsilon,
        low_grid=sizes.low_grid,
        high_grid=sizes.high_grid,
        injection_layers=sizes.injection_layers,
        upsample=sizes.upsample,
        projector=sizes.projector,
        transposed_query=sizes.pixel_shuffle_version == "v1",
    )
    return model, described, random_weights(model, seed=3)


def batch_plan(model: InternVLX, samples: list[reference.Sample], **settings) -> SequencePlan:
    arrays = [(np.array(s.ids), np.array(s.labels), np.array(s.visual)) for s in samples]
    return plan_for(model, *map(list, zip(*arrays, strict=True)), **settings)


def worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item() if a.numel() else 0.0


def compare(
    model: InternVLX, described: reference.Model, weights: dict[str, Tensor], tiles: list[int], **settings
) -> dict[str, float]:
    """Asserts equality on a micro-batch of samples with so many tiles; returns the differences."""
    rng = np.random.default_rng(sum(tiles) + 10 * len(tiles))
    size = described.patches * described.patch_size
    samples = [sample(rng, n, described.high_grid**2, size) for n in tiles]
    plan = batch_plan(model, samples, **settings)
    batch = micro_batch(plan, torch.cat([s.tiles for s in samples]))
    losses, logits = reference.run(weights, described, samples)
    found = {"losses": worst(model.train()(batch), losses)}
    real = sum(len(s.ids) for s in samples)
    with torch.no_grad():
        found["logits"] = worst(model(batch, return_logits=True)[:real], logits)
        evaluated = model.eval()(batch)
    found["evaluation"] = worst(evaluated[0], losses)

    # Every row with its own weight, so that exchanged rows show.
    factors = torch.from_numpy(rng.uniform(0.5, 1.5, len(losses)).astype(np.float32)) / len(losses)
    model.zero_grad()
    (model.train()(batch) * factors).sum().backward()
    expected = torch.autograd.grad((losses * factors).sum(), list(weights.values()), allow_unused=True)
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        assert parameter.grad is not None, f"{name} has no gradient"
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        found[f"gradient of {name}"] = worst(parameter.grad, gradient)
        if any(tiles):
            assert gradient.abs().max() > 0, f"{name} is not tested"
    bad = {name: value for name, value in found.items() if not value < TOLERANCE}
    assert not bad, bad
    assert evaluated[1].tolist() == logits[plan.loss_rows].argmax(-1).tolist()
    return found


LOW_HIGH = {"small": (SMALL, 1, 2), "large": (LARGE, 2, 4), "quarter": (LARGE, 1, 4)}
MIXED = [1, 0, 7]


def lvtc(size: str, layers: tuple[int, ...], upsample: str = "bilinear", **more) -> tuple:
    vit, low, high = LOW_HIGH[size]
    settings = {"low_grid": low, "high_grid": high, "injection_layers": layers, "upsample": upsample}
    return both(vit, settings | more.pop("compression", {}), **more)


@pytest.mark.parametrize(
    ("layers", "upsample"),
    [
        ((1,), "bilinear"),
        ((2,), "nearest"),
        ((3,), "bilinear"),
        ((1, 2), "nearest"),
        ((2, 3), "bilinear"),
        ((1, 2, 3), "bilinear"),
        ((1, 2, 3), "nearest"),
    ],
)
def test_every_place_of_the_injections(layers: tuple[int, ...], upsample: str) -> None:
    """Expansion at the second, a middle and the last layer; one to three projectors; 0, 1 and 7 tiles."""
    compare(*lvtc("large", layers, upsample), MIXED)


@pytest.mark.parametrize("upsample", ["bilinear", "nearest"])
def test_four_times_the_side(upsample: str) -> None:
    compare(*lvtc("quarter", (1, 3), upsample), [0, 2])


@pytest.mark.parametrize("tiles", [[0], [0, 0], [1], [7, 0, 1]])
def test_packs(tiles: list[int]) -> None:
    compare(*lvtc("small", (1, 2)), tiles)


@pytest.mark.parametrize("tiles", [MIXED, [0]])
def test_padding_changes_nothing(tiles: list[int]) -> None:
    """Aligned lengths, static budgets and blank tiles."""
    model = lvtc("small", (1, 2))
    compare(*model, tiles, alignment=16, tile_multiple=4)
    compare(*model, tiles, shallow_length=96, deep_length=160, tile_budget=10)


def test_a_budget_of_supervised_rows_changes_nothing() -> None:
    """Loss and gradients of static packs, whose padding rows weigh nothing: 1e-6 of the largest element.

    Measured: all are bit-equal. A hundredth of a token's weight on each padding row exceeds it.
    """
    model = lvtc("small", (1, 2))[0]
    rng = np.random.default_rng(8)
    samples = [sample(rng, n, 4, SMALL.image_size) for n in MIXED]
    tiles = torch.cat([s.tiles for s in samples])
    static = {"shallow_length": 96, "deep_length": 160, "tile_budget": 10, "sample_budget": 4}
    seen = []
    for most in (None, 16, sum(np.sum(np.array(s.labels) != -100) for s in samples)):
        batch = micro_batch(batch_plan(model, samples, **static, supervised_budget=most), tiles)
        losses = model.train()(batch)
        assert len(losses) == (most or 96)
        model.zero_grad()
        loss = (losses * batch.plan.loss_weights).sum()
        loss.backward()
        seen.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    (loss, gradients), *others = seen
    for found, grads in others:
        assert found == pytest.approx(loss, rel=1e-6)
        for gradient, grad in zip(gradients, grads, strict=True):
            assert worst(gradient, grad) <= 1e-6 * gradient.abs().max()


def test_v1_pixel_shuffle() -> None:
    compare(*lvtc("large", (2, 3), compression={"pixel_shuffle_version": "v1"}), [0, 1])


def test_mlp_projector() -> None:
    """InternVL's projector in the place of PVTC, at every injection."""
    compare(*lvtc("small", (1, 2, 3), compression={"projector": "mlp"}), MIXED)
    compare(*both(SMALL, {"projector": "mlp"}), MIXED)


def test_lvtc_off() -> None:
    compare(*both(SMALL, {}), MIXED)
    compare(*both(SMALL, {}), [0])


@pytest.mark.parametrize(
    "family",
    [
        {"add_qkv_bias": True},  # Qwen2
        {"qk_layernorm": True, "kv_channels": 16},  # Qwen3: heads wider than hidden_size / heads
        {"tied": True},
    ],
    ids=str,
)
def test_language_model_families(family: dict) -> None:
    compare(*lvtc("small", (1, 3), **family), MIXED)
    compare(*both(SMALL, {}, **family), [2, 0])


@pytest.mark.parametrize("error", ["upsampling", "projector", "positions"])
def test_the_tolerance_sees_errors(error: str) -> None:
    model, described, weights = lvtc("large", (1, 2))
    if error == "upsampling":
        described = replace(described, upsample="nearest")
    elif error == "projector":
        described = replace(described, transposed_query=True)
    else:
        described = replace(described, rotary_base=1001)
    with pytest.raises(AssertionError, match="losses"):
        compare(model, described, weights, [0, 1])


@pytest.mark.parametrize("frozen", ["vision", "all but the projectors"])
def test_freezing_changes_no_other_gradient(frozen: str) -> None:
    model, described, weights = lvtc("small", (1, 2))
    compare(model, described, weights, [1, 2])
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        keep = "projector" in name if "all" in frozen else not name.startswith("vision_model.")
        parameter.requires_grad_(keep)
    model.freeze_vision = True
    rng = np.random.default_rng(3 + 20)
    samples = [sample(rng, n, 4, 16) for n in (1, 2)]
    batch = micro_batch(batch_plan(model, samples), torch.cat([s.tiles for s in samples]))
    losses = model.train()(batch)
    factors = torch.from_numpy(rng.uniform(0.5, 1.5, len(losses)).astype(np.float32)) / len(losses)
    model.zero_grad()
    (losses * factors).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, whole[name]), name
        else:
            assert parameter.grad is None
