"""Seed-OSS as a language model of InternVL-X: what a new family adds, and a conversion with it.

    python examples/add_language_model/seed_oss.py HF_DIRECTORY CHECKPOINT

README.md beside this file says where each part goes in the package. Here they are added to a running program.
"""

import argparse
from pathlib import Path
from typing import Any

from megatron_internvlx.checkpoint.families import FAMILIES, Family
from megatron_internvlx.checkpoint.importer import import_checkpoint
from megatron_internvlx.model.presets import PRESETS, preset

# Into checkpoint/families.py. Llama, but q, k and v have biases, and a head is wider than hidden size / heads.
NAME = "seed_oss"
FAMILY = Family(
    "SeedOssForCausalLM",
    refused=(
        ("attention_bias", (True, None)),
        ("attention_out_bias", (False, None)),
        ("mlp_bias", (False, None)),
    ),
    written={"attention_bias": True, "attention_out_bias": False},
    qkv_bias=True,
    head_dim=128,
)

# Into model/presets.py. The sizes are those of Seed-OSS-36B's config.json; LVTC is placed as in our other presets.
PRESET_NAME = "internvlx_seed_oss_36b"
PRESET: dict[str, Any] = preset("internvlx_qwen2_7b") | {
    "num_layers": 64,
    "hidden_size": 5120,
    "num_attention_heads": 80,
    "num_query_groups": 8,
    "kv_channels": 128,
    "ffn_hidden_size": 27648,
    "vocab_size": 155136,
    "rotary_base": 10_000_000,
    "expand_layer": 64 // 3,
    "inject_layers": [64 // 2],
}


def register() -> None:
    """Adds the family and its preset to this process."""
    FAMILIES[NAME] = FAMILY
    PRESETS[PRESET_NAME] = PRESET


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Import a Hugging Face directory whose decoder is Seed-OSS.")
    parser.add_argument("hf", type=Path, help="directory with config.json and weights")
    parser.add_argument("checkpoint", type=Path, help="directory to write")
    arguments = parser.parse_args()
    register()
    # One process: others would be started anew, without the row.
    import_checkpoint(arguments.hf, arguments.checkpoint, processes=1)
