"""PVTC: the InternVL-X projector, tensor-parallel.

Shapes: T tiles, P patches per tile side, c ViT width, h LLM width, b block side (1/ratio),
g = P/b token grid side, N = T*g*g windows, w = b*b patches per window, a heads, d = h/a.

Source: class VisionProjector of the released InternVL-X code, whose arithmetic tests/parity/test_pvtc.py
repeats against its recorded outputs.
"""

from __future__ import annotations

import copy
from functools import partial
from math import isqrt
from typing import Any

import torch
from megatron.core.models.backends import get_backend
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_internvlx.config import PVTC_HEADS, PVTC_MLP_RATIO
from megatron_internvlx.model.drop_path import draw_kept_entries
from megatron_internvlx.model.norm import KernelNorm
from megatron_internvlx.model.sizes import ModelSizes
from megatron_internvlx.platform import kernels
from megatron_internvlx.precision import high_precision, projector_precision

PVTC_EPS = 1e-6


def projector_config(config: TransformerConfig) -> TransformerConfig:
    """Decoder's config without sequence parallelism, because projectors run on every visual row."""
    own = copy.copy(config)
    own.sequence_parallel = False
    own.tp_comm_overlap = False
    own.layernorm_zero_centered_gamma = False  # the released projectors' norms are plain
    return own


def uniform_init(fan_in: int):
    """torch.nn.Linear's default initialisation, independent of how the weight is sharded."""
    bound = fan_in**-0.5
    return partial(nn.init.uniform_, a=-bound, b=bound)


def column_linear(config, in_size: int, out_size: int, group, *, bias: bool = False) -> nn.Module:
    """Output-sharded linear layer of the backend that the config names: [.., in] -> [.., out/TP]."""
    return get_backend(config.transformer_impl).column_parallel_linear()(
        in_size,
        out_size,
        config=config,
        init_method=uniform_init(in_size),
        bias=bias,
        gather_output=False,
        skip_bias_add=False,
        is_expert=False,
        tp_group=group,
    )


def row_linear(config, in_size: int, out_size: int, group, *, bias: bool = False) -> nn.Module:
    """Input-sharded linear layer, output summed over TP: [.., in/TP] -> [.., out]."""
    return get_backend(config.transformer_impl).row_parallel_linear()(
        in_size,
        out_size,
        config=config,
        init_method=uniform_init(in_size),
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=False,
        is_expert=False,
        tp_group=group,
    )


