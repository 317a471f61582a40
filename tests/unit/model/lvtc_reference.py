"""InternVL-X with PVTC and LVTC in plain PyTorch: one sample and one head at a time.

Written from the description of the model (docs/lvtc.md, the released projector), not from the code under
test, and without Megatron. Nothing is packed, padded or indexed: every sample is a list of rows of its own.

The weights are those of `InternVLX` under its full parameter names, in Megatron's layouts: fused
query-key-value rows are [head][q, k, v] in the vision encoder and [key-value head][its q heads, k, v] in the
language model; linear_fc1 of the language model is [gate ; up].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
IGNORE = -100


@dataclass(frozen=True)
class Model:
    """Everything that the weights do not tell."""

    patches: int
    """Patches per tile side."""
    patch_size: int
    vision_layers: int
    vision_heads: int
    layers: int
    heads: int
    groups: int
    """Key-value heads."""
    head_width: int
    rotary_base: float
    norm_eps: float
    low_grid: int
    high_grid: int
    injection_layers: tuple[int, ...] = ()
    """LVTC: the expansion first. (): off."""
    upsample: str = "bilinear"
    projector: str = "pvtc"
    transposed_query: bool = False
    """Pixel shuffle v1."""


@dataclass
class Sample:
    """One sample in the deep layout: high_grid**2 True values of `visual` per tile, in order."""

    ids: list[int]
    labels: list[int]
    visual: list[bool]
    tiles: Tensor
    """[tiles, 3, H, H] normalized pixels."""


def run(w: Weights, model: Model, samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Losses of all rows with a supervised next token, and logits of all rows, sample by sample."""
    losses, logits = [], []
    for sample in samples:
        rows = sample_logits(w, model, sample)
        logits.append(rows)
        for i in range(len(sample.ids) - 1):
            if sample.labels[i + 1] != IGNORE:
                losses.append(torch.logsumexp(rows[i], 0) - rows[i][sample.labels[i + 1]])
    return (torch.stack(losses) if losses else torch.zeros(0)), torch.cat(logits)


def sample_logits(w: Weights, model: Model, sample: Sample) -> Tensor:
    """[n, V] logits of one sample's deep rows."""
    features = encode_tiles(w, model, sample.tiles)
    lvtc = bool(model.injection_layers)
    grid = model.low_grid if lvtc else model.high_grid
    rows = entry_rows(w, model, sample, project(w, "projector.", model, features, grid))
    for layer in range(model.layers):
        if layer in model.injection_layers:
            name = f"language_model.decoder.layers.{layer}.injection.projector."
            added = project(w, name, model, features, model.high_grid)
            if layer == model.injection_layers[0]:
                rows = expand(model, sample, rows, added)
            else:
                rows = add(model, sample, rows, added)
        rows = decoder_layer(w, f"language_model.decoder.layers.{layer}.", model, rows)
    rows = rms_norm(rows, w["language_model.decoder.final_layernorm.weight"], model.norm_eps)
    output = w.get("language_model.output_layer.weight", w["language_model.embedding.word_embeddings.weight"])
    return rows @ output.T


def parts(sample: Sample, per_tile: int) -> list[tuple[str, int]]:
    """The sample in order: ("text", token id) or ("tile", number of the tile)."""
    found: list[tuple[str, int]] = []
    position, tile = 0, 0
    while position < len(sample.ids):
        if sample.visual[position]:
            assert all(sample.visual[position : position + per_tile])
            found.append(("tile", tile))
            position, tile = position + per_tile, tile + 1
        else:
            found.append(("text", sample.ids[position]))
            position += 1
    assert tile == len(sample.tiles)
    return found


def entry_rows(w: Weights, model: Model, sample: Sample, visual: Tensor) -> Tensor:
    """Rows that enter layer 0: embeddings, and g*g projected rows in the place of each tile."""
    table = w["language_model.embedding.word_embeddings.weight"]
    pieces = [
        table[value][None] if kind == "text" else visual[value].flatten(0, 1)
        for kind, value in parts(sample, model.high_grid**2)
    ]
    return torch.cat(pieces)


