"""Bytes that one micro-batch keeps for its backward pass, part by part, on one rank of a stage.

Counted are the tensors that autograd saves, each storage once, for the two implementations: "local"
(measured on CPU by tests) and "transformer_engine" (the same modules with fused norms, SwiGLU and
attention, which keep less; FP8 keeps its linear inputs at half of what is counted here). Vision encoder and
PVTC have the same kernels, and so keep the same, in both.

Letters: h, c widths of the decoder and of the vision encoder, t tensor-parallel size, S rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_internvlx.parallel.layout import StageLayers
from megatron_internvlx.planning.flops import BackwardSettings, PlanStats
from megatron_internvlx.planning.memory import Layout, in_flight
from megatron_internvlx.planning.parameters import PVTC_MLP_RATIO, ModelShape


@dataclass(frozen=True)
class ActivationModel:
    """What the formulas depend on besides the micro-batch."""

    shape: ModelShape
    layout: Layout
    backward: BackwardSettings
    width: int
    """Bytes of an activation element: 2 with bf16, 4 with fp32."""
    local: bool
    """Megatron's local implementation instead of Transformer Engine."""

    def norm(self, elements: int, *, trained: bool) -> int:
        """A norm of the decoder and the linear layer that reads it."""
        out = elements * self.width * trained
        if not self.local:
            return elements * self.width + out
        return 4 * elements + elements * self.width * trained + out

    def decoder_layer(self, layer: int, stats: PlanStats) -> int:
        """A decoder layer that is not recomputed, its injection included."""
        shape, t, b = self.shape, self.layout.tensor, self.width
        rows = self.rows(layer, stats)
        trained = self.backward.trains("llm")
        queries = shape.heads * shape.head_dim // t
        keys = shape.kv_groups * shape.head_dim // t
        part = rows // t if self.layout.sequence_parallel else rows
        total = 2 * self.norm(part * shape.hidden, trained=trained)
        # Values stay a view of the fused projection's output, so all of that is kept.
        attention = (queries + 2 * keys) + queries + keys + queries
        if self.local:
            attention += queries  # the rows of all samples joined, besides what each sample's kernel kept
        if "core_attn" in self.backward.modules:
            attention -= queries
        total += rows * attention * b
        if shape.qk_norm:
            total += self.norm(rows * (queries + keys), trained=False)
        if self.local:
            total += rows * 4 * shape.head_dim * b  # cosines and sines, for queries and for keys
        total += self._mlp(layer, rows, trained)
        if layer in shape.compression.injection_layers:
            total += self.projector(shape.compression.high_grid, stats.projected_tiles)
        return total

    def rows(self, layer: int, stats: PlanStats) -> int:
        """Decoder rows of a layer's phase."""
        return stats.shallow_rows if layer < self.shape.shallow_layers else stats.deep_rows

    def _mlp(self, layer: int, rows: int, trained: bool) -> int:
        shape, b = self.shape, self.width
        modules = self.backward.modules
        if layer not in shape.expert_layers:
            return 0 if "mlp" in modules else rows * self._gated(shape.ffn // self.layout.tensor, trained)
        if "moe" in modules:
            return 0
        experts = self._gated(shape.expert_ffn // self.layout.expert_tensor, trained)
        routed = rows * shape.topk * (experts + 2 * shape.hidden * b)
        shared = rows * self._gated(shape.shared_ffn // self.layout.tensor, trained)
        return routed + shared + rows * 3 * shape.experts * 4

    def _gated(self, ffn: int, trained: bool) -> int:
        """Bytes per row between the two linear layers of an MLP."""
        inner = self.shape.matrices - 1
        activation = ffn if self.local and inner == 2 else 0  # the unfused product keeps silu(gate)
        recomputed = {"moe_act"} & self.backward.modules
        return (inner * ffn + activation + (0 if recomputed else ffn * trained)) * self.width

    def projector(self, grid: int, tiles: int) -> int:
        """One projector to `grid` x `grid` tokens for so many tiles."""
        shape, t, b = self.shape, self.layout.tensor, self.width
        trained = self.backward.trains("projectors")
        if not (trained or self.backward.trains("vision")):
            return 0
        h, c = shape.hidden, shape.vision.hidden_size
        patches, cells = shape.compression.patches**2, grid * grid
        if shape.compression.projector == "mlp":
            norm = b * patches * c * (1 + trained)
            return tiles * (norm + b * cells * (h // t) * (2 if trained else 1))
        # Fused kernels keep what they normalize and its norm; both projections norm the same windows.
        windows = b * patches * c * (1 + 2 * trained)
        keys = b * patches * (h // t + (h if t > 1 else 0))  # before SiLU, and gathered
        keys += 0 if t > 1 else b * patches * h
        branch = b * patches * (h * trained + 2 * (h // t))
        cell = 2 * b * h * (1 + trained)
        cell += b * (h // t) * (1 + trained + PVTC_MLP_RATIO * (2 + trained))
        queries = b * cells * (h // t)
        return tiles * (windows + keys + queries + 2 * (branch + cells * cell))

    def vision(self, tiles: int) -> int:
        """The vision encoder for so many tiles of this rank."""
        if not self.backward.trains("vision"):
            return 0
        vit, b = self.shape.vision, self.width
        c, tokens = vit.hidden_size, vit.tokens_per_tile
        if self.backward.vision_recompute:
            return tiles * tokens * c * b * vit.layers_run
        return self.vision_layer(tiles) * vit.layers_run

    def vision_layer(self, tiles: int) -> int:
        """One layer of the vision encoder that is not recomputed."""
        vit, b = self.shape.vision, self.width
        c, rows = vit.hidden_size, tiles * vit.tokens_per_tile
        norms = 2 * 2 * rows * c * b
        attention = 4 * c + (c if self.local else 0)
        # Queries and keys before their norms; those after them, and values, stand in for the packed ones.
        queries = 2 * rows * c * b if vit.qk_normalization else 0
        scales = 2 * c
        return norms + queries + rows * b * (attention + scales + 2 * vit.ffn_hidden_size)

    def output(self, stats: PlanStats) -> int:
        """Final norm, logits and loss of the supervised rows."""
        shape, t = self.shape, self.layout.tensor
        part = stats.deep_rows // t if self.layout.sequence_parallel else stats.deep_rows
        trained = self.backward.trains("llm")
        norm = self.norm(part * shape.hidden, trained=trained) - part * shape.hidden * self.width * trained
        rows = stats.output_rows
        return norm + rows * self.width * (shape.hidden * trained + shape.vocab // t)

    def layer_input(self, layer: int, stats: PlanStats) -> int:
        """What full recomputation keeps of a layer: the rows that enter it."""
        rows = self.rows(layer - 1, stats) if layer in self.shape.compression.injection_layers[:1] else None
        rows = self.rows(layer, stats) if rows is None else rows
        part = rows // self.layout.tensor if self.layout.sequence_parallel else rows
        return part * self.shape.hidden * self.width


@dataclass(frozen=True)
class ChunkActivations:
    """Bytes of one micro-batch in one model chunk."""

    parts: dict[str, int]
    """vision, projectors, shallow, deep and output."""
    working: int
    """Most that recomputation brings back at a time."""

    @property
    def total(self) -> int:
        """Bytes kept between forward and backward."""
        return sum(self.parts.values())


def chunk_activations(
    model: ActivationModel, chunk: StageLayers, stats: PlanStats, *, first: bool, last: bool
) -> ChunkActivations:
    """Activations of one micro-batch in a model chunk; `first` and `last` of the whole model."""
    shape = model.shape
    parts = dict.fromkeys(("vision", "projectors", "shallow", "deep", "output"), 0)
    working = 0
    if not model.backward.reaches("llm"):
        return ChunkActivations(parts, 0)
    if first:
        tiles = -(-stats.vision_tiles // model.layout.tensor)
        parts["vision"] = model.vision(tiles)
        if parts["vision"] and model.backward.vision_recompute:
            working = model.vision_layer(tiles)
        parts["projectors"] = model.projector(shape.compression.entry_grid, stats.projected_tiles)
    kept_all = replace(model, backward=replace(model.backward, modules=frozenset()))
    for layer in range(chunk.first, chunk.end):
        phase = "shallow" if layer < shape.shallow_layers else "deep"
        whole = model.decoder_layer(layer, stats)
        if layer in model.backward.full_layers:
            parts[phase] += model.layer_input(layer, stats)
            working = max(working, whole)
        else:
            parts[phase] += whole
            working = max(working, kept_all.decoder_layer(layer, stats) - whole)
    parts["projectors"] += carried_features(model, chunk, stats)
    if last:
        parts["output"] = model.output(stats)
    return ChunkActivations(parts, working)


def carried_features(model: ActivationModel, chunk: StageLayers, stats: PlanStats) -> int:
    """Bytes of the ViT features that a chunk keeps for its recomputed layers: once, however many they are."""
    shape = model.shape
    consumers = any(layer >= chunk.first for layer in shape.compression.injection_layers)
    if not (consumers and model.backward.full_layers and chunk.end > chunk.first):
        return 0
    elements = stats.projected_tiles * shape.vision.tokens_per_tile * shape.vision.hidden_size
    return elements * model.width


def rank_activations(
    model: ActivationModel, rank: int, stats: PlanStats, micro_batches: int
) -> tuple[dict[str, int], int, list[int]]:
    """Of a rank at its fullest: bytes per part, bytes while recomputing, micro-batches per chunk."""
    layout = model.layout
    flying = in_flight(layout, rank, micro_batches)
    parts: dict[str, int] = {}
    working = 0
    for number, (chunk, count) in enumerate(zip(layout.stages[rank], flying, strict=True)):
        place = {
            "first": rank == 0 and number == 0,
            "last": rank == layout.pipeline - 1 and number == len(flying) - 1,
        }
        one = chunk_activations(model, chunk, stats, **place)
        for name, size in one.parts.items():
            # A micro-batch's loss is computed just before its backward pass: one at a time.
            parts[name] = parts.get(name, 0) + size * (min(count, 1) if name == "output" else count)
        working = max(working, one.working)
    return parts, working, flying
