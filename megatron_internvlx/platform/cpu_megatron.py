"""Every patch of Megatron's own modules that it needs to run on CPU, each with its reason.

All seen on megatron-core 0.19.2 / torch 2.13.0.
"""

import functools
import queue
from typing import Any

import torch

from megatron_internvlx.platform.cpu import set_attributes


def patch_megatron() -> None:
    """Apply all patches of Megatron; patch torch first, because this imports Megatron."""
    _allow_start_without_cuda()
    _convert_split_sizes()
    _avoid_save_process()
    _support_torch_adam()


def _allow_start_without_cuda() -> None:
    """Report one CUDA device while `initialize_megatron` runs.

    It asserts that CUDA is available, and creates the parallel groups and seeds the RNG trackers only if there
    is a device.
    """
    import megatron.training.initialize as initialize
    import megatron.training.training as training

    original = initialize.initialize_megatron

    @functools.wraps(original)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        honest = {"is_available": torch.cuda.is_available, "device_count": torch.cuda.device_count}
        set_attributes(torch.cuda, is_available=lambda: True, device_count=lambda: 1)
        try:
            return original(*args, **kwargs)
        finally:
            set_attributes(torch.cuda, **honest)

    for module in (initialize, training):
        set_attributes(module, initialize_megatron=initialize_megatron)


def _convert_split_sizes() -> None:
    """Convert the expert dispatcher's split sizes to NumPy arrays, as Megatron does for those from a GPU.

    `maybe_move_tensor_to_cpu(as_numpy=True)` converts only CUDA tensors, and gloo's all-to-all does not
    accept tensors as sizes.
    """
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    for module in (moe_utils, token_dispatcher):
        set_attributes(module, maybe_move_tensor_to_cpu=move)


def _avoid_save_process() -> None:
    """Use a queue inside this process for the results of a synchronous save.

    Megatron starts a server process per rank for a queue between processes, which only an asynchronous save
    needs. The server imports the main script again (seconds per rank), and keeps running if its rank is killed.
    """
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
    from megatron.training import global_vars

    original = filesystem_async.get_write_results_queue

    def get_write_results_queue(*args: Any, **kwargs: Any) -> Any:
        settings = global_vars._GLOBAL_ARGS
        asynchronous = settings is not None and settings.async_save
        return original(*args, **kwargs) if asynchronous else queue.Queue()

    set_attributes(filesystem_async, get_write_results_queue=get_write_results_queue)


def _support_torch_adam() -> None:
    """Let the distributed optimizer load a checkpoint into torch's Adam, which replaces the fused ones.

    Torch's Adam differs in three ways: it has no state before the first step, so Megatron cannot determine what
    to load; the step count is a tensor in every parameter's state, where the loaders do not expect it; and after
    loading, all parameters share one such tensor, so each step would count once per parameter.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    ask, load, fill = (
        DistributedOptimizer.sharded_state_dict,
        DistributedOptimizer.load_state_dict,
        DistributedOptimizer._set_main_param_and_optimizer_states,
    )

    @functools.wraps(ask)
    def sharded_state_dict(
        self: Any, model_state: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if is_loading and not self.optimizer.state:
            for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return ask(self, model_state, is_loading, *args, **kwargs)

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @functools.wraps(fill)
    @torch.no_grad()  # the loader of the default format lacks it, which only fp32 parameters notice
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        fill(self, model_param, {**tensors, "step": None})

    set_attributes(
        DistributedOptimizer,
        sharded_state_dict=sharded_state_dict,
        load_state_dict=load_state_dict,
        _set_main_param_and_optimizer_states=set_states,
    )
