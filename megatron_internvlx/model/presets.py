"""Named models: the Megatron flags of each language model and the settings that go with it.

A preset is a dictionary of argparse destinations, Megatron's and ours; anything on the command line
overrides it. Sources: the released models' config.json files, as far as they are public.
"""

from __future__ import annotations

from typing import Any

_LLAMA_LIKE: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "group_query_attention": True,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}


Shape = tuple[int, int, int, int, int]
"""Layers, hidden size, attention heads, key-value groups, MLP width."""


def _llm(
    shape: Shape, vocab: int, *, base: int, eps: float, positions: int = 32768, **extra: Any
) -> dict[str, Any]:
    layers, hidden, heads, kv, ffn = shape
    return _LLAMA_LIKE | {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": kv,
        "ffn_hidden_size": ffn,
        "vocab_size": vocab,
        "rotary_base": base,
        "layernorm_epsilon": eps,
        "max_position_embeddings": positions,
        **extra,
    }


def _internlm2(shape: Shape, vocab: int = 92553, **extra: Any) -> dict[str, Any]:
    return _llm(shape, vocab, base=1_000_000, eps=1e-5, conversation_template="internlm2-chat", **extra)


def _qwen2(shape: Shape, vocab: int = 151674, **extra: Any) -> dict[str, Any]:
    return _llm(shape, vocab, base=1_000_000, eps=1e-6, add_qkv_bias=True, **extra)


def _qwen3(shape: Shape, vocab: int = 151936, **extra: Any) -> dict[str, Any]:
    return _llm(
        shape, vocab, base=1_000_000, eps=1e-6, positions=40960, qk_layernorm=True, kv_channels=128, **extra
    )


_300M = {"vision_preset": "internvit_300m"}
_6B = {"vision_preset": "internvit_6b"}
_TINY_VISION = {"vision_preset": "internvit_tiny", "image_size": 224, "patch_size": 28}


def _lvtc(layers: int) -> dict[str, Any]:
    """LVTC of our recipes: expansion after a third of the layers, one more injection after half of them."""
    return {"expand_layer": layers // 3, "inject_layers": [layers // 2]}


PRESETS: dict[str, dict[str, Any]] = {
    # InternVL-X as released: PVTC, no LVTC.
    "internvlx_2b_released": _internlm2((24, 2048, 16, 8, 8192)) | _300M,
    "internvlx_8b_released": _internlm2((32, 4096, 32, 8, 14336)) | _300M,
    # The InternVL sizes with all three compressors.
    "internvlx_2b": _internlm2((24, 2048, 16, 8, 8192)) | _300M | _lvtc(24),
    "internvlx_8b": _internlm2((32, 4096, 32, 8, 14336)) | _300M | _lvtc(32),
    "internvlx_26b": _internlm2((48, 6144, 48, 8, 16384)) | _6B | _lvtc(48),
    "internvlx_40b": _llm((60, 7168, 56, 8, 20480), 64007, base=5_000_000, eps=1e-5, positions=4096)
    | {"conversation_template": "Hermes-2"}
    | _6B
    | _lvtc(60),
    "internvlx_78b": _qwen2((80, 8192, 64, 8, 29568)) | _6B | _lvtc(80),
    "internvlx_qwen2_7b": _qwen2((28, 3584, 28, 4, 18944)) | _300M | _lvtc(28),
    "internvlx_qwen3_8b": _qwen3((36, 4096, 32, 8, 12288)) | _300M | _lvtc(36),
    "internvlx_llama3_8b": _llm((32, 4096, 32, 8, 14336), 128265, base=500_000, eps=1e-5, positions=8192)
    | _300M
    | _lvtc(32),
    "internvlx_30b_a3b": _qwen3((48, 2048, 32, 4, 6144))
    | {
        "num_experts": 128,
        "moe_router_topk": 8,
        "moe_ffn_hidden_size": 768,
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-3,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
    }
    | _300M
    | _lvtc(48),
    # Small enough for a laptop; the first is what `make demo` trains. One shallow token per tile: at the demo's
    # learning rate forms are then learnt without the plateau that four tokens per tile show.
    "internvlx_demo": _qwen2((4, 128, 4, 2, 384), vocab=512)
    | {"vision_preset": "internvit_demo", "image_size": 112, "init_method_std": 0.06}
    | {"expand_layer": 2, "low_ratio": 0.125},
    "internvlx_tiny": _qwen2((6, 128, 4, 2, 352), vocab=512) | _TINY_VISION | {"expand_layer": 3},
    "internvlx_tiny_internlm2": _internlm2((6, 128, 4, 2, 352), vocab=512)
    | _TINY_VISION
    | {"expand_layer": 3},
    "internvlx_tiny_qwen3": _qwen3((6, 128, 4, 2, 352), vocab=512)
    | {"kv_channels": 32, "expand_layer": 3}
    | _TINY_VISION,
    "internvlx_tiny_llama": _llm((6, 128, 4, 2, 352), 512, base=500_000, eps=1e-5)
    | _TINY_VISION
    | {"expand_layer": 3},
}


def preset(name: str) -> dict[str, Any]:
    """Argparse defaults of a named model. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"--model-preset {name}: unknown; one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
