"""Adapters (LoRA) on linear layers: parameters, operations and kept activations of each part of the model.

An adapter of rank r on a layer from `inputs` to `rows` channels has A [n, r, inputs] and B [rows, r], with n the number
of projections that the layer fuses: 3 for queries, keys and values, 2 for gate and up, else 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_internvlx.config import PVTC_MLP_RATIO
from megatron_internvlx.model.internvit_config import InternViTConfig
from megatron_internvlx.model.sizes import ModelSizes


@dataclass(frozen=True)
class AdaptedLinear:
    """Linear layer with an adapter."""

    inputs: int
    rows: int
    fused: int = 1
    """Number of projections that the layer fuses; each has an A of its own."""
    row_parallel: bool = False
    """Tensor parallelism divides its inputs, not its rows."""
    per_tile: int = 1
    """Vision encoder and projectors: number of rows per tile that go through it."""

    def parameters(self, rank: int, tensor: int = 1) -> int:
        """Parameters of the adapter on each of `tensor` ranks, which share B or, row-parallel, A."""
        a, b = self.fused * rank * self.inputs, rank * self.rows
        return a // tensor + b if self.row_parallel else a + b // tensor

    def flops(self, rank: int) -> int:
        """Forward FLOPs per row, over all tensor-parallel ranks."""
        return 2 * self.parameters(rank)

    def kept(self, rank: int) -> int:
        """Elements per row between A and B, which the gradient of B needs."""
        return self.fused * rank


def decoder_attention(sizes: ModelSizes) -> tuple[AdaptedLinear, ...]:
    """Layers of one decoder layer under the target decoder_attention."""
    if "decoder_attention" not in sizes.lora_targets:
        return ()
    h, q, k = sizes.hidden, sizes.query_width, sizes.key_width
    return AdaptedLinear(h, q + 2 * k, 3), AdaptedLinear(q, h, row_parallel=True)


def decoder_mlp(sizes: ModelSizes, layer: int) -> tuple[AdaptedLinear, ...]:
    """Layers of one decoder layer under the target decoder_mlp; experts have no adapters."""
    if "decoder_mlp" not in sizes.lora_targets or layer in sizes.expert_layers:
        return ()
    gates = sizes.matrices - 1
    return (
        AdaptedLinear(sizes.hidden, gates * sizes.ffn, gates),
        AdaptedLinear(sizes.ffn, sizes.hidden, row_parallel=True),
    )


def vision_layer(sizes: ModelSizes) -> tuple[AdaptedLinear, ...]:
    """Layers of one layer of the vision encoder under the target vision, replicated over the tensor-parallel ranks."""
    if "vision" not in sizes.lora_targets:
        return ()
    vit: InternViTConfig = sizes.vision
    c, f, tokens = vit.hidden_size, vit.ffn_hidden_size, vit.tokens_per_tile
    shapes = ((c, 3 * c, 3), (c, c, 1), (c, f, 1), (f, c, 1))
    return tuple(AdaptedLinear(*shape, per_tile=tokens) for shape in shapes)


def projector(sizes: ModelSizes, grid: int) -> tuple[AdaptedLinear, ...]:
    """Layers of a projector to `grid` x `grid` tokens per tile under the target projectors."""
    if "projectors" not in sizes.lora_targets:
        return ()
    h, c, cells, patches = sizes.hidden, sizes.vision.hidden_size, grid * grid, sizes.patches**2
    shuffled = sizes.shuffled_width(grid)
    if sizes.projector == "mlp":
        return (
            AdaptedLinear(shuffled, h, per_tile=cells),
            AdaptedLinear(h, h, row_parallel=True, per_tile=cells),
        )
    inner = PVTC_MLP_RATIO * h
    branch = (
        AdaptedLinear(h, h, per_tile=cells),  # queries
        AdaptedLinear(h, h, per_tile=patches),  # keys
        AdaptedLinear(h, h, per_tile=patches),  # values
        AdaptedLinear(h, h, row_parallel=True, per_tile=cells),
        AdaptedLinear(h, inner, per_tile=cells),  # gate
        AdaptedLinear(h, inner, per_tile=cells),  # up
        AdaptedLinear(inner, h, row_parallel=True, per_tile=cells),
    )
    return (
        AdaptedLinear(shuffled, h, per_tile=cells),
        AdaptedLinear(c, h),  # the class token
        AdaptedLinear(c, h, per_tile=patches),
        *branch,
        *branch,
    )


def adapter_parameters(linears: Iterable[AdaptedLinear], rank: int, tensor: int = 1) -> int:
    """Parameters of the adapters on each of `tensor` ranks."""
    return sum(linear.parameters(rank, tensor) for linear in linears)


def all_adapters(sizes: ModelSizes) -> dict[str, int]:
    """Adapter parameters of the whole model by target; targets without adapters are left out."""
    rank = sizes.lora_rank
    grids = [sizes.entry_grid, *(sizes.high_grid for _ in sizes.injection_layers)]
    layers = range(sizes.layers)
    counts = {
        "decoder_attention": sizes.layers * adapter_parameters(decoder_attention(sizes), rank),
        "decoder_mlp": sum(adapter_parameters(decoder_mlp(sizes, layer), rank) for layer in layers),
        "vision": sizes.vision.num_layers * adapter_parameters(vision_layer(sizes), rank),
        "projectors": sum(adapter_parameters(projector(sizes, grid), rank) for grid in grids),
    }
    return {target: count for target, count in counts.items() if count}
