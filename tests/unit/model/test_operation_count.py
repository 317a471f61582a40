"""How many operations a micro-batch takes as the GPU runs it, and that they become no more.

The model has the layers of the 2B preset, 24 of vision and 24 of language, LVTC at layer 8 and an injection at 16, at
tiny widths. `MAIN` is what the same count gave before the kernels were fused (commit 3cdf19c):
separate biases and LayerScale, q, k, v joined from copies, Megatron's loss, all weight gradients added afterwards.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.unit.model.operations import accumulate, as_on_a_gpu  # isort: skip  (sets Megatron up)
import numpy as np
from megatron.core.tensor_parallel import layers

from megatron_internvlx.data.plan import IGNORE
from megatron_internvlx.model.internvit import InternViT, internvit_transformer_config
from megatron_internvlx.model.internvit_config import InternViTConfig
from megatron_internvlx.model.internvlx import InternVLX
from megatron_internvlx.platform import kernels
from tests.single import decoder_config, single
from tests.whole_model import micro_batch, plan_for, whole_model

VISION = InternViTConfig(
    hidden_size=16, num_layers=24, num_heads=2, ffn_hidden_size=32, patch_size=4, image_size=32
)
MAIN = {"vision": 1284, "projector": 165, "whole": 2714}
NOW = {"vision": 636, "projector": 99, "whole": 1746}
# Of other vision encoders: fields of the config, `--vision-attention`, and operations.
LIKE_6B = {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}
ENCODERS = {
    "torch's attention": ({}, "torch", 660),
    "RMS norm of tokens, queries and keys": (LIKE_6B, "megatron", 756),
    "both": (LIKE_6B, "torch", 756),
}


def build(**more: object) -> InternVLX:
    model = whole_model(
        VISION,
        vocab_size=64,
        rotary_base=10000,
        compression={"injection_layers": (8, 16), "low_grid": 2},
        num_layers=24,
        hidden_size=32,
        ffn_hidden_size=48,
        num_query_groups=2,
        bias_activation_fusion=True,
        **more,
    )
    for layer in model.language_model.decoder.layers:
        # Without dropout and bias Megatron's fused kernel is this addition.
        layer.self_attn_bda = layer.mlp_bda = lambda *_: lambda x_bias, residual, _rate: residual + x_bias[0]
    accumulate(model)
    return model


def count(fused: bool = True) -> dict[str, int]:
    """Operations of one micro-batch, forward and backward: of the vision encoder, a projector and all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_grad_accum_fusion_available", True)  # of Transformer Engine's layers, that is
        model = build(gradient_accumulation_fusion=fused).train()
    rng = np.random.default_rng(0)
    tokens = np.concatenate([np.zeros(32, int), rng.integers(1, 64, 24)])
    visual = np.arange(56) < 32
    plan = plan_for(model, [tokens], [np.where(visual, IGNORE, tokens)], [visual])
    batch = micro_batch(plan, torch.randn(2, 3, 32, 32))
    found = {}
    with as_on_a_gpu(fused) as mode:
        parts = {
            "vision": (model.vision_model, batch.tiles),
            "projector": (model.projector, torch.randn(2, 65, 16)),
        }
        for name, (part, x) in parts.items():
            mode.counts.clear()
            with mode:
                out = part(x.requires_grad_(name == "projector"))
                out.backward(out.detach())
            found[name] = mode.counts.total()
        mode.counts.clear()
        with mode:
            model(batch).sum().backward()
        found["whole"] = mode.counts.total()
    return found


def test_operations_stay_as_few_as_they_are() -> None:
    """Whoever needs fewer lowers `NOW`; more is a fusion lost."""
    assert count() == NOW


def count_encoder(fields: dict[str, object], attention: str) -> Counter[str]:
    """Operations of the vision encoder alone by name, forward and backward, and accumulation of gradients."""
    single()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_grad_accum_fusion_available", True)
        parent = decoder_config(gradient_accumulation_fusion=True)
        vision = replace(VISION, **fields)
        encoder = InternViT(vision, internvit_transformer_config(vision, parent), attention=attention)
    accumulate(encoder.train())
    with as_on_a_gpu(fused_accumulation=True) as mode:
        tiles = torch.randn(2, 3, 32, 32)
        with mode:
            out = encoder(tiles)
            out.backward(out.detach())
    return mode.counts


@pytest.mark.parametrize("name", ENCODERS)
def test_other_encoders_take_as_few_as_they_do(name: str) -> None:
    fields, attention, operations = ENCODERS[name]
    found = count_encoder(fields, attention)
    assert found.total() == operations, found


def test_they_fell_by_what_was_asked() -> None:
    assert NOW["vision"] <= 0.6 * MAIN["vision"]
    assert NOW["whole"] <= 0.7 * MAIN["whole"]


def test_an_unfused_branch_end_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def unfused(residual, branch, *, scale=None, **_):
        return residual + (branch if scale is None else branch * scale)

    monkeypatch.setattr(kernels, "add_branch", unfused)
    found = count()
    # Multiplication and addition for one kernel, and backward two products, a sum and the addition to `main_grad`.
    assert found["vision"] == NOW["vision"] + 24 * 4
