"""Typed views of Megatron's arguments: the ones that our code reads, under Megatron's names.

`config.settings_from(args, Parallelism)` makes one from the parsed and validated namespace. The namespace itself goes
on to Megatron; nothing else of ours reads it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parallelism:
    """How the ranks divide the model and the batch."""

    rank: int
    world_size: int
    data_parallel_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int | None
    """Model chunks of a rank; None for one."""
    pipeline_model_parallel_layout: str | None
    """Layers of each stage, in Megatron's notation; None for equal shares."""
    expert_model_parallel_size: int
    expert_tensor_parallel_size: int | None
    sequence_parallel: bool
    use_distributed_optimizer: bool


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
