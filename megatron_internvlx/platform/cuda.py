"""Every patch that Megatron needs to run quietly and in one CUDA graph on GPUs, each with its reason.

Seen on megatron-core 0.19.2 / torch 2.11.0 on an H100.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_internvlx.platform.cpu import set_attributes


def patch_torch() -> None:
    """Apply the patches of torch; may come before Megatron is imported."""
    _barriers_name_their_device()
    _expect_one_stale_stream()


def patch_megatron() -> None:
    """Apply the patches of Megatron."""
    _accumulate_on_the_training_stream()


def replace_step(graph: type, guard: Callable[[Callable[..., tuple]], Callable[..., tuple]]) -> None:
    """Make Megatron's loop record its steps with `graph`, and call its `train_step` through `guard`; once per process.

    Its own recorder reads micro-batches that are dicts, and its check of the losses waits for the GPU within the step.
    """
    from megatron.training import training

    if training.FullCudaGraphWrapper is not graph:
        set_attributes(training, FullCudaGraphWrapper=graph, train_step=guard(training.train_step))


def _barriers_name_their_device() -> None:
    """A barrier over NCCL says which GPU is this rank's.

    Megatron makes process groups without one, and NCCL guesses it from the global rank: wrong, and a hang, where a
    node's ranks are not numbered as its GPUs are. To bind the groups themselves would make NCCL split every later
    group from the world, for which ranks outside of it would have to call as well; ours of one rank are made alone.
    """
    barrier = torch.distributed.barrier

    @functools.wraps(barrier)
    def on_this_gpu(group: Any = None, async_op: bool = False, device_ids: Any = None, **more: Any) -> Any:
        member = torch.distributed.get_rank(group) >= 0  # torch's barrier warns others, `get_backend` raises
        if device_ids is None and member and torch.distributed.get_backend(group) == "nccl":
            device_ids = [torch.cuda.current_device()]
        return barrier(group, async_op, device_ids, **more)

    set_attributes(torch.distributed, barrier=on_this_gpu)


def _expect_one_stale_stream() -> None:
    """No warning about gradients that are added up on another stream than they come from.

    With a CUDA graph the accumulation belongs to the stream of the capture, from the model's building on; the steps
    before the capture run on another, for which torch makes the streams wait for each other. Without a graph
    `_accumulate_on_the_training_stream` leaves no difference to warn about.
    """
    switch: Callable[[bool], None] | None = getattr(
        torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None
    )
    if switch is not None:
        switch(False)


def _accumulate_on_the_training_stream() -> None:
    """Without a CUDA graph, gradients are added up on the stream that training runs on.

    Megatron wraps the model on a stream of its own, which its nodes of accumulation keep: every gradient would
    be handed from stream to stream, with an event for each.
    """
    from megatron.core.distributed import DistributedDataParallel

    build = DistributedDataParallel.__init__

    @functools.wraps(build)
    def on_training_stream(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if config.cuda_graph_impl == "full_iteration":
            build(self, config, *args, **kwargs)
            return
        before = torch.cuda.current_stream()
        training = torch.cuda.default_stream()
        training.wait_stream(before)
        with torch.cuda.stream(training):
            build(self, config, *args, **kwargs)
        before.wait_stream(training)

    set_attributes(DistributedDataParallel, __init__=on_training_stream)
