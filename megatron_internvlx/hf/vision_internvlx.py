"""InternViT and the projectors PVTC and MLP in plain PyTorch (remote code of this directory).

Shapes: T tiles, P patches per tile side, L = 1 + P*P tokens (CLS first), c width of the encoder, h width
of the decoder, g token grid side.
"""

import torch
import torch.nn.functional as F
from torch import nn

PVTC_HEADS = 16
PVTC_EPS = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm; statistics in fp32, cast back before the weight."""

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        """[..., size] -> the same."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class VisionEmbeddings(nn.Module):
    """Patches, CLS token and position embedding."""

    def __init__(self, config):
        super().__init__()
        c, p = config.hidden_size, config.patch_size
        self.side = config.image_size // p
        self.class_embedding = nn.Parameter(torch.randn(1, 1, c))
        self.patch_embedding = nn.Conv2d(config.num_channels, c, kernel_size=p, stride=p)
        self.position_embedding = nn.Parameter(torch.randn(1, self.side**2 + 1, c))

    def forward(self, pixels):
        """[T, 3, H, W] -> [T, L, c]; another size than the trained one is interpolated."""
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        rows, columns = patches.shape[-2:]
        positions: torch.Tensor = self.position_embedding
        if (rows, columns) != (self.side, self.side):
            grid = positions[:, 1:].float().unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
            positions = torch.cat(
                [positions[:, :1], grid.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1
            )
        cls = self.class_embedding.expand(len(patches), -1, -1)
        return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1) + positions


