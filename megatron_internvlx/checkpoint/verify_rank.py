"""One rank of a verification: runs Megatron's model with converted weights in Megatron's schedule."""

from __future__ import annotations

from megatron_internvlx import platform
from megatron_internvlx.ranks import launched_ranks

platform.setup()

import re  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator, Mapping  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402
from megatron.training.training import get_model  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_internvlx import arguments  # noqa: E402
from megatron_internvlx.checkpoint.case import Case, load_case  # noqa: E402
from megatron_internvlx.checkpoint.importer import make_tensor, plan_import  # noqa: E402
from megatron_internvlx.checkpoint.request import GRADIENTS, RECIPE, Request  # noqa: E402
from megatron_internvlx.checkpoint.safetensors_io import WeightFiles  # noqa: E402
from megatron_internvlx.checkpoint.shards import full_tensors, load_full  # noqa: E402
from megatron_internvlx.checkpoint.sources import ModelWeights  # noqa: E402
from megatron_internvlx.config import VisionSettings, settings_from  # noqa: E402
from megatron_internvlx.data.plan import build_plan  # noqa: E402
from megatron_internvlx.megatron_settings import Batches, Parallelism  # noqa: E402
from megatron_internvlx.model.internvlx import InternVLX  # noqa: E402
from megatron_internvlx.parallel.batch import MicroBatch  # noqa: E402
from megatron_internvlx.parallel.communicator import BoundaryCommunicator  # noqa: E402
from megatron_internvlx.parallel.device_plan import device_plan  # noqa: E402
from megatron_internvlx.parallel.groups import MegatronGroups  # noqa: E402
from megatron_internvlx.platform.transfer import to_device  # noqa: E402
from megatron_internvlx.training.builder import ModelProvider  # noqa: E402
from megatron_internvlx.training.provider import plan_settings  # noqa: E402
from megatron_internvlx.training.step import ForwardStep  # noqa: E402

# Transformer Engine numbers grouped experts in the tensor's name.
_GROUPED = re.compile(r"\.experts\.(linear_fc[12]\.weight)(\d+)$")


class ConvertedWeights(Mapping[str, Tensor]):
    """Mapping of full names to tensors, converted on access, so that no tensor is in memory twice."""

    def __init__(self, request: Request) -> None:
        self._stored: ModelWeights | None = None
        self._sources: dict[str, Any] = {}
        if request.load:
            self._stored = ModelWeights(Path(request.load))
            return
        assert request.hf is not None
        self._folder = Path(request.hf)
        weights = WeightFiles(self._folder, allow_pickle=request.allow_pickle)
        self._pickled = weights.pickled
        plan = plan_import(self._folder, weights, {})
        self._sources = {source.entry.ours: source for source in plan.sources}

    def __getitem__(self, name: str) -> Tensor:
        name = _GROUPED.sub(r".experts.local_experts.\2.\1", name)
        if self._stored is not None:
            return self._stored.find(name).read()
        return make_tensor(self._folder, self._sources[name], self._pickled, 0)

    def __contains__(self, name: object) -> bool:
        if self._stored is not None:
            return True  # reading a missing tensor raises an error
        return _GROUPED.sub(r".experts.local_experts.\2.\1", str(name)) in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


class CaseBatches:
    """The case as one packed micro-batch, repeated as often as the schedule needs it."""

    def __init__(self, case: Case, args: Any, image_token: int | None) -> None:
        rows = case.rows()
        plan = build_plan(
            [ids for ids, _ in rows],
            [labels for _, labels in rows],
            [ids == image_token for ids, _ in rows],
            plan_settings(args),
        )
        self.plan = device_plan(plan)
        self.rows = sum(plan.deep.segment_lengths[: len(plan.sample_ids)])
        """Of the case; those after them are padding."""
        self.tiles = case.tiles
        if not len(self.tiles):  # text only: the encoder still runs, on a blank tile
            side = settings_from(args, VisionSettings).image_size
            self.tiles = torch.zeros(0, 3, side, side)
        self.seq_length = settings_from(args, Batches).seq_length
        layout = settings_from(args, Parallelism)
        self.stages = layout.pipeline_model_parallel_size
        # The interleaved schedule needs complete groups; equal micro-batches have the same mean loss.
        self.count = self.stages if layout.virtual_pipeline_model_parallel_size else 1

    def communicator(self) -> BoundaryCommunicator:
        """Create a communicator that uses the same plan for every micro-batch."""
        return BoundaryCommunicator(
            micro_batches=lambda training: self.count,
            upcoming=lambda chunk, training, least: (least, self.plan),
        )

    def batch(self) -> MicroBatch:
        """This rank's share of the micro-batch."""
        if not mpu.is_pipeline_first_stage(ignore_virtual=True):
            return MicroBatch(self.plan, None)
        return MicroBatch(self.plan, share_of_tiles(self.tiles, self.plan.tile_capacity))

    def iterators(self, chunks: int) -> Any:
        """Data iterators for the schedule, one per model chunk."""
        lists = [iter([self.batch() for _ in range(self.count)]) for _ in range(chunks)]
        return lists if chunks > 1 else lists[0]


