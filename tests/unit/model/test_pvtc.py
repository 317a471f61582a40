"""How a projector begins; its arithmetic is compared with the released code in `parity/test_pvtc.py`."""

from tests.single import decoder_config, single  # isort: skip  (sets Megatron up)
import pytest
import torch

from megatron_internvlx.model.pvtc import PVTC

HIDDEN, WIDTH, GRID, PATCHES = 64, 32, 4, 8


def build(**config: object) -> PVTC:
    single()
    return PVTC(decoder_config(hidden_size=HIDDEN, **config), WIDTH, grid=GRID, patches=PATCHES)


def test_cls_scale_begins_standard_normal() -> None:
    """As released; drawn with 0.02 the CLS queries of all windows of a tile would be nearly zero."""
    scale = build().cls_scale
    assert scale.shape == (1, GRID, GRID, HIDDEN)
    # 1,024 draws: the deviation's standard error is 0.022, the mean's 0.031.
    assert scale.std().item() == pytest.approx(1.0, abs=0.1)
    assert scale.mean().item() == pytest.approx(0.0, abs=0.15)


def test_linear_layers_begin_as_torch_begins_them() -> None:
    """Uniform within 1/sqrt(inputs), of the whole layer; norms begin with ones."""
    inputs = {"query_proj.linear": WIDTH * 4, "cls_proj.linear": WIDTH, "kv_proj.linear": WIDTH}
    for branch in ("attn_local", "attn_global"):
        inputs |= {f"{branch}.linear_{x}": HIDDEN for x in ("q", "k", "v", "proj", "gate", "up")}
        inputs[f"{branch}.linear_down"] = 4 * HIDDEN
    weights = {name: p for name, p in build().named_parameters() if name != "cls_scale"}
    for name, size in inputs.items():
        weight, bound = weights.pop(f"{name}.weight"), size**-0.5
        assert 0.99 * bound < weight.abs().max().item() <= bound, name
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
    assert all(name.split(".")[-2].startswith("norm") for name in weights)
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in weights.values())
