"""Table of the language models that can be converted, used by import, export and verification.

A row describes how a family differs from Llama. `mapping.py` has the names of its tensors, which for most families
are Llama's; examples/add_language_model shows all steps from a new row to its test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Refused = tuple[tuple[str, tuple[Any, ...]], ...]


@dataclass(frozen=True)
class Family:
    """Family of decoders, as described by its config.json."""

    architecture: str
    """Class of transformers or of the model's remote code, as in `architectures` of config.json."""
    refused: Refused
    """Settings that affect results and that our decoder lacks: (key, supported values). None is a missing key,
    supported if the default of transformers' class is."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Settings that are the same in every config.json of an export."""
    qkv_bias: bool = False
    """Queries, keys and values have biases."""
    qk_norm: bool = False
    """Queries and keys are normalised per head."""
    experts: bool = False
    """Mixture of experts, as in Qwen3-MoE."""
    head_dim: int | None = None
    """Width of a head if config.json does not set it; None: hidden size / heads."""


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
