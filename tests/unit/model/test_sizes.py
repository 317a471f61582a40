"""One description of a model, whatever it is read from."""

import subprocess
import sys
from argparse import Namespace

import pytest

from megatron_internvlx.model.presets import PRESETS, preset
from megatron_internvlx.model.sizes import model_sizes, vision_config

TINY = preset("internvlx_tiny")


def test_sizes_need_neither_megatron_nor_torch() -> None:
    code = "import sys, megatron_internvlx.model.sizes; print({'torch', 'megatron'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_sizes(name: str) -> None:
    flags = preset(name)
    sizes = model_sizes(flags)
    assert sizes == model_sizes(Namespace(**flags))  # parsed arguments are read alike
    assert sizes.injection_layers[:1] == ((flags["expand_layer"],) if "expand_layer" in flags else ())
    assert sizes.shallow_layers == flags.get("expand_layer", 0)
    shallow = flags.get("low_ratio", 0.25) if sizes.lvtc else 0.5
    assert sizes.entry_grid == sizes.patches * shallow
    assert sizes.high_grid == sizes.patches // 2
    assert sizes.padded_vocab == sizes.vocab == flags["vocab_size"]
    assert (sizes.norm_tensors, sizes.gated, sizes.linear_bias, sizes.tied) == (1, True, False, False)
    assert list(sizes.expert_layers) == (list(range(sizes.layers)) if "num_experts" in flags else [])


def test_widths() -> None:
    sizes = model_sizes(TINY)  # 4 heads of 32, 2 groups; ViT of width 64 with 8 x 8 patches
    assert (sizes.query_width, sizes.key_width) == (128, 64)
    assert (sizes.patches, sizes.shuffled_width(4), sizes.features_per_tile) == (8, 4 * 64, 65 * 64)


def test_what_megatron_fills_in_counts() -> None:
    sizes = model_sizes(
        TINY
        | {"padded_vocab_size": 640, "num_experts": 4, "moe_layer_freq": [0, 1, 0, 0, 1, 0]}
        | {"group_query_attention": False, "normalization": "LayerNorm", "moe_router_topk": 2}
    )
    assert (sizes.vocab, sizes.padded_vocab, sizes.kv_groups, sizes.norm_tensors) == (512, 640, 4, 2)
    assert (set(sizes.expert_layers), sizes.topk, sizes.expert_ffn) == ({1, 4}, 2, 352)


def test_a_huge_model_is_described_at_once() -> None:
    """Numbers of a broken config.json are compared with its weights only afterwards."""
    sizes = model_sizes(TINY | {"num_layers": 10**9, "num_experts": 8})
    assert 10**9 - 1 in sizes.expert_layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_ratio": 0.3}, "--low-ratio 0.3 does not fit 8x8 patches"),
        ({"expand_layer": 6}, "--expand-layer 6 must be between 1 and 5"),
        ({"vision_preset": "eyes"}, "unknown vision encoder 'eyes'"),
    ],
)
def test_settings_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_sizes(TINY | changes)


def test_vision_config_follows_the_settings() -> None:
    vision = vision_config(
        {"vision_preset": "internvit_tiny", "image_size": 112, "select_layer": -2, "vision_drop_path": 0.1}
    )
    assert (vision.image_size, vision.patch_size, vision.select_layer) == (112, 14, -2)
    assert vision.drop_path_rate == 0.1
