"""Contents of one rank of each pipeline stage: parameters, and the bytes of weights, gradients and optimizer.

Parameter counts are exact. Bytes leave out the padding of Megatron's gradient buffers (some hundred
bytes per tensor). Activations are in planning/activations.py.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_internvlx.config import settings_from
from megatron_internvlx.megatron_settings import Parallelism
from megatron_internvlx.model.sizes import ModelSizes
from megatron_internvlx.parallel.layout import StageLayers, stage_layers
from megatron_internvlx.planning.adapters import (
    adapter_parameters,
    decoder_attention,
    decoder_mlp,
    projector,
    vision_layer,
)
from megatron_internvlx.planning.flops import BackwardSettings, Owner
from megatron_internvlx.planning.parameters import (
    expert_parameters,
    layer_parameters,
    projector_parameters,
    vision_layer_parameters,
    vision_parameters,
)
from megatron_internvlx.planning.simulate import Schedule
from megatron_internvlx.precision import Precision


@dataclass(frozen=True)
class Layout:
    """Division of the model over the ranks."""

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
    group_size: int | None = None
    """Micro-batches that a virtual stage runs before the next stage's turn. None: as many as pipeline ranks."""
    overlap: bool = True
    """Virtual stages: receives are posted ahead."""

    def schedule(self, micro_batches: int) -> Schedule:
        """Pipeline schedule of a step. Raises ValueError for what Megatron would refuse."""
        return Schedule(self.pipeline, len(self.stages[0]), micro_batches, self.overlap, self.group_size)

    @property
    def counts(self) -> tuple[int, ...]:
        """Decoder layers per stage in the order of the model; stage = chunk * pipeline + rank."""
        chunks = range(len(self.stages[0]))
        return tuple(ranks[chunk].end - ranks[chunk].first for chunk in chunks for ranks in self.stages)

    @classmethod
    def from_config(cls, parallel: Parallelism, config: TransformerConfig) -> Layout:
        """Layout of validated arguments and of the config that Megatron builds from them."""
        tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        chunks = parallel.virtual_pipeline_model_parallel_size
        expert = parallel.expert_model_parallel_size
        expert_tensor = parallel.expert_tensor_parallel_size or tensor
        stages = tuple(
            tuple(stage_layers(config, rank, chunk) for chunk in (range(chunks) if chunks else (None,)))
            for rank in range(pipeline)
        )
        return cls(
            tensor,
            pipeline,
            parallel.data_parallel_size,
            expert,
            expert_tensor,
            parallel.world_size // (expert * expert_tensor * pipeline),
            parallel.sequence_parallel,
            stages,
            config.microbatch_group_size_per_vp_stage,
            config.overlap_p2p_comm,
        )


@dataclass(frozen=True)
class Part:
    """Parameters of one rank that share an owner and a way of being spread."""

    name: str
    """vision, entry_projector, embedding, layers, injections, experts, final_norm, output, or adapters of an owner."""
    owner: Owner
    count: int
    """Parameters on this rank."""
    expert: bool = False
    """Spread over the expert-parallel group: replicated over fewer data-parallel ranks."""
    used: int | None = None
    """Number of them that can get a gradient. None: all."""
    adapters: bool = False
    """They are adapters of the owner's weights, trained whatever is frozen."""

    @property
    def trainable(self) -> int:
        """Parameters that get a gradient when their owner is trained."""
        return self.count if self.used is None else self.used


