"""The language models that can be converted: one row per family, read by import, export and verification.

A row says how a family differs from Llama. Its tensors are named in `mapping.py`, where most families share Llama's
names; examples/add_language_model shows the whole way from a new row to its test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Refused = tuple[tuple[str, tuple[Any, ...]], ...]


@dataclass(frozen=True)
class Family:
    """One family of decoders, as its config.json describes it."""

    architecture: str
    """Class of transformers, or of the model's remote code; config.json names it in `architectures`."""
    refused: Refused
    """Settings that change the numbers and that our decoder does not have: (key, the values that are fine). None
    is a key that is left out: fine where the default of transformers' class is."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Settings that are the same in every config.json of an export."""
    qkv_bias: bool = False
    """Queries, keys and values have biases."""
    qk_norm: bool = False
    """Queries and keys are normalised per head."""
    experts: bool = False
    """Mixture of experts, as Qwen3-MoE has it."""
    head_dim: int | None = None
    """Width of a head where config.json does not say it; None: hidden size / heads."""


_WINDOW = ("use_sliding_window", (False, None))
_NO_BIAS = ("attention_bias", (False, None))

FAMILIES = {
    "internlm2": Family("InternLM2ForCausalLM", (("bias", (False,)),), {"bias": False}),
    "qwen2": Family("Qwen2ForCausalLM", (_WINDOW,), qkv_bias=True),
    "qwen3": Family(
        "Qwen3ForCausalLM", (_WINDOW, _NO_BIAS), {"attention_bias": False}, qk_norm=True, head_dim=128
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        (
            _WINDOW,
            _NO_BIAS,
            ("decoder_sparse_step", (1, None)),
            ("mlp_only_layers", ([], None)),
            ("norm_topk_prob", (True,)),
        ),
        {"attention_bias": False},
        qk_norm=True,
        experts=True,
        head_dim=128,
    ),
    "llama": Family("LlamaForCausalLM", (_NO_BIAS, ("mlp_bias", (False, None))), {"attention_bias": False}),
}
