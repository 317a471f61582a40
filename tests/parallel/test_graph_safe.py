"""With static boundaries a step does the same operations whatever its micro-batches hold.

A CUDA graph repeats the kernels, shapes and scalar arguments of the step in which it was recorded. The proof is a
recording of all operations, forward and backward, of packs as different as possible, in one process each: any
difference would be a graph that holds for the recorded packs only. Mistakes of every kind must be seen.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest

from tests import layouts  # isort: skip  (sets Megatron up)
import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_internvlx.data.plan import PlanSettings, build_plan
from megatron_internvlx.model.internvlx import InternVLX
from megatron_internvlx.model.lvtc import LVTCInjection
from megatron_internvlx.parallel.batch import HostBatch
from megatron_internvlx.parallel.device_plan import DevicePlan
from megatron_internvlx.training.graph import BatchBuffers
from megatron_internvlx.training.provider import plan_settings
from megatron_internvlx.training.step import ForwardStep
from tests.distributed import Pool
from tests.graph_recorder import HostTensors, Recorder, nothing_from_the_host, unsafe
from tests.layout_cases import LORA, STATIC, expand

# Tiles of each sample of a pack; (number, tiles) are arguments of `layouts.sample`.
PACKS = {"no tiles, one sample": [0], "all tiles": [4, 4], "most samples": [0, 1, 0, 2]}

# Megatron's check of every loss reads it on the host; `arguments.py` switches it off for a graph.
SETTINGS = ("--global-batch-size", "2", "--no-check-for-nan-in-loss-and-grad")


def pack(tiles: list[int], settings: PlanSettings) -> HostBatch:
    """Samples with so many tiles."""
    samples = [layouts.sample(i, count, settings.high_grid**2) for i, count in enumerate(tiles)]
    ids, labels, visual, pixels = zip(*samples, strict=True)
    plan = build_plan(ids, labels, visual, replace(settings, sample_budget=4))
    return HostBatch(plan, torch.from_numpy(np.concatenate(pixels)))


class Packs(layouts.SyntheticData):
    """Steps of one micro-batch and then another, of the packs in turn."""

    def _loader(self, split: str) -> Iterator[HostBatch]:
        settings = plan_settings(self.args)
        warm = pack([1, 0, 2], settings)
        for _ in range(2):
            yield warm
        for tiles in PACKS.values():
            for _ in range(2):
                yield pack(tiles, settings)


def record(changes: list[str], mistake: str | None = None) -> dict[str, list[str]]:
    """Operations on this rank of a step of two micro-batches, for each of PACKS."""
    with MISTAKES[mistake]() if mistake else nullcontext():
        return _record([*STATIC.split(), *SETTINGS, *changes], told=mistake is not None)


def _record(changes: list[str], *, told: bool) -> dict[str, list[str]]:
    """`told`: the step sees the plan on the host, which it does not where a graph is recorded."""
    host = HostTensors()
    with host.noted():
        return _recorded_steps(layouts.Run(changes, Packs), host, told=told)


def _recorded_steps(run: layouts.Run, host: HostTensors, *, told: bool) -> dict[str, list[str]]:
    kept, passes = BatchBuffers(), get_forward_backward_func()
    iterator = run.data(None)[0]
    seen = {}
    for chunk in run.model:
        chunk.train()
    for name in ("warm", *PACKS):
        batches = [next(iterator) for _ in range(2)]
        if not told:
            kept.fill(batches)
            batches = kept.batches
        for chunk in run.model:
            chunk.zero_grad_buffer()
        with Recorder(host) as recorder, nothing_from_the_host(warm=name == "warm"):
            passes(
                forward_step_func=run.step,
                data_iterator=iter(batches),
                model=run.model,
                num_microbatches=2,
                seq_length=run.args.seq_length,
                micro_batch_size=1,
                forward_only=False,
                p2p_communicator=run.communicator,
                pg_collection=run.groups,
            )
        seen[name] = recorder.seen
    del seen["warm"]  # its step makes tables and buffers that stay
    return seen


# The vision encoder's attention with which a graph can train it.
TORCH = ["--vision-attention", "torch"]
EVERYWHERE = ["decoder_attention", "decoder_mlp", "vision", "projectors"]
VISION = ["--vision-overrides", '{"qk_normalization": true, "drop_path_rate": 0.2}']
LAYOUTS = {
    "one": (1, "", ["--projector-drop-path", "0.3"]),
    # Four samples supervise at most 20 tokens.
    "one, mlp": (1, "", ["--projector", "mlp", *VISION, "--max-supervised-tokens-per-pack", "20"]),
    "pp": (2, "pp=2", []),
    "tp": (2, "tp=2", []),
    "tp sp recompute": (2, "tp=2 sp full", TORCH),
    # As in the recipes with a graph: no gradients of the decoder's weights, none beyond the projectors.
    "frozen": (1, "", ["--freeze-vision", "--freeze-llm"]),
    "adapters": (1, "", [*LORA.split(), "--lora-dropout", "0.2", "--freeze-vision"]),
    "adapters everywhere": (2, "tp=2 sp", [*LORA.split(), "--lora-targets", *EVERYWHERE, *TORCH]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pack_does_the_same(pool: Pool, layout: str) -> None:
    """On every stage and every tensor-parallel rank; the packs' contents are what differs."""
    ranks, words, more = LAYOUTS[layout]
    for seen in pool.run(ranks, record, expand(words) + more):
        assert unsafe(seen) == ""
        assert min(len(operations) for operations in seen.values()) > 500


