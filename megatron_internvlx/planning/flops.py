"""Floating-point operations of a micro-batch, part by part, exact from its SequencePlan.

Convention: FLOPs = 2 x multiply-accumulates of matrix products and convolutions; softmax, norms,
activations and RoPE are not counted. PVTC's window attention is counted as the two matrix products
of the released code, however it is computed. Counts are of the whole model, whatever the layout:
work that tensor-parallel ranks repeat (the upsampling) counts once.

Causal attention, per segment of n rows: "full" counts all n*n pairs of query and key, as torch's
FLOP counter and published figures do; "causal" counts the n*(n+1)/2 that the mask leaves. MFU uses
"causal", which is Megatron's rule up to 1/n.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Literal

from megatron_internvlx.config import PVTC_MLP_RATIO, TrainSettings, VisionSettings, settings_from
from megatron_internvlx.data.plan import PhasePlan, SequencePlan
from megatron_internvlx.lora_settings import LoraSettings
from megatron_internvlx.model.internvit_config import InternViTConfig
from megatron_internvlx.model.sizes import ModelSizes
from megatron_internvlx.planning.adapters import (
    AdaptedLinear,
    decoder_attention,
    decoder_mlp,
    projector,
    vision_layer,
)

Attention = Literal["causal", "full"]
Owner = Literal["vision", "projectors", "llm"]
Kind = Literal[
    "patches",
    "linear",
    "products",
    "mlp",
    "experts",
    "shared_experts",
    "upsample",
    "adapters",
    "mlp_adapters",
]


@dataclass(frozen=True)
class PlanStats:
    """Counts of tiles and rows in one or more micro-batches, in which every cost is linear."""

    vision_tiles: int = 0
    """Tiles through the vision encoder."""
    projected_tiles: int = 0
    """Tiles through each projector."""
    upsampled_tiles: int = 0
    """Tiles whose shallow rows are upsampled; 0 with LVTC off."""
    shallow_rows: int = 0
    """Rows of the shallow phase; 0 with LVTC off."""
    shallow_squares: int = 0
    """Sum of squared segment lengths of the shallow phase."""
    deep_rows: int = 0
    deep_squares: int = 0
    output_rows: int = 0
    """Rows that reach the output layer: the supervised ones, and in static mode padding."""

    @classmethod
    def of(cls, plan: SequencePlan, *, padded: bool = False) -> PlanStats:
        """Counts of the useful rows of a micro-batch, or with `padded` of all that are computed."""
        lvtc = plan.expand_index is not None
        samples = None if padded else len(plan.sample_ids)
        shallow = _rows_and_squares(plan.shallow, samples) if lvtc else (0, 0)
        return cls(
            plan.tile_capacity if padded else plan.num_tiles,
            plan.encoded_tiles if padded else plan.num_tiles,
            (plan.encoded_tiles if padded else plan.num_tiles) if lvtc else 0,
            *shallow,
            *_rows_and_squares(plan.deep, samples),
            plan.supervised_capacity if padded else len(plan.loss_rows),
        )

    def __add__(self, other: PlanStats) -> PlanStats:
        return PlanStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def _rows_and_squares(phase: PhasePlan, samples: int | None) -> tuple[int, int]:
    """Rows and squares of the first `samples` segments (the padding comes last), or of all."""
    lengths = phase.segment_lengths[:samples]
    return sum(lengths), sum(n * n for n in lengths)


@dataclass(frozen=True)
class Work:
    """Forward FLOPs of one operation of one part."""

    part: str
    """vision, entry_projector, injection_K, upsample, shallow_linear, shallow_attention,
    shallow_experts, deep_linear, deep_attention, deep_experts or output."""
    owner: Owner
    """Part whose --freeze flag applies to this work."""
    kind: Kind
    layer: int | None
    """0-based decoder layer (of the layer's injection too), None outside the decoder."""
    flops: int


@dataclass(frozen=True)
class FlopsByPart:
    """Forward FLOPs, operation by operation."""

    works: tuple[Work, ...]

    @property
    def total(self) -> int:
        """FLOPs of the whole forward pass."""
        return sum(work.flops for work in self.works)

    def by_part(self) -> dict[str, int]:
        """FLOPs per part; see `Work.part`."""
        return _sums((work.part, work.flops) for work in self.works)

    def by_layer(self) -> dict[int | None, int]:
        """FLOPs per decoder layer, its injection and the upsampling included; None: the rest."""
        return _sums((work.layer, work.flops) for work in self.works)


def _sums(pairs):
    sums: dict = {}
    for key, value in pairs:
        sums[key] = sums.get(key, 0) + value
    return sums


def forward_flops(sizes: ModelSizes, stats: PlanStats, attention: Attention = "causal") -> FlopsByPart:
    """Forward FLOPs of the micro-batches that `stats` counts."""
    tiles = stats.projected_tiles
    works = [*_vision(sizes.vision, stats.vision_tiles)]
    linears = vision_layer(sizes) * sizes.vision.layers_run
    works += _adapters(sizes, "vision", "vision", None, linears, stats.vision_tiles)
    works += _projector(sizes, sizes.entry_grid, "entry_projector", None, tiles)
    for layer in range(sizes.layers):
        if layer in sizes.injection_layers:
            works += _projector(sizes, sizes.high_grid, f"injection_{layer}", layer, tiles)
            if layer == sizes.shallow_layers:
                upsample = 2 * stats.upsampled_tiles * (sizes.high_grid * sizes.low_grid) ** 2 * sizes.hidden
                works.append(Work("upsample", "llm", "upsample", layer, upsample))  # of decoder rows
        works += _layer(sizes, layer, stats, attention)
    output = 2 * stats.output_rows * sizes.hidden * sizes.padded_vocab
    works.append(Work("output", "llm", "linear", None, output))
    return FlopsByPart(tuple(works))


def _vision(vit: InternViTConfig, tiles: int) -> Iterator[Work]:
    c, s = vit.hidden_size, vit.tokens_per_tile
    patches = (s - 1) * vit.num_channels * vit.patch_size**2 * c
    linear = vit.layers_run * s * (4 * c * c + 2 * c * vit.ffn_hidden_size)
    products = vit.layers_run * 2 * s * s * c
    yield Work("vision", "vision", "patches", None, 2 * tiles * patches)
    yield Work("vision", "vision", "linear", None, 2 * tiles * linear)
    yield Work("vision", "vision", "products", None, 2 * tiles * products)


def _projector(sizes: ModelSizes, grid: int, part: str, layer: int | None, tiles: int) -> Iterator[Work]:
    """One projector: PVTC's three projection MLPs and two window attentions, or the MLP's two layers.

    The released class VisionProjector does the same products; tests/parity/test_flops.py counts them.
    """
    yield from _adapters(sizes, part, "projectors", layer, projector(sizes, grid), tiles)
    h, c = sizes.hidden, sizes.vision.hidden_size
    patches, cells = sizes.patches**2, grid * grid
    shuffled = patches * c * h  # every patch enters a cell's shuffled channels once
    if sizes.projector == "mlp":
        yield Work(part, "projectors", "linear", layer, 2 * tiles * (shuffled + cells * h * h))
        return
    projections = 2 * shuffled + c * h
    branch = 2 * cells * h * h + 2 * patches * h * h + 3 * PVTC_MLP_RATIO * cells * h * h
    yield Work(part, "projectors", "linear", layer, 2 * tiles * (projections + 2 * branch))
    # Each cell's query meets its own window, and the windows tile the patches.
    yield Work(part, "projectors", "products", layer, 2 * tiles * 2 * 2 * patches * h)


def _adapters(
    sizes: ModelSizes,
    part: str,
    owner: Owner,
    layer: int | None,
    linears: Iterable[AdaptedLinear],
    count: int,
    kind: Kind = "adapters",
) -> Iterator[Work]:
    """Products of the adapters of some linear layers for `count` decoder rows, or tiles."""
    flops = sum(linear.per_tile * linear.flops(sizes.lora_rank) for linear in linears)
    if flops:
        yield Work(part, owner, kind, layer, count * flops)


def _layer(sizes: ModelSizes, layer: int, stats: PlanStats, attention: Attention) -> Iterator[Work]:
    shallow = layer < sizes.shallow_layers
    phase = "shallow" if shallow else "deep"
    rows = stats.shallow_rows if shallow else stats.deep_rows
    squares = stats.shallow_squares if shallow else stats.deep_squares
    # Two products over the visible pairs, 2 FLOPs each; causal pairs are (squares + rows) / 2.
    pair_flops = 4 * squares if attention == "full" else 2 * (squares + rows)
    h, queries, keys = sizes.hidden, sizes.query_width, sizes.key_width
    yield Work(f"{phase}_linear", "llm", "linear", layer, 2 * rows * h * 2 * (queries + keys))
    yield Work(f"{phase}_attention", "llm", "products", layer, pair_flops * queries)
    part = f"{phase}_linear"
    yield from _adapters(sizes, part, "llm", layer, decoder_attention(sizes), rows)
    yield from _adapters(sizes, part, "llm", layer, decoder_mlp(sizes, layer), rows, "mlp_adapters")
    if layer not in sizes.expert_layers:
        yield Work(f"{phase}_linear", "llm", "mlp", layer, 2 * rows * sizes.matrices * h * sizes.ffn)
        return
    routed = sizes.topk * sizes.matrices * h * sizes.expert_ffn + h * sizes.experts  # the last: router
    yield Work(f"{phase}_experts", "llm", "experts", layer, 2 * rows * routed)
    if sizes.shared_ffn:
        shared = 2 * rows * sizes.matrices * h * sizes.shared_ffn
        yield Work(f"{phase}_experts", "llm", "shared_experts", layer, shared)


@dataclass(frozen=True)
class Recomputation:
    """Megatron's arguments for recomputation in the backward pass."""

    num_layers: int
    recompute_granularity: str | None
    """full: whole layers; selective: parts of each layer; None: nothing."""
    recompute_modules: list[str] | None
    """Parts under selective recomputation; None: core_attn."""
    recompute_method: str | None
    """block: the first `recompute_num_layers` of each model chunk; uniform: all layers."""
    recompute_num_layers: int | None


@dataclass(frozen=True)
class BackwardSettings:
    """Parts that are trained, and parts that are recomputed."""

    freeze_vision: bool = False
    freeze_llm: bool = False
    freeze_projectors: bool = False
    vision_recompute: bool = False
    """Every vision layer is recomputed (only where it has a backward pass)."""
    full_layers: frozenset[int] = frozenset()
    """0-based decoder layers recomputed whole, injection included."""
    modules: frozenset[str] = frozenset()
    """Megatron's --recompute-modules of selective recompute; core_attn, mlp, moe and
    shared_experts hold matrix products, the others cost none."""
    adapted: frozenset[str] = frozenset()
    """Parts with adapters: these are trained, and the part's own weights are not."""

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> BackwardSettings:
        """Settings in validated arguments, Megatron's and ours."""
        train, again = settings_from(args, TrainSettings), settings_from(args, Recomputation)
        full, selective = (again.recompute_granularity == kind for kind in ("full", "selective"))
        return cls(
            train.freeze_vision,
            train.freeze_llm,
            train.freeze_projectors,
            settings_from(args, VisionSettings).vision_recompute,
            frozenset(_recomputed_layers(args, again)) if full else frozenset(),
            frozenset(again.recompute_modules or ["core_attn"]) if selective else frozenset(),
            settings_from(args, LoraSettings).parts,
        )

    def trains(self, owner: Owner) -> bool:
        """Whether this part's own weights get gradients."""
        if owner in self.adapted:
            return False
        frozen = {"vision": self.freeze_vision, "projectors": self.freeze_projectors, "llm": self.freeze_llm}
        return not frozen[owner]

    def reaches(self, owner: Owner) -> bool:
        """Whether gradients flow through this part: it, its adapters, or something before it, is trained."""
        before: dict[Owner, tuple[Owner, ...]] = {
            "vision": ("vision",),
            "projectors": ("vision", "projectors"),
            "llm": ("vision", "projectors", "llm"),
        }
        return any(self.trains(part) or part in self.adapted for part in before[owner])


def _recomputed_layers(args: argparse.Namespace, again: Recomputation) -> Iterator[int]:
    """Layers under full recomputation: all, or with method block the first few of each model chunk."""
    if again.recompute_method != "block":
        yield from range(again.num_layers)
        return
    assert again.recompute_num_layers is not None
    # Only Megatron's config knows the layers of each chunk, and only this case needs it.
    from megatron.training.argument_utils import core_transformer_config_from_args

    from megatron_internvlx.parallel.layout import stage_layers

    config = core_transformer_config_from_args(args)
    chunks = config.virtual_pipeline_model_parallel_size
    for rank in range(config.pipeline_model_parallel_size):
        for chunk in range(chunks) if chunks else (None,):
            stage = stage_layers(config, rank, chunk)
            yield from range(stage.first, min(stage.first + again.recompute_num_layers, stage.end))


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of forward and backward."""

    model: int
    """FLOPs of the mathematics, nothing twice; MFU counts these."""
    hardware: int
    """With recomputation: of layers and modules as set, and of the attention scores, which every
    fused kernel computes again in its backward pass."""
    by_part: dict[str, int]
    """`model`, per part."""


def training_flops(forward: FlopsByPart, settings: BackwardSettings) -> TrainingFlops:
    """FLOPs of forward and backward, given those of the forward pass.

    A matrix product with weights costs its forward FLOPs once more for the gradient of its input,
    if gradients flow there, and once more for that of its weights, if they are trained. So a
    trained part costs 3x, a frozen one behind a trained one 2x, a frozen vision encoder 1x. The
    products of attention have two inputs to differentiate and no weights: 3x, frozen or not.
    Adapters cost 3x. The layer where gradients end is counted like the others, although no
    gradient of its input is needed.
    """
    model = [(work, work.flops * (1 + _backward(work, settings))) for work in forward.works]
    again = sum(_recomputed(work, settings) for work in forward.works)
    total = sum(flops for _, flops in model)
    return TrainingFlops(total, total + again, _sums((work.part, flops) for work, flops in model))


def _backward(work: Work, settings: BackwardSettings) -> int:
    """Backward FLOPs of an operation, divided by its forward ones."""
    if not settings.reaches(work.owner):
        return 0
    if work.kind == "products":
        return 2
    if work.kind in ("adapters", "mlp_adapters"):
        return 2
    if work.kind == "upsample":  # its matrix is a constant
        return 1
    pixels = work.kind == "patches"  # need no gradient
    return int(settings.trains(work.owner)) + int(not pixels)


_MODULE = {"mlp": "mlp", "mlp_adapters": "mlp", "experts": "moe", "shared_experts": "shared_experts"}


def _recomputed(work: Work, settings: BackwardSettings) -> int:
    """FLOPs of an operation that are computed again before its backward pass."""
    again = 0
    attention = work.kind == "products" and work.owner != "projectors"
    if attention and settings.reaches(work.owner):
        again += work.flops // 2  # the fused backward kernel computes the scores, one of two products
    if work.owner == "vision":
        whole = settings.vision_recompute and settings.reaches("vision") and work.kind != "patches"
    else:  # a layer runs again as a whole, a frozen injection in it too
        whole = work.layer in settings.full_layers
    if not whole and work.owner == "llm" and work.layer is not None:
        module = "core_attn" if attention else _MODULE.get(work.kind)
        whole = module in settings.modules or (work.kind == "shared_experts" and "moe" in settings.modules)
    return again + (work.flops if whole else 0)
