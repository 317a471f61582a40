"""A Llama-like decoder whose layers can be run one by one (remote code of this directory).

Shapes: B rows of the batch, n new positions, m = cached + n positions, h width, d width of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .vision_internvlx import RMSNorm


def inverse_frequencies(config):
    """RoPE frequencies [d/2]: plain, or with Llama 3's scaling."""
    rope, d = config.rope_parameters, config.head_dim
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float32) / d))
    if rope.get("rope_type", "default") != "llama3":
        return frequencies
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    length = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    scaled = torch.where(wavelength > length / low, frequencies / factor, frequencies)
    smooth = (length / wavelength - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    return torch.where((wavelength >= length / high) & (wavelength <= length / low), between, scaled)


def rotate(x, cos, sin):
    """Rotate [B, heads, n, d] by positions; the two halves of a head belong together."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Phase:
    """Positions and mask of the new rows in one phase of the decoder.

    Args:
        valid: bool [B, m], True at rows that are no padding, cached ones first.
        new: n, how many of them are new.
        config: of the decoder.
        dtype: of cos and sin.
    """

    def __init__(self, valid, new, config, dtype):
        positions = (valid.long().cumsum(dim=1) - 1).clamp(min=0)[:, -new:]
        angles = positions[..., None].float() * inverse_frequencies(config).to(valid.device)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        total = valid.shape[1]
        column = torch.arange(total, device=valid.device)
        row = torch.arange(total - new, total, device=valid.device)[:, None]
        # A padding row sees itself, so that its softmax is not empty.
        self.mask = ((column <= row) & valid[:, None, :] | (column == row))[:, None]


class Attention(nn.Module):
    """Grouped-query attention with RoPE and a cache."""

    def __init__(self, config, index):
        super().__init__()
        h, d = config.hidden_size, config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        bias = config.family == "qwen2"
        self.index, self.head_dim = index, d
        self.grouped = heads != groups
        self.q_proj = nn.Linear(h, heads * d, bias=bias)
        self.k_proj = nn.Linear(h, groups * d, bias=bias)
        self.v_proj = nn.Linear(h, groups * d, bias=bias)
        self.o_proj = nn.Linear(heads * d, h, bias=False)
        self.normed = config.family in ("qwen3", "qwen3_moe")
        if self.normed:
            self.q_norm = RMSNorm(d, config.rms_norm_eps)
            self.k_norm = RMSNorm(d, config.rms_norm_eps)

    def forward(self, x, phase, cache):
        """[B, n, h] -> the same."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        q, k = rotate(q, phase.cos, phase.sin), rotate(k, phase.cos, phase.sin)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=phase.mask, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, h, inner):
        super().__init__()
        self.gate_proj = nn.Linear(h, inner, bias=False)
        self.up_proj = nn.Linear(h, inner, bias=False)
        self.down_proj = nn.Linear(inner, h, bias=False)

    def forward(self, x):
        """[..., h] -> the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """A router that sends every row to its best experts; their weights sum to one."""

    def __init__(self, config):
        super().__init__()
        self.topk = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            GatedMLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, x):
        """[B, n, h] -> the same."""
        rows = x.flatten(0, -2)
        scores, chosen = self.gate(rows).topk(self.topk, dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(x.dtype)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            at, slot = (chosen == number).nonzero(as_tuple=True)
            if len(at):
                out.index_add_(0, at, expert(rows[at]) * weights[at, slot, None])
        return out.view_as(x)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, both residual."""

    def __init__(self, config, index):
        super().__init__()
        h = config.hidden_size
        self.input_layernorm = RMSNorm(h, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(h, config.rms_norm_eps)
        self.mlp = Experts(config) if config.num_experts else GatedMLP(h, config.intermediate_size)

    def forward(self, x, phase, cache):
        """[B, n, h] -> the same."""
        x = x + self.self_attn(self.input_layernorm(x), phase, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class DecoderModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """The language model, under the names of the original."""

    def __init__(self, config):
        super().__init__()
        self.model = DecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