@pytest.mark.parametrize("mistake", ["count", "shape", "weight", "sync", "branch"])
def test_a_mistake_is_seen(pool: Pool, mistake: str) -> None:
    assert unsafe(pool.run(1, partial(record, mistake=mistake), [])[0])


@pytest.mark.parametrize("mistake", ["tolist", "to", "copy"])
def test_a_mistake_that_is_no_operation_is_seen(pool: Pool, mistake: str) -> None:
    """On the CPU; on a GPU each waits for the device."""
    with pytest.raises(
        Exception, match=r"(read|moved|copy) .*host within a step|the host reads .*within a step"
    ):
        pool.run(1, partial(record, mistake=mistake), [])


def tiles_from_the_plan() -> Any:
    """Features of blank tiles are cut off, as with variable boundaries, and put back."""
    encode = InternVLX.encode

    def cut(self: InternVLX, tiles: torch.Tensor, plan: DevicePlan) -> torch.Tensor:
        features, real = encode(self, tiles, plan), max(plan.host.num_tiles, 1)
        return torch.cat([features[:real], features[real:].detach()])

    return mock.patch.object(InternVLX, "encode", cut)


def loss_of_real_rows() -> Any:
    """The loss is summed over as many rows as are supervised."""

    def loss(self: ForwardStep, plan: DevicePlan, training: bool, output: torch.Tensor) -> Any:
        real = len(plan.host.loss_rows)
        return LOSS(self, replace(plan, loss_weights=plan.loss_weights[:real]), training, output[:real])

    return mock.patch.object(ForwardStep, "loss", loss)


def weight_on_the_host() -> Any:
    """The loss is multiplied by a number of this micro-batch."""

    def loss(self: ForwardStep, plan: DevicePlan, training: bool, output: torch.Tensor) -> Any:
        return LOSS(self, plan, training, output * (1.0 + len(plan.host.loss_rows)))

    return mock.patch.object(ForwardStep, "loss", loss)


def weight_read_back() -> Any:
    """The loss's weight is read from the device: the same operation for every pack, which no graph can hold."""

    def loss(self: ForwardStep, plan: DevicePlan, training: bool, output: torch.Tensor) -> Any:
        assert plan.total_weight.item() >= 0
        return LOSS(self, plan, training, output)

    return mock.patch.object(ForwardStep, "loss", loss)


def read_without_an_operation() -> Any:
    """The loss's weights are read in a way that is no operation on the CPU."""

    def loss(self: ForwardStep, plan: DevicePlan, training: bool, output: torch.Tensor) -> Any:
        assert plan.loss_weights.tolist()
        return LOSS(self, plan, training, output)

    return mock.patch.object(ForwardStep, "loss", loss)


def moved_to_the_host() -> Any:
    """The loss's weights are read by another word for `.cpu()`."""

    def loss(self: ForwardStep, plan: DevicePlan, training: bool, output: torch.Tensor) -> Any:
        assert len(plan.loss_weights.to(device="cpu"))
        return LOSS(self, plan, training, output)

    return mock.patch.object(ForwardStep, "loss", loss)


def copied_to_the_host() -> Any:
    """The loss's weights go to a buffer of the host."""

    def loss(self: ForwardStep, plan: DevicePlan, training: bool, output: torch.Tensor) -> Any:
        torch.empty(plan.loss_weights.shape).copy_(plan.loss_weights, non_blocking=True)
        return LOSS(self, plan, training, output)

    return mock.patch.object(ForwardStep, "loss", loss)


def nothing_to_expand() -> Any:
    """A pack without tiles skips the upsampling."""
    expand_rows = LVTCInjection._expand

    def maybe(
        self: LVTCInjection, rows: torch.Tensor, visual: torch.Tensor, plan: DevicePlan
    ) -> torch.Tensor:
        if plan.host.num_tiles:
            return expand_rows(self, rows, visual, plan)
        return rows.view(-1, rows.shape[-1]).index_select(0, plan.expand_index).view(-1, 1, rows.shape[-1])

    return mock.patch.object(LVTCInjection, "_expand", maybe)


LOSS = ForwardStep.loss
MISTAKES: dict[str, Callable[[], Any]] = {
    "count": tiles_from_the_plan,
    "shape": loss_of_real_rows,
    "weight": weight_on_the_host,
    "sync": weight_read_back,
    "branch": nothing_to_expand,
    "tolist": read_without_an_operation,
    "to": moved_to_the_host,
    "copy": copied_to_the_host,
}
