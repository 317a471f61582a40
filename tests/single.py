"""Megatron in this process alone, for tests of modules. Import it before anything of Megatron."""

from megatron_internvlx import platform

platform.setup()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


def single(seed: int = 1) -> None:
    """Starts a gloo group of one rank, Megatron's groups and its generators; safe to repeat."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def decoder_config(**changes: object) -> TransformerConfig:
    """Returns small language model settings for CPU, as `pretrain_vlm.py` would make them."""
    fields: dict = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "cuda_graph_modules": [],
        **changes,
    }
    return TransformerConfig(**fields)
