"""config.json to arguments: what is read, what is refused, and that writing it again changes nothing."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.families import FAMILIES as ROWS
from megatron_internvlx.checkpoint.hf_config import (
    family_of,
    model_config,
    vision_arguments,
)
from megatron_internvlx.checkpoint.hf_write import chat_config
from megatron_internvlx.model.internvit_config import InternViTConfig, internvit_preset
from megatron_internvlx.model.sizes import model_sizes, vision_config
from tests.converting import FAMILIES, MARKS, Named, lvtc_config
from tests.golden_weights import GOLDEN


def read(config: dict[str, Any], *names: str):
    return model_config(config, Named(*names))


def changed(family: str, part: str | None = None, **fields: Any) -> dict[str, Any]:
    config = json.loads(json.dumps({k: v for k, v in FAMILIES[family].items() if k not in MARKS}))
    (config[part] if part else config).update(fields)
    return config


def left_out(family: str, key: str) -> dict[str, Any]:
    """The config.json without a setting of the decoder."""
    config = changed(family)
    del config["llm_config"][key]
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed("llama", model_type="llava"), "'llava'.*internvl_chat, internvlx or internvl"),
        (changed("llama", "llm_config", architectures=["GemmaForCausalLM"], model_type="gemma"), "GemmaFor"),
        (changed("internlm2", "llm_config", bias=True), "llm_config.bias = True"),
        (changed("qwen2_tied", "llm_config", use_sliding_window=True), "use_sliding_window"),
        (changed("llama", "llm_config", hidden_act="gelu"), "only silu"),
        (changed("llama", "llm_config", rope_scaling={"type": "linear", "factor": 2.0}), "RoPE scaling"),
        (changed("qwen3_moe", "llm_config", norm_topk_prob=False), "norm_topk_prob = False is not"),
        (left_out("qwen3_moe", "norm_topk_prob"), r"norm_topk_prob = \(default\) is not"),
        (left_out("internlm2", "bias"), r"llm_config.bias = \(default\)"),
        (changed("llama", force_image_size=32), "force_image_size 32"),
        (changed("llama", "vision_config", hidden_act="relu"), "hidden_act"),
        (changed("native", vision_feature_select_strategy="full"), "vision_feature_select_strategy"),
        ({"model_type": "internvl_chat", "llm_config": {}}, "vision_config is missing"),
    ],
)
def test_what_is_not_supported_says_so(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        read(config)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "llama"])
def test_a_setting_that_is_left_out_is_the_default_of_transformers(family: str) -> None:
    theirs = AutoConfig.for_model(family)
    for key, fine in ROWS[family].refused:
        assert (None in fine) is (getattr(theirs, key) in fine), key


def test_dynamic_rope_scaling_is_plain_within_the_trained_length() -> None:
    found = read(changed("internlm2", "llm_config", rope_scaling={"type": "dynamic", "factor": 2.0}))
    assert "use_rope_scaling" not in found.arguments


def test_llama3_rope_scaling() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = scaling | {"original_max_position_embeddings": 8192}
    found = read(changed("llama", "llm_config", rope_scaling=rope)).arguments
    assert found["use_rope_scaling"]
    assert found["rope_scaling_factor"] == 8.0
    again = chat_config(found, "llama", False, "float32")
    assert read(again).arguments == found


def test_stored_output_layer_decides_about_a_tie_that_is_claimed() -> None:
    config = changed("native", tie_word_embeddings=True)
    head = "lm_head.weight"

    class Different(Named):
        def equal(self, first: str, second: str) -> bool:
            return False

    assert read(config, "model.").tied
    assert read(config, "model.", head).tied
    assert not model_config(config, Different("model.", head)).tied


def test_older_native_names() -> None:
    assert read(changed("native"), "vision_tower.embeddings.cls_token").layout == "native_old"


@pytest.mark.parametrize("family", [f for f in FAMILIES if FAMILIES[f]["model_type"] == "internvl_chat"])
def test_written_config_reads_the_same(family: str) -> None:
    marks = ["projector.cls_scale"] if family == "internvlx" else []
    found = read(changed(family), *marks)
    again = read(chat_config(found.arguments, found.family, found.tied, found.dtype), *marks)
    assert again == replace(found, remarks=())  # written, the tile rule has its name


def test_family_of_a_model_trained_from_scratch() -> None:
    for family in ("qwen2_tied", "qwen3", "qwen3_moe", "llama"):
        found = read(changed(family))
        assert family_of(found.arguments) == found.family


def test_lvtc_sizes() -> None:
    found = read(lvtc_config(), "projector.cls_scale")
    sizes = model_sizes(found.arguments)
    assert (sizes.entry_grid, sizes.high_grid, sizes.injection_layers) == (1, 2, (1, 2))


@pytest.mark.parametrize(
    "vision",
    [
        internvit_preset("internvit_300m"),
        internvit_preset("internvit_6b", image_size=224),
        internvit_preset("internvit_6b_48l", select_layer=-4),
        InternViTConfig(hidden_size=48, num_layers=5, num_heads=3, ffn_hidden_size=100, image_size=70),
    ],
)
def test_any_vision_encoder_has_arguments(vision: InternViTConfig) -> None:
    arguments = vision_arguments(vision)
    assert vision_config(arguments) == vision
    assert ("vision_overrides" in arguments) is (vision.hidden_size == 48)


def test_golden_config() -> None:
    config = json.loads((GOLDEN / "models" / "internlm2_tiny" / "config.json").read_text())
    found = read(config, "projector.cls_scale").arguments
    assert (found["rotary_base"], found["layernorm_epsilon"]) == (1000000, 1e-5)
    assert (found["projector"], found["rvtc"], found["vision_preset"]) == ("pvtc", "edge", "internvit_tiny")
    assert (found["conversation_template"], found["max_tiles"]) == ("internlm2-chat", 6)


@pytest.mark.parametrize(
    ("fields", "rule", "said"),
    [
        (
            {},
            "edge",
            r"the rule of the released InternVL-X code: .* names none; 1 to 6 tiles .* and a thumbnail",
        ),
        ({"dynamic_image_size": False}, "edge", "names none; one tile per image"),
        # Of an export from before the released rule was called edge.
        ({"rvtc": "area"}, "edge", "which was called area when"),
        ({"rvtc": "edge"}, "edge", None),
        ({"rvtc": "area", "rvtc_version": 2}, "area", None),
        ({"rvtc": "off"}, "off", None),
    ],
)
def test_tile_rule(fields: dict[str, Any], rule: str, said: str | None) -> None:
    found = read(changed("llama", max_dynamic_patch=6, **fields), "projector.cls_scale")
    assert found.arguments["rvtc"] == rule
    assert (
        [bool(re.search(said, remark)) for remark in found.remarks] == [True] if said else not found.remarks
    )


def test_tile_rule_of_a_later_version_is_refused() -> None:
    with pytest.raises(ConversionError, match="rvtc_version is 3; it must be 1 or 2"):
        read(changed("llama", rvtc="area", rvtc_version=3), "projector.cls_scale")
