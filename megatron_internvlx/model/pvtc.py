"""PVTC: the InternVL-X projector, tensor-parallel.

Shapes: T tiles, P patches per tile side, c ViT width, h LLM width, b block side (1/ratio),
g = P/b token grid side, N = T*g*g windows, w = b*b patches per window, a heads, d = h/a.

Source: class VisionProjector of the released InternVL-X code, whose arithmetic tests/parity/test_pvtc.py
repeats against its recorded outputs.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from megatron.core.models.backends import get_backend
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_internvlx.config import PVTC_HEADS, PVTC_MLP_RATIO
from megatron_internvlx.model.drop_path import drop_path
from megatron_internvlx.model.norm import norm_builder
from megatron_internvlx.model.sizes import ModelSizes
from megatron_internvlx.precision import high_precision, projector_precision

PVTC_EPS = 1e-6


def projector_config(config: TransformerConfig) -> TransformerConfig:
    """The decoder's config without sequence parallelism: projectors see every visual row."""
    own = copy.copy(config)
    own.sequence_parallel = False
    own.tp_comm_overlap = False
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


def tile_windows(patches_TPPc: Tensor, block: int) -> Tensor:
    """Cut every tile into non-overlapping block x block windows: [T,P,P,c] -> [T*g*g, b*b, c].

    Windows and the patches inside them are in row-major order.
    """
    T, P, _, c = patches_TPPc.shape
    g = P // block
    x = patches_TPPc.view(T, g, block, g, block, c).transpose(2, 3)
    return x.reshape(T * g * g, block * block, c)


class ProjectionMLP(MegatronModule):
    """RMSNorm, linear without bias, SiLU; the output is gathered to full width (mlp1, mlp2, mlp3)."""

    def __init__(self, config: TransformerConfig, in_size: int, group) -> None:
        super().__init__(config)
        self.group = group
        self.norm = norm_builder("RMSNorm", config.transformer_impl)(config, in_size, PVTC_EPS)
        self.linear = column_linear(config, in_size, config.hidden_size, group)

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., h]."""
        y, _ = self.linear(self.norm(x))
        return gather_from_tensor_model_parallel_region(F.silu(y), group=self.group)


class WindowAttention(MegatronModule):
    """One query per window attending to the window's patches, then a gated MLP; both residual."""

    def __init__(self, config: TransformerConfig, drop_path_rate: float, group) -> None:
        super().__init__(config)
        h = config.hidden_size
        norm = partial(norm_builder("RMSNorm", config.transformer_impl), config, h, PVTC_EPS)
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

    def forward(self, query_Nh: Tensor, kv_Nwh: Tensor) -> Tensor:
        """[N, h] queries and [N, w, h] window patches -> [N, h]."""
        x = query_Nh + self._drop(self._attend(self.norm_query(query_Nh), self.norm_kv(kv_Nwh)))
        return x + self._drop(self._mlp(self.norm_mlp(x)))

    def _attend(self, query_Nh: Tensor, kv_Nwh: Tensor) -> Tensor:
        N, w = kv_Nwh.shape[:2]
        q = self.linear_q(query_Nh)[0].view(N, 1, self.local_heads, self.head_dim)
        k = self.linear_k(kv_Nwh)[0].view(N, w, self.local_heads, self.head_dim)
        v = self.linear_v(kv_Nwh)[0].view(N, w, self.local_heads, self.head_dim)
        # One query and a handful of keys: elementwise products beat N*a matrix products of 1 x w.
        scores_Nwa = (q * self.head_dim**-0.5 * k).sum(-1)
        weights_Nwa1 = scores_Nwa.softmax(dim=1).unsqueeze(-1)
        out_Nh = (weights_Nwa1 * v).sum(1).view(N, self.local_heads * self.head_dim)
        return self.linear_proj(out_Nh)[0]

    def _mlp(self, x_Nh: Tensor) -> Tensor:
        return self.linear_down(F.silu(self.linear_gate(x_Nh)[0]) * self.linear_up(x_Nh)[0])[0]

    def _drop(self, branch_Nh: Tensor) -> Tensor:
        return drop_path(branch_Nh, self.drop_path_rate) if self.training else branch_Nh


class PVTC(MegatronModule):
    """Pixel-shuffle queries and CLS queries over local windows of ViT patches.

    Args:
        config: decoder config; `hidden_size` is h. Sequence parallelism is switched off inside.
        vision_hidden_size: c.
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
        T, _, c = features_TLc.shape
        g, h = self.grid, self.config.hidden_size
        windows_Nwc = tile_windows(features_TLc[:, 1:].reshape(T, self.patches, self.patches, c), self.block)
        kv_Nwh = self.kv_proj(windows_Nwc)
        # A window's patches side by side are exactly the pixel-shuffled channels of its cell.
        shuffled = windows_Nwc.reshape(T, g, g, -1)
        if self.transpose_query:
            shuffled = shuffled.transpose(1, 2)
        query_local = self.query_proj(shuffled.reshape(T * g * g, -1))
        with high_precision(self.config):  # one row per tile: too few for FP8
            cls_Th = self.cls_proj(features_TLc[:, 0])
        query_global = cls_Th.view(T, 1, 1, h) * self.cls_scale
        out_Nh = self.attn_local(query_local, kv_Nwh) + self.attn_global(query_global.view(-1, h), kv_Nwh)
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
        self.norm = norm_builder("LayerNorm", config.transformer_impl)(config, width, 1e-5)
        self.linear_fc1 = column_linear(config, width, config.hidden_size, group, bias=True)
        self.linear_fc2 = row_linear(config, config.hidden_size, config.hidden_size, group, bias=True)

    def forward(self, features_TLc: Tensor) -> Tensor:
        """ViT features [T, 1+P*P, c] -> visual rows [T, g*g, h]."""
        T, _, c = features_TLc.shape
        g = self.grid
        windows = tile_windows(features_TLc[:, 1:].reshape(T, self.patches, self.patches, c), self.block)
        shuffled = windows.reshape(T, g, g, -1)
        if self.transpose_output:
            shuffled = shuffled.transpose(1, 2)
        with projector_precision(self.config):
            x, _ = self.linear_fc1(self.norm(shuffled.reshape(T, g * g, -1)))
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
    """A projector from ViT features to grid x grid tokens per tile.

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
