"""Gather full weights from the slices of all ranks, and load full weights into them.

A *full name* is the parameter's name in a model on one rank: decoder layers and experts have their
global number. `full_tensors` gathers the weights (or gradients) of a running model under full names, in any
layout; `load_full` is the reverse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor, nn

from megatron_internvlx.model.internvlx import InternVLX

_LAYER = re.compile(r"(\.decoder\.layers\.)(\d+)(\.)")
_EXPERT = re.compile(r"(\.experts\.local_experts\.)(\d+)(\.)")
_ALIGNMENT = 8  # bytes; of the widest type
_GROUPED = re.compile(r"(\.experts\.linear_fc[12]\.weight)(\d+)$")


@dataclass(frozen=True)
class Shard:
    """A parameter of this rank as a slice of the full weight.

    `dim` is the dimension split over `group`, or None for a replicated weight. With `gated` the slice is
    [gate part ; up part], and the full weight is [all gates ; all ups].
    """

    name: str
    parameter: nn.Parameter
    dim: int | None
    gated: bool
    group: dist.ProcessGroup | None


def full_name(name: str, stage: InternVLX, expert_offset: int) -> str:
    """Name of a parameter of this stage in a model on one rank."""
    name = _LAYER.sub(lambda m: f"{m[1]}{int(m[2]) + stage.layers.first}{m[3]}", name)
    name = _EXPERT.sub(lambda m: f"{m[1]}{int(m[2]) + expert_offset}{m[3]}", name)
    return _GROUPED.sub(lambda m: f"{m[1]}{int(m[2]) + expert_offset}", name)


def shards(stage: InternVLX) -> Iterator[Shard]:
    """Parameters of one stage, without a tied output layer, which is the embedding."""
    config = stage.config
    experts = (config.num_moe_experts or 0) // max(config.expert_model_parallel_size, 1)
    offset = experts * mpu.get_expert_model_parallel_rank() if experts else 0
    for name, parameter in stage.named_parameters():
        if stage.share_embeddings_and_output_weights and name.endswith("output_layer.weight"):
            continue
        expert = ".experts." in name
        group = mpu.get_expert_tensor_parallel_group() if expert else stage.tp_group
        sharded = getattr(parameter, "tensor_model_parallel", False) and group.size() > 1
        # Not a projector's linear_fc1, which an injection layer holds too.
        fused = ".mlp." in name and "linear_fc1" in name and name.startswith("language_model.")
        gated = fused and config.gated_linear_unit
        dim = parameter.partition_dim if sharded else None
        yield Shard(full_name(name, stage, offset), parameter, dim, gated, group if sharded else None)


def join_shards(parts: list[Tensor], dim: int, gated: bool) -> Tensor:
    """Join the slices of all ranks to the full weight."""
    if not gated:
        return torch.cat(parts, dim)
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([h[0] for h in halves] + [h[1] for h in halves], dim)


def cut_shard(full: Tensor, dim: int, gated: bool, rank: int, size: int) -> Tensor:
    """Slice of the full weight for `rank` of `size` ranks; the dimension must be divisible."""
    if not gated:
        return full.chunk(size, dim)[rank]
    gate, up = full.chunk(2, dim)
    return torch.cat([gate.chunk(size, dim)[rank], up.chunk(size, dim)[rank]], dim)


def full_tensor(shard: Shard, value: Tensor) -> Tensor:
    """Gather `value`, shaped like the shard's parameter, over the shard's group; returns it on the host."""
    if shard.dim is None or shard.group is None:
        return value.detach().to("cpu", copy=True)
    parts = [torch.empty_like(value) for _ in range(shard.group.size())]
    dist.all_gather(parts, value.detach().contiguous(), group=shard.group)
    return join_shards(parts, shard.dim, shard.gated).to("cpu")


def remove_vocab_padding(name: str, tensor: Tensor, vocab_size: int) -> Tensor:
    """Remove the layout's padding rows from the embedding and the output layer; keep other tensors."""
    vocabulary = name.endswith(("word_embeddings.weight", "output_layer.weight"))
    return tensor[:vocab_size] if vocabulary else tensor


def full_tensors(
    stages: list[InternVLX], value_of: Callable[[nn.Parameter], Tensor | None]
) -> dict[str, Tensor]:
    """Gather the full weights (or gradients) of the model on every rank; for models that fit on one host.

    Args:
        stages: this rank's model chunks, unwrapped.
        value_of: returns the value of a parameter, for example `lambda p: p.data`; None: omit it.
    """
    mine: dict[str, Tensor] = {}
    for stage in stages:
        for shard in shards(stage):
            value = value_of(shard.parameter)
            if value is not None:
                full = full_tensor(shard, value)
                mine[shard.name] = remove_vocab_padding(shard.name, full, stage.real_vocab_size)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, _serialize_tensors(mine))
    return {name: tensor for part in everyone for name, tensor in _deserialize_tensors(*part)}


# Names, types and shapes. Tensors are sent as one buffer: pickled one by one, each takes a millisecond.
_TensorHeaders = list[tuple[str, torch.dtype, torch.Size]]


def _serialize_tensors(tensors: dict[str, Tensor]) -> tuple[_TensorHeaders, bytearray]:
    content = bytearray()
    for tensor in tensors.values():
        content += tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        content += bytes(-len(content) % _ALIGNMENT)
    return [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()], content


def _deserialize_tensors(described: _TensorHeaders, content: bytearray) -> Iterator[tuple[str, Tensor]]:
    start = 0
    for name, dtype, shape in described:
        count = shape.numel()
        yield name, torch.frombuffer(content, dtype=dtype, count=count, offset=start).view(shape)
        start += -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def load_full(stages: list[InternVLX], weights: Mapping[str, Tensor]) -> None:
    """Copy full weights into this rank's parameters.

    Raises:
        ValueError: lists missing names and wrong shapes.
    """
    problems = []
    for stage in stages:
        wanted = list(shards(stage))
        if stage.share_embeddings_and_output_weights and stage.post_process and not stage.pre_process:
            wanted.append(_tied_output(stage))
        for shard in wanted:
            if shard.name not in weights:
                problems.append(f"{shard.name} is missing")
                continue
            full = _pad_vocab(shard, weights[shard.name])
            if shard.dim is not None and shard.group is not None:
                full = cut_shard(full, shard.dim, shard.gated, shard.group.rank(), shard.group.size())
            if full.shape != shard.parameter.shape:
                problems.append(f"{shard.name}: {tuple(full.shape)} for {tuple(shard.parameter.shape)}")
                continue
            with torch.no_grad():
                shard.parameter.copy_(full)
    if problems:
        raise ValueError("the weights do not fit the model: " + "; ".join(problems[:20]))


def _tied_output(stage: InternVLX) -> Shard:
    """Copy of the tied embedding on the last stage."""
    weight = stage.language_model.output_layer.weight
    name = "language_model.embedding.word_embeddings.weight"
    sharded = stage.tp_group.size() > 1
    return Shard(name, weight, 0 if sharded else None, False, stage.tp_group if sharded else None)


def _pad_vocab(shard: Shard, full: Tensor) -> Tensor:
    """Pad vocabulary rows with zeros to the layout's size; keep other tensors."""
    if not shard.name.endswith(("word_embeddings.weight", "output_layer.weight")):
        return full
    size = shard.group.size() if shard.group is not None else 1
    missing = shard.parameter.shape[0] * size - full.shape[0]
    return torch.cat([full, full.new_zeros((missing, *full.shape[1:]))]) if missing > 0 else full