def rank_parts(sizes: ModelSizes, layout: Layout, rank: int) -> list[Part]:
    """Parameters of one rank of pipeline stage `rank`, all its model chunks together."""
    chunks, t = layout.stages[rank], layout.tensor
    layers = [layer for chunk in chunks for layer in range(chunk.first, chunk.end)]
    first, last = rank == 0, rank == layout.pipeline - 1
    injected = [layer for layer in layers if layer in sizes.injection_layers]
    parts = []
    if first:
        unused = sizes.vision.num_layers - sizes.vision.layers_run
        vision = vision_parameters(sizes.vision)
        used = vision - unused * vision_layer_parameters(sizes.vision)
        parts += [
            Part("vision", "vision", vision, used=used),
            Part("entry_projector", "projectors", projector_parameters(sizes, sizes.entry_grid, t)),
            Part("embedding", "llm", sizes.padded_vocab // t * sizes.hidden),
        ]
    high = projector_parameters(sizes, sizes.high_grid, t)
    parts += [
        Part("injections", "projectors", len(injected) * high),
        Part("layers", "llm", sum(layer_parameters(sizes, layer, t) for layer in layers)),
        Part(
            "experts",
            "llm",
            sum(expert_parameters(sizes, i, layout.expert, layout.expert_tensor) for i in layers),
            expert=True,
        ),
    ]
    if last:
        parts.append(Part("final_norm", "llm", sizes.norm_tensors * sizes.hidden))
        if not sizes.tied or not first:
            parts.append(Part("output", "llm", sizes.padded_vocab // t * sizes.hidden))
    parts += _adapter_parts(sizes, layers, injected, t, first)
    return [part for part in parts if part.count]


def _adapter_parts(
    sizes: ModelSizes, layers: list[int], injected: list[int], tensor: int, first: bool
) -> list[Part]:
    """Adapters on one rank of a stage with these decoder layers."""
    rank, vit = sizes.lora_rank, sizes.vision
    decoder = sum(
        adapter_parameters((*decoder_attention(sizes), *decoder_mlp(sizes, layer)), rank, tensor)
        for layer in layers
    )
    grids = [sizes.entry_grid] * first + [sizes.high_grid] * len(injected)
    projectors = sum(adapter_parameters(projector(sizes, grid), rank, tensor) for grid in grids)
    vision = adapter_parameters(vision_layer(sizes), rank) * first
    return [
        Part(
            "vision_adapters", "vision", vit.num_layers * vision, used=vit.layers_run * vision, adapters=True
        ),
        Part("projector_adapters", "projectors", projectors, adapters=True),
        Part("decoder_adapters", "llm", decoder, adapters=True),
    ]


@dataclass(frozen=True)
class StateTypes:
    """Megatron's arguments for the types of gradients and optimizer state."""

    accumulate_allreduce_grads_in_fp32: bool
    use_precision_aware_optimizer: bool
    main_params_dtype: torch.dtype
    """Type of the master weights, and below of the moments, with the precision-aware optimizer; else fp32."""
    exp_avg_dtype: torch.dtype
    exp_avg_sq_dtype: torch.dtype
    use_distributed_optimizer: bool


@dataclass(frozen=True)
class StateBytes:
    """Bytes per parameter that a rank keeps through the whole training."""

    weight: int
    fp8_copies: int
    """Transformer Engine's FP8 weight and its transpose, per parameter of a decoder layer. 0: no FP8."""
    gradient: int
    optimizer: int
    distributed: bool
    """The optimizer's state is sharded over the data-parallel ranks."""

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> StateBytes:
        """Bytes per parameter under validated arguments."""
        precision, types = settings_from(args, Precision), settings_from(args, StateTypes)
        weight = 2 if precision.bf16 or precision.fp16 else 4
        gradient = 4 if types.accumulate_allreduce_grads_in_fp32 else weight
        aware = types.use_precision_aware_optimizer
        master = 0 if weight == 4 else (types.main_params_dtype.itemsize if aware else 4)
        moments = types.exp_avg_dtype.itemsize + types.exp_avg_sq_dtype.itemsize if aware else 8
        copies = 2 if precision.fp8 and not precision.fp8_param_gather else 0
        return cls(weight, copies, gradient, master + moments, types.use_distributed_optimizer)


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
        """Bytes of weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer


def rank_state(
    sizes: ModelSizes, layout: Layout, rank: int, per_parameter: StateBytes, frozen: BackwardSettings
) -> RankState:
    """Weights, gradients and optimizer state of one rank of pipeline stage `rank`."""
    parts = rank_parts(sizes, layout, rank)
    trained = [part for part in parts if part.adapters or frozen.trains(part.owner)]
    copied = sum(p.count for p in parts if p.name in ("layers", "experts"))
    shards = layout.data if per_parameter.distributed else 1
    expert_shards = layout.expert_data if per_parameter.distributed else 1
    sharded = sum(-(-p.trainable // (expert_shards if p.expert else shards)) for p in trained)
    trainable = sum(p.trainable for p in trained)
    return RankState(
        tuple(parts),
        trainable,
        sum(p.count for p in parts) * per_parameter.weight + copied * per_parameter.fp8_copies,
        trainable * per_parameter.gradient,
        sharded * per_parameter.optimizer,
    )
