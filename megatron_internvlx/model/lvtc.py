"""LVTC: a coarse grid of visual rows in the shallow layers, expanded at the entry of layer k.

Shapes: S shallow or deep rows, h LLM width, T tiles, p = g_low**2, q = g_high**2 rows per tile,
L = 1+P*P ViT tokens, c ViT width. Rows are [S, 1, h]; under sequence parallelism each TP rank
holds its S/TP share.

Source: paper section on layer-wise visual token compression; the exact rule is in docs/lvtc.md (the released code
has no LVTC).
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_internvlx.parallel.device_plan import DevicePlan


def upsample_matrix(low: int, high: int, mode: str) -> Tensor:
    """Linear map from a low x low grid to a high x high grid: [high*high, low*low], fp32.

    mode "bilinear" is align_corners=False, "nearest" repeats rows. A matrix product instead of
    torch's interpolation keeps the token layout, and its backward is deterministic on every device.
    """
    grids = torch.eye(low * low).view(low * low, 1, low, low)
    options = {"align_corners": False} if mode == "bilinear" else {}
    return F.interpolate(grids, size=(high, high), mode=mode, **options).view(low * low, high * high).t()


class LVTCInjection(MegatronModule):
    """Injection at the entry of one decoder layer: expansion, or addition of a projection.

    Args:
        config: decoder config.
        projector: maps ViT features [T, L, c] to [T, q, h]; belongs to this layer.
        expand: True at layer k, False at the injection layers after it.
        low_grid: token grid side per tile before the expansion.
        high_grid: token grid side per tile after it.
        upsample: "bilinear" or "nearest".
        group: tensor-parallel group.
    """

    def __init__(
        self,
        config: TransformerConfig,
        projector: nn.Module,
        *,
        expand: bool,
        low_grid: int,
        high_grid: int,
        upsample: str,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(config)
        self.projector = projector
        self.expand = expand
        self.group = group
        if expand:
            self.register_buffer(
                "upsample_qp", upsample_matrix(low_grid, high_grid, upsample), persistent=False
            )

    def forward(self, rows_S1h: Tensor, features_TLc: Tensor, plan: DevicePlan) -> Tensor:
        """Expand shallow rows to deep rows at layer k, or add a projection to deep rows after it."""
        visual_Tqh = self.projector(features_TLc)
        if self.config.sequence_parallel:
            # The gradient that comes back is the same on all ranks after the scatter below, so
            # each rank keeps its share of it instead of summing (tensor_parallel_output_grad).
            rows_S1h = gather_from_sequence_parallel_region(
                rows_S1h, tensor_parallel_output_grad=False, group=self.group
            )
        rows_S1h = (self._expand if self.expand else self._add)(rows_S1h, visual_Tqh, plan)
        if self.config.sequence_parallel:
            rows_S1h = scatter_to_sequence_parallel_region(rows_S1h, group=self.group)
        return rows_S1h

    def _expand(self, rows_S1h: Tensor, visual_Tqh: Tensor, plan: DevicePlan) -> Tensor:
        h = rows_S1h.shape[-1]
        rows_Sh = rows_S1h.view(-1, h)
        low_Tph = rows_Sh.index_select(0, plan.shallow.visual_rows).view(plan.encoded_tiles, -1, h)
        up_qp = self.upsample_qp.to(rows_Sh.dtype).expand(plan.encoded_tiles, -1, -1)
        visual_Tqh = torch.baddbmm(visual_Tqh.to(rows_Sh.dtype), up_qp, low_Tph)
        source = torch.cat([rows_Sh, visual_Tqh.reshape(-1, h).to(rows_Sh.dtype)])
        assert plan.expand_index is not None
        return source.index_select(0, plan.expand_index).view(-1, 1, h)

    def _add(self, rows_S1h: Tensor, visual_Tqh: Tensor, plan: DevicePlan) -> Tensor:
        h = rows_S1h.shape[-1]
        rows_Sh = rows_S1h.view(-1, h)
        # Of a blank tile nothing is added, which still ties the projector into the graph: in a text-only
        # micro-batch its gradients are zeros rather than missing.
        visual_Tqh = visual_Tqh.to(rows_Sh.dtype) * plan.real_tiles.to(rows_Sh.dtype).view(-1, 1, 1)
        return rows_Sh.index_add(0, plan.deep.visual_rows, visual_Tqh.reshape(-1, h)).view(-1, 1, h)


def merge_visual(text_S1h: Tensor, visual_Tqh: Tensor, plan: DevicePlan) -> Tensor:
    """Place the visual rows of layer 0 among the text embeddings: [S, 1, h] -> [S, 1, h]."""
    h = text_S1h.shape[-1]
    source = torch.cat([text_S1h.view(-1, h), visual_Tqh.reshape(-1, h).to(text_S1h.dtype)])
    return source.index_select(0, plan.merge_index).view(-1, 1, h)
