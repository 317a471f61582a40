"""Namespaces as they are after parsing, without Megatron's parser."""

from argparse import Namespace
from typing import Any

from megatron_internvlx.config import SETTINGS

# One rank, and nothing loaded or saved.
_MEGATRON = {
    "rank": 0,
    "world_size": 1,
    "data_parallel_size": 1,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "sequence_parallel": False,
    "use_distributed_optimizer": False,
    "seq_length": 512,
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "eval_micro_batch_size": 1,
    "eval_global_batch_size": 1,
    "eval_iters": 0,
    "train_iters": 10,
    "seed": 1234,
    "save": None,
    "load": None,
    "pretrained_checkpoint": None,
    "ckpt_step": None,
    "finetune": False,
    "exit_signal_handler": False,
    "exit_duration_in_mins": None,
    "tensorboard_dir": None,
    "fp8": None,
    "cuda_graph_impl": "none",
}


def parsed(**changes: Any) -> Namespace:
    """Defaults of our settings and of Megatron's that we read, with these changes."""
    ours = {name: value for settings in SETTINGS for name, value in vars(settings()).items()}
    return Namespace(**ours | _MEGATRON | changes)