def share_of_tiles(tiles: Tensor, capacity: int) -> Tensor:
    """Tiles that this tensor-parallel rank encodes, padded with blank tiles to `capacity` over all ranks."""
    blank = tiles.new_zeros((capacity - len(tiles), *tiles.shape[1:]))
    size, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    return to_device(torch.cat([tiles, blank]).chunk(size)[rank])


def run_rank(request: Request) -> None:
    """Run the case and write this rank's results to the request's folder. Raises ValueError."""
    saved, sys.argv = sys.argv, [
        "verify", "--recipe", str(Path(request.folder) / RECIPE), "--global-batch-size",
        str(_data_parallel(request)), *request.layout.arguments(),
    ]  # fmt: skip
    try:
        args = arguments.parse()
    finally:
        sys.argv = saved
    initialize_megatron()
    case = load_case(Path(request.inputs))
    batches = CaseBatches(case, args, request.image_token)
    communicator, groups, step = batches.communicator(), MegatronGroups(), ForwardStep()
    try:
        model = get_model(
            ModelProvider(args, communicator, step.weights), ModelType.encoder_or_decoder,
            wrap_with_ddp=request.gradients, pg_collection=groups,
        )  # fmt: skip
    except AssertionError as error:
        raise ValueError(f"Megatron refuses this layout: {error}") from error
    stages = unwrap_model(model)
    load_full(stages, ConvertedWeights(request))
    found = features_of(stages[0], case)
    found |= logits_of(model, batches, communicator, groups)
    loss = loss_of(model, batches, communicator, groups, step, backward=request.gradients)
    found |= loss
    if found and mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_data_parallel_rank() == 0:
        parts = {name: tensor.float().cpu().contiguous() for name, tensor in found.items()}
        save_file(parts, Path(request.folder) / f"part{torch.distributed.get_rank()}.safetensors")
    if request.gradients:
        gradients = full_tensors(stages, gradient_of)
        if torch.distributed.get_rank() == 0:
            ours = {_GROUPED.sub(r".experts.local_experts.\2.\1", n): g for n, g in gradients.items()}
            save_file({n: g.contiguous() for n, g in ours.items()}, Path(request.folder) / GRADIENTS)


def gradient_of(parameter: Any) -> Tensor | None:
    """Gradient of a parameter; None if it is not trained, because Megatron then has no buffer for it."""
    return parameter.main_grad if parameter.requires_grad else None


def _data_parallel(request: Request) -> int:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else launched_ranks()
    return max(1, world // (request.layout.tensor * request.layout.pipeline))


@torch.no_grad()
def features_of(stage: InternVLX, case: Case) -> dict[str, Tensor]:
    """Vision features and the entry projector's tokens of all tiles, used in the text or not."""
    tiles = case.pixel_values
    if not stage.pre_process or not len(tiles):
        return {}
    stage.eval()
    size = stage.tp_group.size()
    capacity = -(-len(tiles) // size) * size
    count: Any = SimpleNamespace(encoded_tiles=len(tiles))  # all that `encode` reads of a plan
    features = stage.encode(share_of_tiles(tiles, capacity), count)
    tokens = stage.projector(features)
    grid = stage.sizes.entry_grid
    return {
        "vit_last_hidden_state": features,
        "projector_output": tokens.view(len(tiles), grid, grid, -1),
    }


def _schedule(model: list, batches: CaseBatches, communicator: Any, groups: Any, **how: Any) -> list:
    run = get_forward_backward_func()
    return run(
        model=model,
        data_iterator=batches.iterators(len(model)),
        num_microbatches=batches.count,
        seq_length=batches.seq_length,
        micro_batch_size=1,
        p2p_communicator=communicator if batches.stages > 1 else None,
        pg_collection=groups if batches.stages > 1 else None,
        **how,
    )


@torch.no_grad()
def logits_of(model: list, batches: CaseBatches, communicator: Any, groups: Any) -> dict[str, Tensor]:
    """[rows, V] logits of the unpadded rows, on the last stage."""
    for chunk in model:
        chunk.eval()

    def step(iterator: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Any]:
        return chunk(next(iterator), return_logits=True), lambda output, non_loss_data: output

    def forward(iterator: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Any]:
        last = unwrap_model(chunk).post_process
        return step(iterator, chunk) if last else (chunk(next(iterator)), None)

    outputs = _schedule(
        model, batches, communicator, groups,
        forward_step_func=forward, forward_only=True, collect_non_loss_data=True,
    )  # fmt: skip
    return {"logits": outputs[0][: batches.rows]} if outputs else {}


def loss_of(
    model: list,
    batches: CaseBatches,
    communicator: Any,
    groups: Any,
    step: ForwardStep,
    *,
    backward: bool,
) -> dict[str, Tensor]:
    """[1] mean loss over supervised tokens, on the last stage; gradients too with `backward`."""
    for chunk in model:
        chunk.train()
        if backward:
            chunk.zero_grad_buffer()
    reports = _schedule(
        model, batches, communicator, groups,
        forward_step_func=step, forward_only=not backward,
    )  # fmt: skip
    if not reports:
        return {}
    total, count = torch.stack([report["loss"] for report in reports]).sum(dim=0)
    return {"loss": (total / count.clamp(min=1)).reshape(1)}