class VisionAttention(nn.Module):
    """Self-attention, unmasked; queries and keys may be normed over all heads together."""

    def __init__(self, config):
        super().__init__()
        c = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(c, 3 * c, bias=config.qkv_bias)
        self.normed = config.qk_normalization
        if self.normed:
            self.q_norm = RMSNorm(c, config.layer_norm_eps)
            self.k_norm = RMSNorm(c, config.layer_norm_eps)
        self.proj = nn.Linear(c, c)

    def forward(self, x):
        """[T, L, c] -> the same."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Two linear layers with GELU."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        """[T, L, c] -> the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    """Pre-norm layer with a factor per channel on each branch."""

    def __init__(self, config):
        super().__init__()
        norm = nn.LayerNorm if config.norm_type == "layer_norm" else RMSNorm
        c, factor = config.hidden_size, config.initializer_factor
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.norm1 = norm(c, eps=config.layer_norm_eps)
        self.norm2 = norm(c, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(factor * torch.ones(c))
        self.ls2 = nn.Parameter(factor * torch.ones(c))

    def forward(self, x):
        """[T, L, c] -> the same."""
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class VisionEncoder(nn.Module):
    """The layers."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class VisionModel(nn.Module):
    """InternViT up to the selected hidden state."""

    def __init__(self, config, select_layer=-1):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.layers_run = select_layer % (config.num_hidden_layers + 1)

    def forward(self, pixels):
        """[T, 3, H, W] -> features [T, L, c], CLS first."""
        x = self.embeddings(pixels)
        for layer in self.encoder.layers[: self.layers_run]:
            x = layer(x)
        return x


def windows(patches, block):
    """Non-overlapping block x block windows, row-major: [T, P, P, c] -> [T*g*g, block*block, c]."""
    tiles, side, _, width = patches.shape
    grid = side // block
    x = patches.reshape(tiles, grid, block, grid, block, width).transpose(2, 3)
    return x.reshape(tiles * grid * grid, block * block, width)


class WindowQKV(nn.Module):
    """One query per window over the window's patches; both streams are normed here."""

    def __init__(self, h):
        super().__init__()
        self.norm1 = RMSNorm(h, PVTC_EPS)
        self.norm2 = RMSNorm(h, PVTC_EPS)
        self.q = nn.Linear(h, h, bias=False)
        self.k = nn.Linear(h, h, bias=False)
        self.v = nn.Linear(h, h, bias=False)
        self.proj = nn.Linear(h, h, bias=False)

    def forward(self, query, kv):
        """[N, h] and [N, w, h] -> [N, h]."""
        kv = self.norm2(kv)
        q = self.q(self.norm1(query)).unflatten(-1, (PVTC_HEADS, -1)).unsqueeze(1)
        k = self.k(kv).unflatten(-1, (PVTC_HEADS, -1))
        v = self.v(kv).unflatten(-1, (PVTC_HEADS, -1))
        weights = (q * k.shape[-1] ** -0.5 * k).sum(-1).softmax(dim=1).unsqueeze(-1)
        return self.proj((weights * v).sum(1).flatten(1))


class WindowMLP(nn.Module):
    """Normed, gated MLP."""

    def __init__(self, h):
        super().__init__()
        self.norm = RMSNorm(h, PVTC_EPS)
        self.w1 = nn.Linear(h, 4 * h, bias=False)
        self.w2 = nn.Linear(4 * h, h, bias=False)
        self.w3 = nn.Linear(h, 4 * h, bias=False)

    def forward(self, x):
        """[N, h] -> the same."""
        x = self.norm(x)
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class WindowAttention(nn.Module):
    """Attention and MLP, both residual."""

    def __init__(self, h):
        super().__init__()
        self.attn = WindowQKV(h)
        self.mlp = WindowMLP(h)

    def forward(self, query, kv):
        """[N, h] and [N, w, h] -> [N, h]."""
        x = query + self.attn(query, kv)
        return x + self.mlp(x)


class PVTC(nn.Module):
    """Point-to-region queries (pixel shuffle, and CLS) over local windows of patches."""

    def __init__(self, c, h, grid, patches, version):
        super().__init__()
        self.grid, self.patches, self.block = grid, patches, patches // grid
        self.transposed = version == "v1"

        def projection(width):
            return nn.Sequential(RMSNorm(width, PVTC_EPS), nn.Linear(width, h, bias=False), nn.SiLU())

        self.mlp1 = projection(self.block**2 * c)
        self.mlp2 = projection(c)
        self.mlp3 = projection(c)
        self.cls_scale = nn.Parameter(torch.randn(1, grid, grid, h))
        self.attn_local = WindowAttention(h)
        self.attn_global = WindowAttention(h)

    def forward(self, features):
        """[T, L, c] -> [T, g*g, h], row-major per tile."""
        tiles, g = len(features), self.grid
        cut = windows(features[:, 1:].unflatten(1, (self.patches, self.patches)), self.block)
        kv = self.mlp3(cut)
        shuffled = cut.reshape(tiles, g, g, -1)
        if self.transposed:
            shuffled = shuffled.transpose(1, 2)
        local = self.mlp1(shuffled.reshape(tiles * g * g, -1))
        whole = (self.mlp2(features[:, 0])[:, None, None] * self.cls_scale).flatten(0, 2)
        return (self.attn_local(local, kv) + self.attn_global(whole, kv)).unflatten(0, (tiles, g * g))


class MLPProjector(nn.Sequential):
    """InternVL's projector: pixel shuffle, norm, two linear layers with GELU."""

    def __init__(self, c, h, grid, patches, version):
        width = (patches // grid) ** 2 * c
        super().__init__(nn.LayerNorm(width), nn.Linear(width, h), nn.GELU(), nn.Linear(h, h))
        self.grid, self.patches, self.transposed = grid, patches, version == "v1"

    def forward(self, features):
        """[T, L, c] -> [T, g*g, h]."""
        tiles, g = len(features), self.grid
        cut = windows(features[:, 1:].unflatten(1, (self.patches, self.patches)), self.patches // g)
        shuffled = cut.reshape(tiles, g, g, -1)
        if self.transposed:
            shuffled = shuffled.transpose(1, 2)
        return super().forward(shuffled.reshape(tiles, g * g, -1))


def make_projector(config, grid):
    """The projector that the configuration names, to grid x grid tokens per tile."""
    kind = PVTC if config.compression["projector"] == "pvtc" else MLPProjector
    version = config.compression.get("pixel_shuffle_version", "v2")
    return kind(
        config.vision_config.hidden_size, config.llm_config.hidden_size, grid, config.patches, version
    )
