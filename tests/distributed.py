"""The rank pool for tests, and Megatron's groups on a rank; the pool itself is `testing/rank_pool.py`."""

from typing import Any

from testing.rank_pool import Pool, RankError, forget_megatron

__all__ = ["Pool", "RankError", "forget_megatron", "init_parallel"]


def init_parallel(
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    ep: int = 1,
    sp: bool = False,
    seed: int = 1234,
) -> dict[str, Any]:
    """Initialises Megatron's groups and random states in a rank; returns the fields of a TransformerConfig.

    Args:
        tp: tensor parallel size.
        pp: pipeline parallel size; data parallelism takes what is left of the world.
        vpp: model chunks per pipeline stage; None for the plain schedule.
        ep: expert parallel size.
        sp: sequence parallelism.
        seed: of torch and Megatron's trackers, as `--seed` does it for the first pipeline stage.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "expert_model_parallel_size": ep,
        "sequence_parallel": sp,
        "pipeline_dtype": torch.float32,
    }
