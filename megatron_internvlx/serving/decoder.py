"""The decoder of an export in vLLM's layers: InternLM2, Qwen2, Qwen3, Qwen3-MoE or Llama, under Llama-like names.

Shapes: n rows, h width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from megatron_internvlx.hf.decoder_internvlx import Experts
from megatron_internvlx.serving.attention import DeepAttention, ShallowAttention
from megatron_internvlx.serving.phases import layer_parts, split_layers


class DecoderAttention(nn.Module):
    """Grouped-query attention with RoPE over vLLM's cache; `cache` makes the attention from its sizes."""

    def __init__(self, config: Any, prefix: str, cache: Any) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        d, heads, groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = d
        self.heads, self.groups = heads // ranks, max(1, groups // ranks)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, d, heads, groups, bias=config.family == "qwen2", prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = RowParallelLinear(heads * d, config.hidden_size, bias=False, prefix=f"{prefix}.o_proj")
        self.normed = config.family in ("qwen3", "qwen3_moe")
        if self.normed:
            self.q_norm = RMSNorm(d, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(d, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            d, max_position=config.max_position_embeddings, rope_parameters=dict(config.rope_parameters)
        )
        self.attn = cache(self.heads, d, d**-0.5, num_kv_heads=self.groups, prefix=f"{prefix}.attn")

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[n, h] at positions [n] -> [n, h]."""
        qkv, _ = self.qkv_proj(x)
        q, k, v = qkv.split([size * self.head_dim for size in (self.heads, self.groups, self.groups)], dim=-1)
        if self.normed:
            q = self.q_norm(q.unflatten(-1, (self.heads, -1)).contiguous()).flatten(1)
            k = self.k_norm(k.unflatten(-1, (self.groups, -1)).contiguous()).flatten(1)
        q, k = self.rotary_emb(positions, q.contiguous(), k.contiguous())
        return self.o_proj(self.attn(q, k, v))[0]


class DecoderMLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        h, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            h, [inner, inner], bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(inner, h, bias=False, prefix=f"{prefix}.down_proj")
        self.act = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, h] -> the same."""
        return self.down_proj(self.act(self.gate_up_proj(x)[0]))[0]


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, both residual."""

    def __init__(self, config: Any, prefix: str, cache: Any) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DecoderAttention(config, f"{prefix}.self_attn", cache)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Experts(config) if config.num_experts else DecoderMLP(config, f"{prefix}.mlp")

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[n, h] at positions [n] -> [n, h]."""
        x = x + self.self_attn(self.input_layernorm(x), positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class DecoderModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: Any, prefix: str, caches: list[Any]) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, f"{prefix}.layers.{index}", cache) for index, cache in enumerate(caches)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Decoder(nn.Module):
    """The language model.

    Args:
        config: its configuration, `InternVLXTextConfig`.
        tied: output layer and embedding share their weight.
        prefix: of its name.
        caches: a maker of attention for each layer, see `caches_of`.
    """

    def __init__(self, config: Any, tied: bool, prefix: str, caches: list[Any]) -> None:
        super().__init__()
        self.model = DecoderModel(config, f"{prefix}.model", caches)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=f"{prefix}.lm_head")
        if tied:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [n] -> [n, h]."""
        return self.model.embed_tokens(input_ids)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[n, h] -> logits [n, vocabulary]."""
        return self.logits_processor(self.lm_head, hidden)


def caches_of(layers: int, shallow: int, low: int, high: int, cache_config: Any) -> list[Any]:
    """A maker of attention for each of `layers` layers, the first `shallow` of which run `low` of `high` rows."""
    if not shallow:
        return [_maker(DeepAttention, cache_config=cache_config)] * layers
    counts = layer_parts(shallow, layers - shallow)
    parts: tuple[Any, Any] = ([None] * shallow, [None] * (layers - shallow))
    if counts is not None:
        parts = split_layers(shallow, counts[0]), split_layers(layers - shallow, counts[1])
    kept = {"cache_config": cache_config, "low": low, "high": high}
    return [_maker(ShallowAttention, part=part, **kept) for part in parts[0]] + [
        _maker(DeepAttention, part=part, cache_config=cache_config) for part in parts[1]
    ]


def _maker(kind: type[nn.Module], **fixed: Any) -> Any:
    return lambda *args, **kwargs: kind(*args, **fixed, **kwargs)
