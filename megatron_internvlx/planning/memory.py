"""What one rank of each pipeline stage holds: parameters, and the bytes of weights, gradients and optimizer.

Parameter counts are exact. Bytes leave out the padding of Megatron's gradient buffers (some hundred
bytes per tensor). Activations are in planning/activations.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_internvlx.parallel.layout import StageLayers, stage_layers
from megatron_internvlx.planning.flops import BackwardSettings, Owner
from megatron_internvlx.planning.parameters import PVTC_MLP_RATIO, ModelShape, vision_parameters


@dataclass(frozen=True)
class Layout:
    """How the ranks share the model."""

    tensor: int
    pipeline: int
    data: int
    """Data-parallel replicas of a dense weight."""
    expert: int = 1
    """Ranks that the experts of a layer are spread over."""
    expert_tensor: int = 1
    expert_data: int = 1
    """Data-parallel replicas of an expert weight."""
    sequence_parallel: bool = False
    stages: tuple[tuple[StageLayers, ...], ...] = ()
    """Per pipeline rank, its model chunks; one chunk without virtual stages."""
    group_size: int = 1
    """Micro-batches that a virtual stage runs before the next one's turn."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Decoder layers per stage in the order of the model; stage = chunk * pipeline + rank."""
        chunks = range(len(self.stages[0]))
        return tuple(ranks[chunk].end - ranks[chunk].first for chunk in chunks for ranks in self.stages)

    @classmethod
    def from_args(cls, args: argparse.Namespace, config: TransformerConfig) -> Layout:
        """Of Megatron's validated arguments and the config built from them."""
        tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        chunks = args.virtual_pipeline_model_parallel_size
        expert, expert_tensor = args.expert_model_parallel_size, args.expert_tensor_parallel_size or tensor
        stages = tuple(
            tuple(stage_layers(config, rank, chunk) for chunk in (range(chunks) if chunks else (None,)))
            for rank in range(pipeline)
        )
        return cls(
            tensor,
            pipeline,
            args.data_parallel_size,
            expert,
            expert_tensor,
            args.world_size // (expert * expert_tensor * pipeline),
            args.sequence_parallel,
            stages,
            args.microbatch_group_size_per_vp_stage or pipeline,
        )


@dataclass(frozen=True)
class Part:
    """Parameters of one rank that share an owner and a way of being spread."""

    name: str
    """vision, entry_projector, embedding, layers, injections, experts, final_norm or output."""
    owner: Owner
    count: int
    """Parameters on this rank."""
    expert: bool = False
    """Spread over the expert-parallel group: replicated over fewer data-parallel ranks."""
    used: int | None = None
    """Of them those that can get a gradient. None: all."""

    @property
    def trainable(self) -> int:
        """Parameters that get a gradient when their owner is trained."""
        return self.count if self.used is None else self.used


