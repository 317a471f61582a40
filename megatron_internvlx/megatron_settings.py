"""Typed views of Megatron's arguments: the ones that our code reads, under Megatron's names.

`config.settings_from(args, Parallelism)` makes one from the parsed and validated namespace. The namespace itself is
for Megatron; nothing else of ours reads it. `ParallelSizes`, `Schedule` and `Rotary` can be made before Megatron has
validated the arguments, and `Batches` too: what Megatron fills in is None then.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelSizes:
    """Requested division of the model among the ranks."""

    world_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    pipeline_model_parallel_layout: str | None
    """Layers of each stage, in Megatron's notation; None for equal shares."""
    expert_model_parallel_size: int
    expert_tensor_parallel_size: int | None
    sequence_parallel: bool


@dataclass(frozen=True)
class Parallelism(ParallelSizes):
    """Division of the model and the batch among the ranks."""

    rank: int
    data_parallel_size: int
    virtual_pipeline_model_parallel_size: int | None
    """Model chunks of a rank; None for one."""
    use_distributed_optimizer: bool
    microbatch_group_size_per_vp_stage: int | None = None
    """Consecutive micro-batches of a model chunk in the interleaved schedule; None for the number of stages."""


@dataclass(frozen=True)
class Batches:
    """Sizes of batches and the number of steps."""

    seq_length: int
    """Deep rows of a sample, or of a pack."""
    micro_batch_size: int
    global_batch_size: int
    eval_micro_batch_size: int
    eval_global_batch_size: int
    eval_iters: int
    train_iters: int | None
    seed: int
    eval_interval: int | None = None
    """Steps between two evaluations."""
    skip_train: bool = False
    """Evaluate only."""
    rampup_batch_size: list[int] | None = None
    """First batch size, increment and samples of a ramp-up to `global_batch_size`; None for no ramp-up."""


@dataclass(frozen=True)
class CheckpointFiles:
    """Directories and URLs that a run reads weights from and saves them to; None where not given."""

    save: str | None
    load: str | None
    pretrained_checkpoint: str | None
    ckpt_step: int | None
    """Iteration to load; None for the newest."""
    finetune: bool
    """Take the weights of `load` and begin at iteration 0."""


@dataclass(frozen=True)
class Progress:
    """Position of a run. Megatron sets it when it loads a checkpoint: make one when it is needed."""

    iteration: int | None = None
    """Iteration of the loaded checkpoint; 0 or None without one."""
    consumed_train_samples: int = 0


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding."""

    max_position_embeddings: int
    rotary_base: int
    use_rope_scaling: bool
    rope_scaling_factor: float


@dataclass(frozen=True)
class Schedule:
    """Length of the training and schedules of the learning rate and the weight decay."""

    lr: float
    min_lr: float
    lr_warmup_init: float
    train_iters: int | None
    train_samples: int | None
    lr_decay_style: str
    lr_decay_iters: int | None
    lr_decay_samples: int | None
    lr_warmup_fraction: float | None
    """Part of the decay that warms up; None: `lr_warmup_iters` or `lr_warmup_samples` instead."""
    lr_warmup_iters: int
    lr_warmup_samples: int
    lr_wsd_decay_iters: int | None
    lr_wsd_decay_samples: int | None
    weight_decay_incr_style: str
    start_weight_decay: float | None
    end_weight_decay: float | None