class _TileWindows(torch.autograd.Function):
    """`tile_windows`; its backward writes each gradient once, without zeros for the other."""

    @staticmethod
    def forward(ctx: Any, features_TLc: Tensor, block: int) -> tuple[Tensor, Tensor]:
        T, L, c = features_TLc.shape
        P = isqrt(L - 1)
        ctx.cut = (T, P // block, block, P // block, block, c)
        windows = features_TLc[:, 1:].view(ctx.cut).transpose(2, 3)
        return windows.reshape(-1, block * block, c), features_TLc[:, 0].contiguous()

    @staticmethod
    def backward(ctx: Any, g_windows: Tensor, g_cls: Tensor) -> tuple[Tensor, None]:
        T, g, b, _, _, c = ctx.cut
        gradient = g_windows.new_empty(T, 1 + (g * b) ** 2, c)
        gradient[:, 0] = g_cls
        gradient[:, 1:].view(ctx.cut).copy_(g_windows.view(T, g, g, b, b, c).transpose(2, 3))
        return gradient, None


def tile_windows(features_TLc: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Cut every tile into non-overlapping block x block windows: `[T, 1+P*P, c] -> [T*g*g, b*b, c]` and `[T, c]`.

    Windows and the patches inside them are in row-major order; the second result is the CLS features.
    """
    return _TileWindows.apply(features_TLc, block)


class ProjectionMLP(MegatronModule):
    """RMSNorm, linear without bias, SiLU; the output is gathered to full width (mlp1, mlp2, mlp3)."""

    def __init__(self, config: TransformerConfig, in_size: int, group) -> None:
        super().__init__(config)
        self.group = group
        self.norm = KernelNorm(config, in_size, PVTC_EPS, normalization="RMSNorm")
        self.linear = column_linear(config, in_size, config.hidden_size, group)

    def forward(self, x: Tensor) -> Tensor:
        """Project [.., in] to [.., h]."""
        normed, _ = kernels.norm_and_pass(x, self.norm())
        y, _ = self.linear(normed)
        return gather_from_tensor_model_parallel_region(F.silu(y), group=self.group)


class WindowAttention(MegatronModule):
    """One query per window that attends to the window's patches, then a gated MLP; both residual."""

    def __init__(self, config: TransformerConfig, drop_path_rate: float, group) -> None:
        super().__init__(config)
        h = config.hidden_size
        norm = partial(KernelNorm, config, h, PVTC_EPS, normalization="RMSNorm")
        self.drop_path_rate = drop_path_rate
        self.local_heads = PVTC_HEADS // group.size()
        self.head_dim = h // PVTC_HEADS
        self.norm_query = norm()
        self.norm_kv = norm()
        self.linear_q = column_linear(config, h, h, group)
        self.linear_k = column_linear(config, h, h, group)
        self.linear_v = column_linear(config, h, h, group)
        self.linear_proj = row_linear(config, h, h, group)
        self.norm_mlp = norm()
        self.linear_gate = column_linear(config, h, PVTC_MLP_RATIO * h, group)
        self.linear_up = column_linear(config, h, PVTC_MLP_RATIO * h, group)
        self.linear_down = row_linear(config, PVTC_MLP_RATIO * h, h, group)

    def forward(self, query_Nh: Tensor, keys_Nwh: Tensor, values_Nwh: Tensor) -> Tensor:
        """Queries `[N, h]` attend to patches `[N, w, h]` normalized by `norm_kv` for keys and values."""
        normed, query_Nh = kernels.norm_and_pass(query_Nh, self.norm_query())
        k, v = self.linear_k(keys_Nwh)[0], self.linear_v(values_Nwh)[0]
        out = kernels.window_attention(self.linear_q(normed)[0], k, v, self.local_heads)
        branch = self.linear_proj(out)[0]
        normed, x = kernels.add_branch_and_norm(query_Nh, branch, self.norm_mlp(), **self._draw_kept(branch))
        inner = kernels.gated_silu(self.linear_gate(normed)[0], self.linear_up(normed)[0])
        branch = self.linear_down(inner)[0]
        return kernels.add_branch(x, branch, **self._draw_kept(branch))

    def _draw_kept(self, branch_Nh: Tensor) -> dict[str, Any]:
        """Draw the windows that keep a branch; {} without drop path. Arguments of the kernels."""
        if not self.training or self.drop_path_rate == 0:
            return {}
        keep_rate = 1 - self.drop_path_rate
        return {"keep": draw_kept_entries(branch_Nh, keep_rate), "keep_rate": keep_rate}


class PVTC(MegatronModule):
    """Pixel-shuffle queries and CLS queries over local windows of ViT patches.

    Args:
        config: decoder config; `hidden_size` is h. Sequence parallelism is switched off inside.
        vision_hidden_size: c, width of the vision encoder.
        grid: g, tokens per tile side.
        patches: P, patches per tile side.
        pixel_shuffle_version: "v1" transposes the grid of the pixel-shuffle queries, and neither
            the windows nor the output: the released code does so.
        drop_path_rate: probability that a window's branch is dropped in training.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vision_hidden_size: int,
        *,
        grid: int,
        patches: int,
        pixel_shuffle_version: str = "v2",
        drop_path_rate: float = 0.1,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        config = projector_config(config)
        super().__init__(config)
        group = (pg_collection or ProcessGroupCollection.use_mpu_process_groups()).tp
        self.grid, self.patches, self.block = grid, patches, patches // grid
        self.transpose_query = pixel_shuffle_version == "v1"
        self.query_proj = ProjectionMLP(config, self.block**2 * vision_hidden_size, group)
        self.cls_proj = ProjectionMLP(config, vision_hidden_size, group)
        self.kv_proj = ProjectionMLP(config, vision_hidden_size, group)
        # Standard normal, not 0.02: the released initialisation.
        self.cls_scale = nn.Parameter(torch.empty(1, grid, grid, config.hidden_size))
        if config.perform_initialization:
            nn.init.normal_(self.cls_scale)
        self.attn_local = WindowAttention(config, drop_path_rate, group)
        self.attn_global = WindowAttention(config, drop_path_rate, group)

    def forward(self, features_TLc: Tensor) -> Tensor:
        """ViT features [T, 1+P*P, c], CLS first -> visual rows [T, g*g, h], row-major per tile."""
        with projector_precision(self.config):
            return self._project(features_TLc)

    def _project(self, features_TLc: Tensor) -> Tensor:
        T, g, h = len(features_TLc), self.grid, self.config.hidden_size
        windows_Nwc, cls_Tc = tile_windows(features_TLc, self.block)
        kv_Nwh = self.kv_proj(windows_Nwc)
        # A window's patches side by side are exactly the pixel-shuffled channels of its cell.
        shuffled = windows_Nwc.view(T, g, g, -1)
        if self.transpose_query:
            shuffled = shuffled.transpose(1, 2)
        query_local = self.query_proj(shuffled.reshape(T * g * g, -1))
        with high_precision(self.config):  # one row per tile: too few for FP8
            cls_Th = self.cls_proj(cls_Tc)
        query_global = cls_Th.view(T, 1, 1, h) * self.cls_scale
        # Both branches norm the same rows; each norm is read by a key's and a value's matrix.
        local, around = kernels.twin_norm(kv_Nwh, self.attn_local.norm_kv(), self.attn_global.norm_kv())
        out_Nh = self.attn_local(query_local, *local)
        out_Nh = out_Nh + self.attn_global(query_global.view(-1, h), *around)
        return out_Nh.view(T, g * g, h)


class MLPProjector(MegatronModule):
    """InternVL's projector: pixel shuffle, LayerNorm, linear, GELU, linear; CLS is dropped."""

    def __init__(
        self,
        config: TransformerConfig,
        vision_hidden_size: int,
        *,
        grid: int,
        patches: int,
        pixel_shuffle_version: str = "v2",
        drop_path_rate: float = 0.0,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        config = projector_config(config)
        super().__init__(config)
        group = (pg_collection or ProcessGroupCollection.use_mpu_process_groups()).tp
        self.grid, self.patches, self.block = grid, patches, patches // grid
        self.transpose_output = pixel_shuffle_version == "v1"
        width = self.block**2 * vision_hidden_size
        self.norm = KernelNorm(config, width, 1e-5, normalization="LayerNorm")
        self.linear_fc1 = column_linear(config, width, config.hidden_size, group, bias=True)
        self.linear_fc2 = row_linear(config, config.hidden_size, config.hidden_size, group, bias=True)

    def forward(self, features_TLc: Tensor) -> Tensor:
        """ViT features [T, 1+P*P, c] -> visual rows [T, g*g, h]."""
        T, g = len(features_TLc), self.grid
        windows_Nwc, _ = tile_windows(features_TLc, self.block)
        shuffled = windows_Nwc.view(T, g, g, -1)
        if self.transpose_output:
            shuffled = shuffled.transpose(1, 2)
        normed, _ = kernels.norm_and_pass(shuffled.reshape(T, g * g, -1), self.norm())
        with projector_precision(self.config):
            x, _ = self.linear_fc1(normed)
            return self.linear_fc2(F.gelu(x))[0]


PROJECTORS: dict[str, type[PVTC] | type[MLPProjector]] = {"pvtc": PVTC, "mlp": MLPProjector}


def build_projector(
    config: TransformerConfig,
    sizes: ModelSizes,
    grid: int,
    pg_collection: ProcessGroupCollection,
    *,
    fp8: bool,
) -> PVTC | MLPProjector:
    """Build a projector from ViT features to grid x grid tokens per tile.

    Without `fp8` it runs in bf16, inside a decoder layer that runs in FP8 too.
    """
    if not fp8:
        config = copy.copy(config)
        config.fp8 = None
    return PROJECTORS[sizes.projector](
        config,
        sizes.vision.hidden_size,
        grid=grid,
        patches=sizes.patches,
        pixel_shuffle_version=sizes.pixel_shuffle_version,
        drop_path_rate=sizes.projector_drop_path,
        pg_collection=pg_collection,
    )