def expand(model: Model, sample: Sample, rows: Tensor, added: Tensor) -> Tensor:
    """Every tile's low grid upsampled, a projection added; text rows as they are."""
    low, high = model.low_grid, model.high_grid
    pieces, at = [], 0
    for kind, value in parts(sample, high**2):
        if kind == "text":
            pieces.append(rows[at : at + 1])
            at += 1
            continue
        grid = rows[at : at + low**2].view(low, low, -1).permute(2, 0, 1)[None]
        options = {"align_corners": False} if model.upsample == "bilinear" else {}
        grid = F.interpolate(grid, size=(high, high), mode=model.upsample, **options)
        pieces.append((grid[0].permute(1, 2, 0) + added[value]).flatten(0, 1))
        at += low**2
    return torch.cat(pieces)


def add(model: Model, sample: Sample, rows: Tensor, added: Tensor) -> Tensor:
    """A projection added to every tile's deep rows."""
    pieces, at = [], 0
    for kind, value in parts(sample, model.high_grid**2):
        size = 1 if kind == "text" else model.high_grid**2
        piece = rows[at : at + size]
        pieces.append(piece if kind == "text" else piece + added[value].flatten(0, 1))
        at += size
    return torch.cat(pieces)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, base: float) -> Tensor:
    """RoPE of [n, d] rows at positions 0..n-1; dimension i turns with i + d/2."""
    n, d = x.shape
    speeds = torch.tensor([base ** (-2 * i / d) for i in range(d // 2)])
    angles = torch.arange(n)[:, None] * speeds[None, :]
    first, second = x[:, : d // 2], x[:, d // 2 :]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=1
    )


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """One head: [.., n, d] queries over [.., m, d] keys and values."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1) @ v


def decoder_layer(w: Weights, name: str, model: Model, rows: Tensor) -> Tensor:
    """A Llama-like layer on the rows of one sample."""
    x = rms_norm(rows, w[name + "input_layernorm.weight"], model.norm_eps)
    rows = rows + self_attention(w, name + "self_attention.", model, x)
    x = rms_norm(rows, w[name + "pre_mlp_layernorm.weight"], model.norm_eps)
    gate, up = (x @ w[name + "mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
    return rows + (F.silu(gate) * up) @ w[name + "mlp.linear_fc2.weight"].T


def self_attention(w: Weights, name: str, model: Model, x: Tensor) -> Tensor:
    """Grouped-query attention with RoPE; norms of queries and keys and biases where there are weights."""
    qkv = x @ w[name + "linear_qkv.weight"].T
    if name + "linear_qkv.bias" in w:
        qkv = qkv + w[name + "linear_qkv.bias"]
    d, share = model.head_width, model.heads // model.groups
    outputs = []
    for group in range(model.groups):
        start = group * (share + 2) * d
        heads = [qkv[:, start + i * d : start + (i + 1) * d] for i in range(share + 2)]
        queries, key, value = heads[:share], heads[share], heads[share + 1]
        if name + "q_layernorm.weight" in w:
            queries = [rms_norm(q, w[name + "q_layernorm.weight"], model.norm_eps) for q in queries]
            key = rms_norm(key, w[name + "k_layernorm.weight"], model.norm_eps)
        key = rotate(key, model.rotary_base)
        outputs += [attend(rotate(q, model.rotary_base), key, value, causal=True) for q in queries]
    return torch.cat(outputs, dim=-1) @ w[name + "linear_proj.weight"].T


def project(w: Weights, name: str, model: Model, features: Tensor, grid: int) -> Tensor:
    """[T, 1+P*P, c] features -> [T, grid, grid, h] rows."""
    block = model.patches // grid
    patches = features[:, 1:].unflatten(1, (model.patches, model.patches))

    def window(r: int, c: int) -> Tensor:
        return patches[:, r * block : (r + 1) * block, c * block : (c + 1) * block].flatten(1, 2)

    cells = [(r, c) for r in range(grid) for c in range(grid)]
    windows = torch.stack([window(r, c) for r, c in cells], dim=1)
    asked = torch.stack([window(c, r) if model.transposed_query else window(r, c) for r, c in cells], dim=1)
    if model.projector == "mlp":
        rows = mlp_projector(w, name, asked.flatten(2))
    else:
        scale = torch.stack([w[name + "cls_scale"][0, r, c] for r, c in cells])
        rows = pvtc(w, name, asked.flatten(2), windows, features[:, :1], scale)
    return rows.unflatten(1, (grid, grid))


def mlp_projector(w: Weights, name: str, shuffled: Tensor) -> Tensor:
    """InternVL's projector, [T, cells, ..] -> [T, cells, h]."""
    x = F.layer_norm(shuffled, shuffled.shape[-1:], w[name + "norm.weight"], w[name + "norm.bias"], 1e-5)
    x = F.gelu(x @ w[name + "linear_fc1.weight"].T + w[name + "linear_fc1.bias"])
    return x @ w[name + "linear_fc2.weight"].T + w[name + "linear_fc2.bias"]


def pvtc(w: Weights, name: str, shuffled: Tensor, windows: Tensor, cls: Tensor, scale: Tensor) -> Tensor:
    """A local and a global query per cell over the same window: [T, cells, w, c] -> [T, cells, h]."""

    def enter(part: str, x: Tensor) -> Tensor:
        normed = rms_norm(x, w[f"{name}{part}.norm.weight"], 1e-6)
        return F.silu(normed @ w[f"{name}{part}.linear.weight"].T)

    keys = enter("kv_proj", windows)
    local = window_attention(w, name + "attn_local.", enter("query_proj", shuffled), keys)
    return local + window_attention(w, name + "attn_global.", enter("cls_proj", cls) * scale, keys)


def window_attention(w: Weights, name: str, query: Tensor, keys: Tensor) -> Tensor:
    """[.., h] queries over [.., w, h] rows of a window with 16 heads, then a gated MLP; both residual."""

    def linear(part: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}{part}.weight"].T

    def heads(part: str, x: Tensor) -> Tensor:
        return linear(part, x).unflatten(-1, (16, -1)).transpose(-3, -2)

    asked = rms_norm(query, w[name + "norm_query.weight"], 1e-6).unsqueeze(-2)
    kv = rms_norm(keys, w[name + "norm_kv.weight"], 1e-6)
    found = attend(heads("linear_q", asked), heads("linear_k", kv), heads("linear_v", kv), causal=False)
    x = query + linear("linear_proj", found.flatten(-3))
    y = rms_norm(x, w[name + "norm_mlp.weight"], 1e-6)
    return x + linear("linear_down", F.silu(linear("linear_gate", y)) * linear("linear_up", y))


def encode_tiles(w: Weights, model: Model, pixels: Tensor) -> Tensor:
    """InternViT with layer norms: [T, 3, H, H] -> [T, 1+P*P, c], CLS first."""
    size, name = model.patch_size, "vision_model.embeddings."
    kernel, bias = w[name + "patch_embedding.weight"].flatten(1), w[name + "patch_embedding.bias"]
    tokens = [w[name + "class_embedding"][:, 0].expand(len(pixels), -1)]
    for r in range(model.patches):
        for c in range(model.patches):
            patch = pixels[:, :, r * size : (r + 1) * size, c * size : (c + 1) * size]
            tokens.append(patch.flatten(1) @ kernel.T + bias)
    x = torch.stack(tokens, dim=1) + w[name + "position_embedding"]
    for layer in range(model.vision_layers):
        x = encoder_layer(w, f"vision_model.encoder.layers.{layer}.", model, x)
    return x


def encoder_layer(w: Weights, name: str, model: Model, x: Tensor) -> Tensor:
    """A layer of InternViT: unmasked attention, erf GELU, layer scale on both branches."""

    def norm(part: str, y: Tensor) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], w[f"{name}{part}.weight"], w[f"{name}{part}.bias"], 1e-6)

    def linear(part: str, y: Tensor) -> Tensor:
        return y @ w[f"{name}{part}.weight"].T + w[f"{name}{part}.bias"]

    heads = linear("self_attention.linear_qkv", norm("input_layernorm", x)).chunk(model.vision_heads, -1)
    out = torch.cat([attend(*head.chunk(3, -1), causal=False) for head in heads], -1)
    x = x + linear("self_attention.linear_proj", out) * w[name + "self_attn_bda.layer_scale"]
    y = F.gelu(linear("mlp.linear_fc1", norm("pre_mlp_layernorm", x)))
    return x + linear("mlp.linear_fc2", y) * w[name + "mlp_bda.layer_scale"]
