"""Typed views of Megatron's arguments: the ones that our code reads, under Megatron's names.

`config.settings_from(args, Parallelism)` makes one from the parsed and validated namespace. The namespace itself is
for Megatron; nothing else of ours reads it. `ParallelSizes`, `Schedule` and `Rotary` can be made before Megatron has
validated the arguments, and `Batches` too: what Megatron fills in is None then.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_internvlx.paths import is_url


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

    @property
    def is_last_rank(self) -> bool:
        """Whether this rank prints: Megatron's choice, on the last pipeline stage, where losses are known."""
        return self.rank == self.world_size - 1


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
class Dropout:
    """Probabilities of Megatron's dropout in the decoder."""

    hidden_dropout: float
    attention_dropout: float


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
    save_interval: int | None = None
    """Steps between two checkpoints."""

    @property
    def save_folder(self) -> Path | None:
        """`save` as a directory; None if it is not given, or is a URL of a storage client."""
        return Path(self.save) if self.save and not is_url(self.save) else None


@dataclass(frozen=True)
class Loop:
    """Conditions that end Megatron's training loop before its last step, and its other reports."""

    exit_signal_handler: bool
    """Whether a signal ends the run after its step, with a checkpoint."""
    exit_duration_in_mins: int | None
    """Time after which the run ends, to be continued by another start; None: no limit."""
    tensorboard_dir: str | None


@dataclass(frozen=True)
class Execution:
    """Ways in which a step runs on the device."""

    fp8: str | None
    """Format of FP8 matrix products; None without them."""
    cuda_graph_impl: str
    """Part of a step that is replayed as a CUDA graph, or `none`."""
    tp_comm_overlap: bool = False
    """Tensor-parallel communication runs in pieces beside the matrix products."""
    deterministic_mode: bool = False
    """Two runs give the same bits."""
    distributed_backend: str = "nccl"
    """Library of collectives: `nccl` on GPUs, `gloo` on CPU."""

    @property
    def on_gpu(self) -> bool:
        """Whether the run is for GPUs, wherever its arguments are checked."""
        return self.distributed_backend == "nccl"


class Progress:
    """Live view of the position that Megatron notes in its namespace during a run.

    Args:
        args: Megatron's namespace. Its values change, so they are read anew each time.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args

    @property
    def has_begun(self) -> bool:
        """Whether the training loop has been entered."""
        return hasattr(self._args, "curr_iteration")

    @property
    def loaded_step(self) -> int:
        """Step of the checkpoint that was loaded; 0 if none was, or before."""
        return int(getattr(self._args, "iteration", 0))

    @property
    def loaded_from(self) -> str | None:
        """Directory of the checkpoint that was, or will be, loaded; None if there is none."""
        return self._args.load

    @property
    def finished_steps(self) -> int:
        """Steps that are done, those before the loaded checkpoint included."""
        return int(self._args.curr_iteration) if self.has_begun else self.loaded_step

    @property
    def consumed_train_samples(self) -> int:
        """Training samples of the steps before the loaded checkpoint, and of those since."""
        return int(getattr(self._args, "consumed_train_samples", 0))


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
