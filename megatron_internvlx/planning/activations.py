"""Bytes that one micro-batch keeps for its backward pass, part by part, on one rank of a stage.

Counted are the tensors that autograd saves, each storage once, for the two implementations: "local"
(measured on CPU by tests) and "transformer_engine" (the same modules with fused norms, SwiGLU and
attention, which keep less; FP8 keeps its linear inputs at half of what is counted here). Vision encoder and
PVTC have the same kernels, and so keep the same, in both.

Letters: S rows of a layer's phase, s rows of this rank (S/t under sequence parallelism, else S), n rows that reach
the output layer (the supervised ones; with static boundaries --max-supervised-tokens-per-pack, or all that enter
layer 0),
T tiles (of this rank in the vision encoder), L = 1+P*P tokens and P*P patches of a tile, g*g tokens of a
projector; h, c widths of decoder and vision encoder, f, F inner widths of their MLPs, q, k query and key widths,
d width of a head, V vocabulary, E experts, r of them per row; t tensor-parallel size, which divides q, k, f and V.
Type x is that of activations. "if trained": where the weights get a gradient; "local": not by Transformer Engine.

| tensor | shape | type | who keeps it | counted by |
|---|---|---|---|---|
| input of each of two norms | [s, h] | x; local fp32 | norm | `norm` |
| output of each norm, if trained | [s, h] | x | linear layer behind; local: norm, too | `norm` |
| queries, keys, values in one | [S, q+2k] | x | attention: values are a view | `attention` |
| rotated queries and keys | [S, q+k] | x | attention | `attention` |
| attention output | [S, q] | x | attention; not with core_attn recomputed | `attention` |
| outputs of all samples joined, local | [S, q] | x | linear_proj | `attention` |
| norms of queries and keys | [S, q+k] | as norms | q_layernorm, k_layernorm | `attention` |
| cosines, sines for both, local | 4 [S, d] | x | RoPE | `attention` |
| gate and up | [S, 2f] | x | SwiGLU | `gated` |
| SiLU of the gate, local | [S, f] | x | product | `gated` |
| product, if trained | [S, f] | x | linear_fc2; not with moe_act recomputed | `gated` |
| rows to and from experts | 2 r [S, h] | x | dispatcher, combination | `mlp` |
| logits, probabilities, scores | 3 [S, E] | fp32 | router | `mlp` |
| PVTC: patches; two norms of them, if trained | [T, P*P, c]; 2 [T, P*P, c] | x | ProjectionMLP | `projector` |
| PVTC: before SiLU, and gathered | [T, P*P, h/t], [T, P*P, h] | x | kv_proj | `projector` |
| PVTC: before SiLU | [T, g*g, h/t] | x | query_proj | `projector` |
| PVTC, twice: norm of patches, if trained | [T, P*P, h] | x | WindowAttention | `projector` |
| PVTC, twice: keys and values | 2 [T, P*P, h/t] | x | WindowAttention | `projector` |
| PVTC, twice: queries; before its MLP | 2 [T, g*g, h] | x | WindowAttention | `projector` |
| PVTC, twice: norms of these, if trained | 2 [T, g*g, h] | x | WindowAttention | `projector` |
| PVTC, twice: q; gate and up | [T, g*g, (1 + 2 * 4) h/t] | x | WindowAttention | `projector` |
| PVTC, twice: proj input; product; if trained | [T, g*g, (1 + 4) h/t] | x | WindowAttention | `projector` |
| MLP: norm; before GELU; after, if trained | [T, P*P, c]; 2 [T, g*g, h/t] | x | MLPProjector | `projector` |
| two norms, inputs and outputs | 4 [T, L, c] | x | InternViTLayer | `vision_layer` |
| qkv, attention output; joined, local or torch's attention | [T, L, 4c]; [T, L, c] | x | attention | `vision_layer` |
| queries and keys before their norms, if any | 2 [T, L, c] | x | attention | `vision_layer` |
| branches before their LayerScale | 2 [T, L, c] | x | LayerScale | `vision_layer` |
| before and after GELU | 2 [T, L, F] | x | MLP | `vision_layer` |
| final norm; its output, if trained | [s, h]; [n, h] | as norms | output layer | `output` |
| logits, their gradient in their place | [n, V] | x | loss | `output` |
| adapters: rows between A and B, r of each projection | [S, 3r], [S, r], [S, 2r], [S, r] | x | adapter | `adapters` |
| adapters: input after dropout, and its mask | [s, h], [S, q], [s, h], [S, f] | x, 1 byte | adapter | `adapters` |
| rows that enter a recomputed layer | [s, h] | x | checkpoint | `layer_input` |
| ViT features of recomputed layers, once | [T, L, c] | x | chunk | `carried_features` |
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from operator import mul

from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_internvlx.config import PVTC_MLP_RATIO, VisionSettings, settings_from
from megatron_internvlx.lora_settings import LoraSettings
from megatron_internvlx.megatron_settings import Parallelism
from megatron_internvlx.model.sizes import ModelSizes, model_sizes
from megatron_internvlx.parallel.layout import StageLayers
from megatron_internvlx.planning.adapters import (
    AdaptedLinear,
    decoder_attention,
    decoder_mlp,
    projector,
    vision_layer,
)
from megatron_internvlx.planning.flops import BackwardSettings, PlanStats
from megatron_internvlx.planning.memory import Layout, RankState, StateBytes, rank_state
from megatron_internvlx.planning.simulate import Schedule, in_flight
from megatron_internvlx.precision import Precision


@dataclass(frozen=True)
class MemoryModel:
    """Model, layout and settings that the memory of a rank depends on, besides the micro-batch."""

    sizes: ModelSizes
    layout: Layout
    backward: BackwardSettings
    per_parameter: StateBytes
    local: bool
    """Megatron's local implementation instead of Transformer Engine."""
    vision_copies: bool = False
    """The vision encoder's attention may copy its output to join the heads: torch's, and any of `local`."""
    dropped: bool = False
    """Dropout on the adapters' inputs."""

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> MemoryModel:
        """Model of the memory under validated arguments. Raises ValueError where Megatron refuses the layout."""
        try:
            config = core_transformer_config_from_args(args)
            layout = Layout.from_config(settings_from(args, Parallelism), config)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(str(error) or "Megatron refuses this layout (an assertion)") from error
        local = settings_from(args, Precision).transformer_impl == "local"
        backward = BackwardSettings.from_args(args)
        copies = local or settings_from(args, VisionSettings).vision_attention == "torch"
        dropped = settings_from(args, LoraSettings).lora_dropout > 0
        return cls(model_sizes(args), layout, backward, StateBytes.from_args(args), local, copies, dropped)

    @property
    def width(self) -> int:
        """Bytes of an activation element: 2 with bf16, 4 with fp32."""
        return self.per_parameter.weight

    def state(self, rank: int) -> RankState:
        """Weights, gradients and optimizer state of one rank of pipeline stage `rank`."""
        return rank_state(self.sizes, self.layout, rank, self.per_parameter, self.backward)

    def norm(self, elements: int, *, trained: bool, adapted: bool = False) -> int:
        """Bytes of a norm of the decoder and of the linear layer behind it, which may have an adapter."""
        out = elements * self.width * (trained or adapted)
        if not self.local:
            return elements * self.width + out
        return 4 * elements + elements * self.width * trained + out

    def rows(self, layer: int, stats: PlanStats) -> int:
        """Decoder rows of a layer's phase."""
        return stats.shallow_rows if layer < self.sizes.shallow_layers else stats.deep_rows

    def rank_rows(self, rows: int) -> int:
        """Share of `rows` that a rank has outside of attention and MLP."""
        return rows // self.layout.tensor if self.layout.sequence_parallel else rows

    def decoder_layer(self, layer: int, stats: PlanStats) -> int:
        """Bytes of a decoder layer that is not recomputed, its injection included."""
        sizes, rows, trained = self.sizes, self.rows(layer, stats), self.backward.trains("llm")
        norms = sum(
            self.norm(self.rank_rows(rows) * sizes.hidden, trained=trained, adapted=bool(linears))
            for linears in (decoder_attention(sizes), decoder_mlp(sizes, layer))
        )
        injected = layer in sizes.injection_layers
        injection = self.projector(sizes.high_grid, stats.projected_tiles) if injected else 0
        return norms + self.attention(rows) + self.mlp(layer, rows, trained) + injection

    def attention(self, rows: int) -> int:
        """Bytes of the self-attention of a decoder layer, its norms of queries and keys included."""
        sizes, t = self.sizes, self.layout.tensor
        q, k = sizes.query_width // t, sizes.key_width // t
        fused, rotated, output = q + 2 * k, q + k, 0 if "core_attn" in self.backward.modules else q
        joined = q if self.local else 0
        cosines = 4 * sizes.head_dim if self.local else 0
        norms = self.norm(rows * (q + k), trained=False) if sizes.qk_norm else 0
        adapters = self.adapters(decoder_attention(sizes), rows)
        return rows * (fused + rotated + output + joined + cosines) * self.width + norms + adapters

    def mlp(self, layer: int, rows: int, trained: bool) -> int:
        """Bytes of the MLP of a decoder layer, or of its experts with their router."""
        sizes, layout, modules = self.sizes, self.layout, self.backward.modules
        if layer not in sizes.expert_layers:
            linears = decoder_mlp(sizes, layer)
            between = rows * self.gated(sizes.ffn // layout.tensor, trained or bool(linears))
            return 0 if "mlp" in modules else between + self.adapters(linears, rows)
        if "moe" in modules:
            return 0
        moved = 2 * sizes.hidden * self.width
        routed = sizes.topk * (self.gated(sizes.expert_ffn // layout.expert_tensor, trained) + moved)
        shared = self.gated(sizes.shared_ffn // layout.tensor, trained)
        return rows * (routed + shared + 3 * sizes.experts * 4)

    def adapters(self, linears: tuple[AdaptedLinear, ...], rows: int) -> int:
        """Bytes that the adapters of layers with `rows` decoder rows, or tiles, keep besides their inputs."""
        rank, t, bytes_ = self.sizes.lora_rank, self.layout.tensor, self.width
        kept = sum(linear.per_tile * linear.kept(rank) for linear in linears) * bytes_
        if self.dropped:  # a copy of the input instead of the input itself, and a mask
            kept += sum(x.per_tile * x.inputs // (t if x.row_parallel else 1) for x in linears)
        return rows * kept

    def gated(self, ffn: int, trained: bool) -> int:
        """Bytes per row between the two linear layers of an MLP, gated or not."""
        inner = self.sizes.matrices - 1
        activated = ffn if self.local and inner == 2 else 0
        product = ffn if trained and "moe_act" not in self.backward.modules else 0
        return (inner * ffn + activated + product) * self.width

    def projector(self, grid: int, tiles: int) -> int:
        """Bytes of a projector of `tiles` tiles to `grid` x `grid` tokens each."""
        sizes, b = self.sizes, self.width
        linears = projector(sizes, grid)
        trained = self.backward.trains("projectors") or bool(linears)
        if not self.backward.reaches("projectors"):
            return 0
        h, c, share = sizes.hidden, sizes.vision.hidden_size, sizes.hidden // self.layout.tensor
        patches, cells = sizes.patches**2, grid * grid
        if sizes.projector == "mlp":
            inside = b * (patches * c * (1 + trained) + cells * share * (1 + trained))
            return tiles * inside + self.adapters(linears, tiles)
        windows = b * patches * c * (1 + 2 * trained)  # one input of two norms
        kv_proj, query_proj = b * patches * (share + h), b * cells * share
        keys = b * patches * (h * trained + 2 * share)
        queries = 2 * b * cells * h * (1 + trained)
        inside = b * cells * share * (1 + trained + PVTC_MLP_RATIO * (2 + trained))
        kept = windows + kv_proj + query_proj + 2 * (keys + queries + inside)
        return tiles * kept + self.adapters(linears, tiles)

    def vision(self, tiles: int) -> int:
        """Bytes of the vision encoder for `tiles` tiles of this rank."""
        if not self.backward.reaches("vision"):
            return 0
        kept = self.width * tiles * self.sizes.features_per_tile  # a layer's input
        one = kept if self.backward.vision_recompute else self.vision_layer(tiles)
        return one * self.sizes.vision.layers_run

    def vision_layer(self, tiles: int) -> int:
        """Bytes of a layer of the vision encoder that is not recomputed."""
        vit, b = self.sizes.vision, self.width
        rows, elements = tiles * vit.tokens_per_tile, tiles * self.sizes.features_per_tile
        norms, scales = 4 * elements * b, 2 * elements * b
        attention = (4 + (self.local or self.vision_copies)) * elements * b
        if vit.qk_normalization:
            attention += 2 * elements * b
        inner = 2 * rows * vit.ffn_hidden_size * b
        return norms + attention + scales + inner + self.adapters(vision_layer(self.sizes), tiles)

    def output(self, stats: PlanStats) -> int:
        """Bytes of the final norm, the logits and the loss of the rows that reach the output layer."""
        sizes, trained, rows = self.sizes, self.backward.trains("llm"), stats.output_rows
        elements = self.rank_rows(stats.deep_rows) * sizes.hidden
        # Of the norm's output only these rows are kept.
        norm = self.norm(elements, trained=trained) - elements * self.width * trained
        kept = sizes.hidden * trained + sizes.padded_vocab // self.layout.tensor
        return norm + rows * kept * self.width

    def layer_input(self, layer: int, stats: PlanStats) -> int:
        """Bytes of the rows that enter a layer, before it expands them: all that full recomputation keeps."""
        expands = layer in self.sizes.injection_layers[:1]
        rows = self.rank_rows(self.rows(layer - 1 if expands else layer, stats))
        return rows * self.sizes.hidden * self.width

    def carried_features(self, chunk: StageLayers, stats: PlanStats) -> int:
        """Bytes of the ViT features that a chunk keeps for its recomputed layers: once, however many they are."""
        consumers = any(layer >= chunk.first for layer in self.sizes.injection_layers)
        if not (consumers and self.backward.full_layers and chunk.end > chunk.first):
            return 0
        return stats.projected_tiles * self.sizes.features_per_tile * self.width


@dataclass(frozen=True)
class ChunkActivations:
    """Bytes of one micro-batch in one model chunk."""

    parts: dict[str, int]
    """vision, projectors, shallow, deep and output."""
    working: int
    """Most bytes that recomputation brings back at a time."""

    @property
    def total(self) -> int:
        """Bytes kept between forward and backward."""
        return sum(self.parts.values())

    @property
    def waiting(self) -> int:
        """Bytes kept while other micro-batches run: without those of the loss, whose backward pass follows at once."""
        return self.total - self.parts["output"]


def chunk_activations(
    model: MemoryModel, chunk: StageLayers, stats: PlanStats, *, first: bool, last: bool
) -> ChunkActivations:
    """Bytes of one micro-batch in a model chunk; `first` and `last`: the chunk is the first or last of the model."""
    sizes = model.sizes
    parts = dict.fromkeys(("vision", "projectors", "shallow", "deep", "output"), 0)
    working = 0
    if not model.backward.reaches("llm"):
        return ChunkActivations(parts, 0)
    if first:
        tiles = -(-stats.vision_tiles // model.layout.tensor)
        parts["vision"] = model.vision(tiles)
        if parts["vision"] and model.backward.vision_recompute:
            working = model.vision_layer(tiles)
        parts["projectors"] = model.projector(sizes.entry_grid, stats.projected_tiles)
    kept_all = replace(model, backward=replace(model.backward, modules=frozenset()))
    for layer in range(chunk.first, chunk.end):
        phase = "shallow" if layer < sizes.shallow_layers else "deep"
        whole = model.decoder_layer(layer, stats)
        if layer in model.backward.full_layers:
            parts[phase] += model.layer_input(layer, stats)
            working = max(working, whole)
        else:
            parts[phase] += whole
            working = max(working, kept_all.decoder_layer(layer, stats) - whole)
    parts["projectors"] += model.carried_features(chunk, stats)
    if last:
        parts["output"] = model.output(stats)
    return ChunkActivations(parts, working)


def rank_activations(
    model: MemoryModel, rank: int, stats: PlanStats, schedule: Schedule
) -> tuple[dict[str, int], int, list[int]]:
    """Bytes per part, bytes of recomputation and micro-batches per chunk when a rank holds most."""
    layout = model.layout
    end = len(layout.stages[rank]) - 1
    chunks = [
        chunk_activations(
            model, chunk, stats, first=rank == number == 0, last=rank == layout.pipeline - 1 and number == end
        )
        for number, chunk in enumerate(layout.stages[rank])
    ]
    waiting = [chunk.waiting for chunk in chunks]
    flying = max(in_flight(schedule, rank).tolist(), key=lambda counts: sum(map(mul, counts, waiting)))
    parts = {name: sum(map(mul, flying, (chunk.parts[name] for chunk in chunks))) for name in chunks[0].parts}
    parts["output"] = sum(chunk.parts["output"] for chunk in chunks)
    return parts, max(chunk.working for chunk in chunks), flying


def forward_bytes(model: MemoryModel, stats: PlanStats) -> int:
    """Most bytes of a forward pass over the whole model that keeps nothing for a backward pass, as in an evaluation.

    At most one layer's tensors exist at a time, those that its backward pass would read among them, besides the
    decoder's rows and the vision encoder's features; at the end the final norm and the logits.
    """
    whole = replace(model, backward=BackwardSettings())
    sizes, tiles = model.sizes, -(-stats.vision_tiles // model.layout.tensor)
    features = stats.projected_tiles * sizes.features_per_tile * model.width
    rows = whole.rank_rows(stats.deep_rows) * sizes.hidden * model.width
    vision = whole.vision_layer(tiles)
    entry = features + whole.projector(sizes.entry_grid, stats.projected_tiles)
    layer = max(whole.decoder_layer(layer, stats) for layer in range(sizes.layers))
    return max(vision, entry, features + rows + layer, whole.output(stats))
