"""LoRA adapters beside the linear layers of a stage.

An adapter is a submodule `adapter` of Megatron's or Transformer Engine's linear layer, and a hook adds its output to
the layer's. Names of the base weights stay as they are.

Shapes: S rows of the batch (any leading dimensions), `in` and `rows` the sides of the weight on this rank, n Hugging
Face projections that the layer fuses (3 in linear_qkv, 2 in a gated linear_fc1, else 1), r rank of the adapter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_internvlx.lora_settings import LoraSettings, target_of
from megatron_internvlx.model.internvlx import InternVLX

MARK = ".adapter."
"""Part of the full name of every parameter of an adapter."""

_DECODER_LAYER = re.compile(r"^(language_model\.decoder\.layers\.)(\d+)")
_VISION_LAYER = re.compile(r"^vision_model\.encoder\.layers\.\d+\.")
_TP_RNG = "model-parallel-rng"


class Adapter(nn.Module):
    """Low-rank product beside one linear layer: row j of projection i gets `scale * lora_b[j] . (lora_a[i] x)`.

    A column-parallel layer shards `lora_b` by its rows and replicates `lora_a`; a row-parallel one shards `lora_a`
    along `in` and replicates `lora_b`. Only the r-wide product between them is sent.

    Args:
        linear: the layer; its own weight is left alone.
        settings: rank, scale and dropout.
        projection_of_row: [rows] projection to which each row of this rank belongs; None for one projection.
        projections: n.
        generator: name of the generator in Megatron's tracker from which dropout draws; None: the default one.
    """

    row_is_of: Tensor | None

    def __init__(
        self,
        linear: Any,
        settings: LoraSettings,
        projection_of_row: Tensor | None,
        *,
        projections: int = 1,
        generator: str | None = None,
    ) -> None:
        super().__init__()
        assert settings.lora_rank is not None
        self.group = tensor_group(linear)
        self.input_is_sharded = is_row_parallel(linear)
        self.sequence_parallel = bool(linear.sequence_parallel) and self.group.size() > 1
        self.scale, self.dropout, self.generator = settings.scale, settings.lora_dropout, generator
        rows, width = linear.weight.shape
        made = {"dtype": linear.config.params_dtype, "device": linear.weight.device}
        self.lora_a = nn.Parameter(torch.empty(projections, settings.lora_rank, width, **made))
        self.lora_b = nn.Parameter(torch.zeros(rows, settings.lora_rank, **made))
        of = None
        if projection_of_row is not None:
            of = F.one_hot(projection_of_row, projections).bool().to(linear.weight.device)
        self.register_buffer("row_is_of", of, persistent=False)
        self._mark_shards()

    def _mark_shards(self) -> None:
        """Set the attributes by which Megatron sums gradients and norms over the tensor-parallel ranks."""
        sharded: Any = self.lora_a if self.input_is_sharded else self.lora_b
        replicated: Any = self.lora_b if self.input_is_sharded else self.lora_a
        sharded.tensor_model_parallel = self.group.size() > 1
        sharded.partition_dim, sharded.partition_stride = (2 if self.input_is_sharded else 0), 1
        replicated.tensor_model_parallel = False
        # Each rank has seen its own rows only.
        replicated.sequence_parallel = self.sequence_parallel

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw `lora_a` as torch.nn.Linear and PEFT do, the same in every layout; set `lora_b` to zero."""
        self.lora_b.zero_()
        if self.lora_a.is_meta:
            return
        n, rank, width = self.lora_a.shape
        shards = self.group.size() if self.input_is_sharded else 1
        generator = torch.Generator().manual_seed(seed)
        bound = (width * shards) ** -0.5
        drawn = torch.empty(n, rank, width * shards).uniform_(-bound, bound, generator=generator)
        self.lora_a.copy_(drawn.chunk(shards, dim=2)[self.group.rank() if shards > 1 else 0])

    def forward(self, x: Tensor) -> Tensor:
        """Input of the linear layer on this rank [S, in] -> what to add to its output [S, rows]."""
        low = self._share(F.linear(self._drop(x), self.lora_a.flatten(0, 1))) * self.scale
        up: Tensor = self.lora_b
        if self.row_is_of is not None:
            # Zeros for the other projections' low-rank values: one product instead of n, and a row order of any kind.
            up = (self.row_is_of.unsqueeze(2) * up.unsqueeze(1)).flatten(1)
        return F.linear(low, up)

    def _share(self, low: Tensor) -> Tensor:
        """Give every rank the low-rank values of the rows that its part of `lora_b` needs."""
        if self.group.size() == 1:
            return low
        if self.input_is_sharded:
            if self.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(low, group=self.group)
            return reduce_from_tensor_model_parallel_region(low, group=self.group)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(low, group=self.group)
        return copy_to_tensor_model_parallel_region(low, group=self.group)

    def _drop(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout == 0:
            return x
        tracker = get_cuda_rng_tracker()
        named = self.generator is not None and self.generator in tracker.get_states()
        fork: AbstractContextManager = tracker.fork(self.generator) if named else nullcontext()
        with fork:
            return F.dropout(x, self.dropout)

    def sharded_state(
        self, prefix: str, sharded_offsets: tuple[tuple[int, int, int], ...], metadata: dict, *, gated: bool
    ) -> ShardedStateDict:
        """State for Megatron's distributed checkpoint; `gated` as in the layer's own weight."""
        axes = {"lora_a": 2} if self.input_is_sharded else {"lora_b": 0}
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if gated:
            key = f"{prefix}lora_b"
            state[key] = apply_swiglu_sharded_factory(
                state[key],
                sharded_offsets,
                metadata.get("singleton_local_shards", False),
                tp_group=self.group,
                dp_group=metadata["dp_cp_group"],
            )
        return state


def tensor_group(linear: Any) -> torch.distributed.ProcessGroup:
    """Tensor-parallel group of a linear layer; Transformer Engine's have it under a name of Megatron's."""
    return getattr(linear, "_tp_group", None) or linear.tp_group


def is_row_parallel(linear: Any) -> bool:
    """Whether a linear layer's input is sharded, and not its output."""
    return isinstance(linear, RowParallelLinear) or getattr(linear, "parallel_mode", None) == "row"


def add_adapters(stage: Any, settings: LoraSettings, *, seed: int = 1) -> None:
    """Put an adapter beside every linear layer of the stage that the settings name; at first it adds zero.

    Adapters of layers that do not run, such as vision layers above the selected hidden state, are not trained.

    Args:
        stage: the stage, before its frozen parts are frozen; without LoRA it stays as it is.
        settings: the adapters.
        seed: the run's seed; the same seed draws the same adapters in every layout.
    """
    if settings.lora_rank is None:
        return
    for name, linear in list(stage.named_modules()):
        if target_of(name) not in settings.targets:
            continue
        _add_adapter(stage, name, linear, settings, seed)
    _let_gradients_pass(stage, settings)
    stage.checkpoint_base = False
    stage.sharded_state_dict = partial(_sharded_state, stage)


def _add_adapter(stage: Any, name: str, linear: Any, settings: LoraSettings, seed: int) -> None:
    vision = _VISION_LAYER.match(name) is not None
    gated = name.endswith(".mlp.linear_fc1") and not vision and stage.config.gated_linear_unit
    projections, owner = 1, None
    if name.endswith(".linear_qkv"):
        projections, owner = 3, _qkv_rows(linear)
    elif gated:  # [gate ; up] on each rank
        projections, owner = 2, torch.arange(2).repeat_interleave(len(linear.weight) // 2)
    adapter = Adapter(
        linear, settings, owner, projections=projections, generator=_dropout_generator(name, linear)
    )
    full_name = _DECODER_LAYER.sub(lambda m: f"{m[1]}{int(m[2]) + stage.layers.first}", name)
    digest = hashlib.sha256(f"{seed} {full_name}".encode()).digest()
    adapter.reset_parameters(int.from_bytes(digest[:7], "big"))
    parameter: Any
    for parameter in adapter.parameters():
        parameter.requires_grad_(linear.weight.requires_grad)
        if vision:
            parameter.tile_parallel = True
    linear.adapter = adapter
    if hasattr(linear, "return_layernorm_output"):  # Transformer Engine's fused norm and linear layer
        linear.return_layernorm_output = True
    linear.register_forward_hook(_add_output)
    linear.sharded_state_dict = partial(_linear_sharded_state, linear, gated=gated)


def _qkv_rows(linear: Any) -> Tensor:
    """Projection (0 query, 1 key, 2 value) of each row of linear_qkv on this rank."""
    config, group = linear.config, tensor_group(linear)
    groups, width = config.num_query_groups, config.kv_channels
    widths = torch.tensor([config.num_attention_heads // groups * width, width, width])
    rows = torch.arange(3).repeat_interleave(widths).repeat(groups)
    return rows.chunk(group.size())[group.rank()]


def _dropout_generator(name: str, linear: Any) -> str | None:
    """Name of the generator from which an adapter's dropout draws.

    Rows that all tensor-parallel ranks hold get the same draws on each; rows or columns of one rank get its own.
    """
    if _VISION_LAYER.match(name):
        return _TP_RNG
    projector = ".projector." in f".{name}"
    if linear.sequence_parallel and not projector:  # Megatron's block has taken this rank's generator already
        return None
    return _TP_RNG if is_row_parallel(linear) else get_data_parallel_rng_tracker_name()


def _add_output(linear: Any, inputs: tuple[Tensor, ...], output: tuple[Any, ...]) -> tuple[Any, Any]:
    """Forward hook: (output, bias) of the layer, with the adapter's output added to the first."""
    if not getattr(linear, "return_layernorm_output", False):
        (x, *_), (out, bias) = inputs, output
    elif len(output) == 3:
        out, bias, x = output
    else:
        (out, x), bias = output
    return out + linear.adapter(x), bias


def _linear_sharded_state(
    linear: Any,
    prefix: str = "",
    sharded_offsets: tuple[tuple[int, int, int], ...] = (),
    metadata: dict | None = None,
    *,
    gated: bool,
) -> ShardedStateDict:
    """`sharded_state_dict` of a linear layer with an adapter, whose parameters the layer's own method would mistake."""
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    own = type(linear).sharded_state_dict(linear, prefix, sharded_offsets, metadata)
    state = {key: value for key, value in own.items() if not key.startswith(f"{prefix}adapter.")}
    return state | linear.adapter.sharded_state(f"{prefix}adapter.", sharded_offsets, metadata, gated=gated)


def _let_gradients_pass(stage: Any, settings: LoraSettings) -> None:
    """Have the input of recomputed layers require a gradient: otherwise recomputation leaves out their adapters."""
    blocks = []
    if "llm" in settings.parts:
        blocks.append(stage.language_model.decoder)
    if "vision" in settings.parts and stage.pre_process:
        blocks.append(stage.vision_model.encoder)
    for block in blocks:
        if block.config.recompute_granularity is not None:
            block.register_forward_pre_hook(_require_gradient, with_kwargs=True)


def _require_gradient(block: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Pre-hook of a block: input rows that need no gradient become a leaf that does."""
    rows = named.get("hidden_states")
    if torch.is_grad_enabled() and rows is not None and not rows.requires_grad:
        named = named | {"hidden_states": rows.detach().requires_grad_()}
    return inputs, named


def _stacked(name: str) -> str:
    """Key of a parameter in a checkpoint, in which the vision encoder's layers are one tensor."""
    return _VISION_LAYER.sub("vision_model.encoder.layers.", name)


def trained_names(stage: InternVLX) -> set[str]:
    """Names of the stage's parameters that a checkpoint of adapters holds: the trained ones.

    Vision layers that do not run are among them if the others are trained, because all layers are one tensor.
    """
    keys = {_stacked(name) for name, parameter in stage.named_parameters() if parameter.requires_grad}
    return {name for name, _ in stage.named_parameters() if _stacked(name) in keys}


def _sharded_state(stage: Any, *args: Any, **kwargs: Any) -> ShardedStateDict:
    """`sharded_state_dict` of a stage with adapters: trained parameters, or inside `base_checkpoint` the base's.

    Both have Transformer Engine's state of FP8 scales, without which training would not resume exactly.
    """
    state = type(stage).sharded_state_dict(stage, *args, **kwargs)
    if stage.checkpoint_base:
        return {key: value for key, value in state.items() if MARK not in key}
    kept, scales = trained_names(stage), bool(stage.config.fp8)
    return {
        key: value
        for key, value in state.items()
        if key in kept or (scales and key.endswith("_extra_state") and MARK not in key)
    }


@contextmanager
def base_checkpoint(stages: list[Any]) -> Iterator[None]:
    """Let Megatron load the base's weights into the stages, and not the adapters, inside the block."""
    for stage in stages:
        stage.checkpoint_base = True
    try:
        yield
    finally:
        for stage in stages:
            stage.checkpoint_base = False