def rank_parts(shape: ModelShape, layout: Layout, rank: int) -> list[Part]:
    """Parameters of one rank of pipeline stage `rank`, all its model chunks together."""
    chunks, t = layout.stages[rank], layout.tensor
    layers = [layer for chunk in chunks for layer in range(chunk.first, chunk.end)]
    first, last = rank == 0, rank == layout.pipeline - 1
    injected = [layer for layer in layers if layer in shape.compression.injection_layers]
    parts = []
    if first:
        unused = shape.vision.num_layers - shape.vision.layers_run
        vision = vision_parameters(shape.vision)
        used = vision - unused * _vision_layer(shape)
        parts += [
            Part("vision", "vision", vision, used=used),
            Part("entry_projector", "projectors", projector_share(shape, shape.compression.entry_grid, t)),
            Part("embedding", "llm", shape.vocab // t * shape.hidden),
        ]
    high = projector_share(shape, shape.compression.high_grid, t)
    parts += [
        Part("injections", "projectors", len(injected) * high),
        Part("layers", "llm", sum(layer_share(shape, layer, t) for layer in layers)),
        Part("experts", "llm", sum(expert_share(shape, layer, layout) for layer in layers), expert=True),
    ]
    if last:
        parts.append(Part("final_norm", "llm", shape.norm_tensors * shape.hidden))
        if not shape.tied_embeddings or not first:
            parts.append(Part("output", "llm", shape.vocab // t * shape.hidden))
    return [part for part in parts if part.count]


def _vision_layer(shape: ModelShape) -> int:
    vit = shape.vision
    rest = vision_parameters(_with_layers(vit, 0))
    return (vision_parameters(vit) - rest) // vit.num_layers


def _with_layers(vit, layers: int):
    from dataclasses import replace

    return replace(vit, num_layers=layers, select_layer=-1)


def projector_share(shape: ModelShape, grid: int, tensor: int) -> int:
    """Parameters of one tensor-parallel rank's share of a projector to `grid` x `grid` tokens."""
    h, c = shape.hidden, shape.vision.hidden_size
    shuffled = (shape.compression.patches // grid) ** 2 * c
    if shape.compression.projector == "mlp":
        return 2 * shuffled + (shuffled * h + h) // tensor + h * h // tensor + h
    projections = shuffled + shuffled * h // tensor + 2 * (c + c * h // tensor)
    attention = (4 * h * h + 3 * PVTC_MLP_RATIO * h * h) // tensor + 3 * h
    return projections + 2 * attention + grid * grid * h


def layer_share(shape: ModelShape, layer: int, tensor: int) -> int:
    """Parameters of a tensor-parallel rank's share of a decoder layer, experts not included."""
    h = shape.hidden
    queries, keys = shape.heads * shape.head_dim, shape.kv_groups * shape.head_dim
    attention = (h * (queries + 2 * keys) + queries * h) // tensor
    attention += (queries + 2 * keys) * shape.qkv_bias // tensor + h * shape.linear_bias
    attention += 2 * shape.head_dim * shape.norm_tensors * shape.qk_norm
    if layer in shape.expert_layers:
        mlp = shape.experts * h  # the router, on every rank
        mlp += _mlp_share(shape, shape.shared_ffn, tensor) if shape.shared_ffn else 0
    else:
        mlp = _mlp_share(shape, shape.ffn, tensor)
    return attention + mlp + 2 * shape.norm_tensors * h


def expert_share(shape: ModelShape, layer: int, layout: Layout) -> int:
    """Parameters of a rank's experts in a decoder layer."""
    if layer not in shape.expert_layers:
        return 0
    return shape.experts // layout.expert * _mlp_share(shape, shape.expert_ffn, layout.expert_tensor)


def _mlp_share(shape: ModelShape, ffn: int, tensor: int) -> int:
    bias = (ffn * (shape.matrices - 1) // tensor + shape.hidden) if shape.linear_bias else 0
    return shape.matrices * shape.hidden * ffn // tensor + bias


@dataclass(frozen=True)
class StateSizes:
    """Bytes per parameter of what a rank keeps through the whole training."""

    weight: int
    fp8_copies: int
    """Transformer Engine's FP8 weight and its transpose, per parameter of a decoder layer. 0: no FP8."""
    gradient: int
    optimizer: int
    distributed: bool
    """The optimizer's state is sharded over the data-parallel ranks."""

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> StateSizes:
        """Of Megatron's validated arguments."""
        weight = 2 if args.bf16 or args.fp16 else 4
        gradient = 4 if args.accumulate_allreduce_grads_in_fp32 else weight
        aware = args.use_precision_aware_optimizer
        master = 0 if weight == 4 else (args.main_params_dtype.itemsize if aware else 4)
        moments = args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize if aware else 8
        copies = 2 if args.fp8 and not args.fp8_param_gather else 0
        return cls(weight, copies, gradient, master + moments, args.use_distributed_optimizer)


@dataclass(frozen=True)
class RankState:
    """Parameters of one rank and the bytes they cost."""

    parts: tuple[Part, ...]
    trainable: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def parameters(self) -> int:
        """Parameters on this rank, frozen ones included."""
        return sum(part.count for part in self.parts)

    @property
    def total(self) -> int:
        """Bytes."""
        return self.weights + self.gradients + self.optimizer


def rank_state(
    shape: ModelShape, layout: Layout, rank: int, sizes: StateSizes, frozen: BackwardSettings
) -> RankState:
    """Weights, gradients and optimizer state of one rank of pipeline stage `rank`."""
    parts = rank_parts(shape, layout, rank)
    trained = [part for part in parts if frozen.trains(part.owner)]
    copied = sum(p.count for p in parts if p.name in ("layers", "experts"))
    shards = layout.data if sizes.distributed else 1
    expert_shards = layout.expert_data if sizes.distributed else 1
    held = sum(-(-p.trainable // (expert_shards if p.expert else shards)) for p in trained)
    trainable = sum(p.trainable for p in trained)
    return RankState(
        tuple(parts),
        trainable,
        sum(p.count for p in parts) * sizes.weight + copied * sizes.fp8_copies,
        trainable * sizes.gradient,
        held * sizes.optimizer,
    )


def in_flight(layout: Layout, rank: int, micro_batches: int) -> list[int]:
    """Micro-batches whose activations each model chunk of pipeline stage `rank` holds at most.

    Megatron's schedules: one forward one backward, or with virtual stages the interleaved one.
    """
    chunks = len(layout.stages[rank])
    behind = layout.pipeline - rank - 1
    if chunks == 1:
        return [min(behind + 1, micro_batches)]
    warmup = min(behind * 2 + (chunks - 1) * layout.group_size + 1, micro_batches * chunks)
    return list(_forwards_per_chunk(warmup, chunks, layout.group_size, micro_batches))


def _forwards_per_chunk(forwards: int, chunks: int, group: int, micro_batches: int) -> Iterator[int]:
    """Of the first `forwards` forward passes of the interleaved schedule, how many run each chunk."""
    order: list[int] = []
    for start in range(0, micro_batches, group):
        size = min(group, micro_batches - start)
        order += [chunk for chunk in range(chunks) for _ in range(size)]
    for chunk in range(chunks):
        yield order[:forwards].count(chunk)
