"""The same tiny InternVL-X trained in any layout, from the same weights, on the same global batches.

`train(arguments, ...)` runs on a rank of the pool through Megatron's own `train` (schedules, DDP,
optimizer): only the samples are synthetic. Gradients are captured just before the optimizer's step,
under full names and in full shape (see `checkpoint/shards.py`).
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_internvlx import platform

platform.setup()

import megatron.training.training as training  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.rerun_state_machine import RerunDataIterator  # noqa: E402
from megatron.core.utils import get_model_config, unwrap_model  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402

from megatron_internvlx import arguments  # noqa: E402
from megatron_internvlx.checkpoint.shards import full_tensors, load_full  # noqa: E402
from megatron_internvlx.data.plan import PlanSettings, build_plan  # noqa: E402
from megatron_internvlx.parallel.batch import HostBatch  # noqa: E402
from megatron_internvlx.parallel.groups import MegatronGroups  # noqa: E402
from megatron_internvlx.training.builder import ModelProvider  # noqa: E402
from megatron_internvlx.training.pipeline import boundary_communicator  # noqa: E402
from megatron_internvlx.training.provider import DataProvider, plan_settings  # noqa: E402
from megatron_internvlx.training.step import ForwardStep  # noqa: E402

TOKENIZER = Path(__file__).parent / "golden" / "data" / "tokenizers" / "qwen2_fast"
IMAGE, VOCABULARY, MICRO_BATCHES = 64, 67, 4

# 8x8 patches per tile: 2x2 shallow and 4x4 deep tokens (ratios 1/4 and 1/2), so that upsampling mixes rows and
# an order of rows can be wrong. Two query heads per key-value head, also on each of four TP ranks. 8 decoder
# layers, so that PP8 and PP4 x VPP2 have one layer per stage.
ARGUMENTS = f"""
--num-layers 8 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 8 --group-query-attention
--num-query-groups 4 --kv-channels 4 --normalization RMSNorm --swiglu --disable-bias-linear
--position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
--vision-preset internvit_tiny --image-size {IMAGE} --patch-size 8 --projector-drop-path 0
--vocab-size {VOCABULARY} --make-vocab-size-divisible-by 1 --tokenizer-model {TOKENIZER} --data none
--seq-length 256 --max-position-embeddings 256 --micro-batch-size 1 --global-batch-size {MICRO_BATCHES}
--lr 1e-3 --min-lr 1e-3 --lr-decay-style constant --weight-decay 0 --clip-grad 1.0 --train-iters 1
--log-interval 1 --eval-iters 0 --expand-layer 3 --inject-layers 5
""".split()


def sample(number: int, tiles: int, tokens_per_tile: int) -> tuple[np.ndarray, ...]:
    """(ids, labels, is_visual, uint8 tiles) of a sample: text, its tiles in the middle, an answer."""
    rng = np.random.default_rng([77, number])
    before, after, answer = rng.integers(2, 6, 3)
    text = rng.integers(3, VOCABULARY, before + after + answer)
    visual = tiles * tokens_per_tile
    ids = np.concatenate([text[:before], np.zeros(visual, int), text[before:]])
    is_visual = np.zeros(len(ids), bool)
    is_visual[before : before + visual] = True
    labels = np.full(len(ids), -100)
    labels[-answer:] = ids[-answer:]
    return ids, labels, is_visual, rng.integers(0, 256, (tiles, 3, IMAGE, IMAGE)).astype(np.uint8)


def synthetic_plan_settings(args: Any) -> PlanSettings:
    """Plan settings of a run on synthetic packs: with static boundaries of up to four samples.

    Without their loader the arguments have one sample per micro-batch.
    """
    settings = plan_settings(args)
    return settings if settings.sample_budget is None else replace(settings, sample_budget=4)


def micro_batch(number: int, kind: str, settings: PlanSettings) -> HostBatch:
    """Micro-batch `number`: three samples packed, or one; of 0 and more tiles, "text": even ones of none."""
    count = 1 if kind == "single" else 3
    tiles = [(number * 5 + i * 2) % 4 if kind != "text" or number % 2 else 0 for i in range(count)]
    samples = [sample(number * 8 + i, n, settings.high_grid**2) for i, n in enumerate(tiles)]
    plan = build_plan([s[0] for s in samples], [s[1] for s in samples], [s[2] for s in samples], settings)
    return HostBatch(plan, torch.from_numpy(np.concatenate([s[3] for s in samples])))


class SyntheticData(DataProvider):
    """The real provider (channels, groups, virtual stages) with synthetic micro-batches."""

    kind = "packed"

    @property
    def has_validation(self) -> bool:
        return self.args.eval_iters > 0

    def __call__(self, _num_samples, vp_stage: int | None = None):
        valid = self._iterator("valid", vp_stage) if self.has_validation else None
        return self._iterator("train", vp_stage), valid, None

    def open_files(self) -> None:
        """There are none."""

    def _loader(self, split: str) -> Iterator[HostBatch]:
        settings = synthetic_plan_settings(self.args)
        number = mpu.get_data_parallel_rank() + (self.args.consumed_train_samples if split == "train" else 50)
        while True:
            yield micro_batch(number, self.kind, settings)
            number += mpu.get_data_parallel_world_size()


def parse(changes: list[str]) -> Any:
    """Our arguments, parsed as the entry script does; "no=FLAG" takes FLAG and its value from ARGUMENTS."""
    words = list(ARGUMENTS)
    for change in changes:
        if change.startswith("no="):
            at = words.index(change.removeprefix("no="))
            has_value = at + 1 < len(words) and not words[at + 1].startswith("--")
            del words[at : at + 1 + has_value]
    words += [change for change in changes if not change.startswith("no=")]
    saved, sys.argv = sys.argv, ["layouts", *words]
    try:
        return arguments.parse()
    finally:
        sys.argv = saved


class Run:
    """What a training run is made of on this rank, as pretrain_vlm.py makes it.

    Args:
        changes: arguments on top of ARGUMENTS.
        data: class of the data provider.
    """

    def __init__(self, changes: list[str], data: type[SyntheticData] = SyntheticData) -> None:
        self.args = args = parse(changes)
        initialize_megatron()
        self.data = data(args)
        self.communicator = boundary_communicator(self.data)
        self.groups, self.step = MegatronGroups(), ForwardStep()
        self.model, self.optimizer, self.scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            model_provider_func=ModelProvider(args, self.communicator, self.step.weights),
            cfg_container=pretrain_cfg_container_from_args(args),
            pg_collection=self.groups,
        )


def train(
    changes: list[str], *, weights: str | None = None, kind: str = "packed", keep: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Train in the layout that `changes` describes.

    Args:
        changes: arguments on top of ARGUMENTS (layout, --train-iters, LVTC settings).
        weights: file of full weights to start from; None: Megatron's initialisation.
        kind: "packed", "single" or "text"; see `micro_batch`.
        keep: of "grads" (first step, full shape), "weights" (at the end), "start" (before training).

    Returns:
        losses by iteration and of evaluations (last stage only), gradient norms by iteration as Megatron
        reports them, what each boundary carried, and what `keep` names (on rank 0 only; "replicas", which
        comes with "grads", on every rank: see `_replica_difference`).
    """
    run = Run(changes)
    args, data, communicator, groups = run.args, run.data, run.communicator, run.groups
    step, model, optimizer, scheduler = run.step, run.model, run.optimizer, run.scheduler
    stages = unwrap_model(model)
    if weights is not None:
        load_full(stages, torch.load(weights))
        optimizer.reload_model_params()
    result: dict[str, Any] = {"losses": {}, "norms": {}, "valid": []}
    first = torch.distributed.get_rank() == 0
    if "start" in keep:
        start = full_tensors(stages, lambda p: p.data)
        result["start"] = start if first else None
    if "grads" in keep:
        _capture_gradients(model, optimizer, stages, result, first)

    def line(record: platform.LogRecord) -> None:
        result["norms"][record.iteration] = record.grad_norm
        if "loss" in record.losses:
            result["losses"][record.iteration] = record.losses["loss"]

    platform.install_log_line(line, lambda _, means: result["valid"].append(means.get("loss")))
    data.kind = kind
    train_data, valid_data = _iterators(data, args.virtual_pipeline_model_parallel_size)
    args.do_valid, args.do_test = data.has_validation, False
    training.train(
        step, model, optimizer, scheduler, train_data, valid_data,
        None, get_model_config(model[0]), {}, None, p2p_communicator=communicator, pg_collection=groups,
    )  # fmt: skip
    result["traffic"] = {key: (t.messages, t.bytes) for key, t in communicator.traffic.items()}
    result["broadcasts"] = sum(shared.channel.broadcasts for shared in data._shared.values())
    if "weights" in keep:
        final = full_tensors(stages, lambda p: p.data)
        result["weights"] = final if first else None
    return result


def _iterators(data: SyntheticData, virtual_stages: int | None) -> tuple[Any, Any]:
    """(training, validation) iterators as Megatron makes them: a list of them with virtual stages."""
    chunks = [data(None, vp_stage=i)[:2] for i in range(virtual_stages or 1)]
    train, valid = (
        [RerunDataIterator(x) if x else None for x in split] for split in zip(*chunks, strict=True)
    )
    return (train, valid) if virtual_stages else (train[0], valid[0])


def _capture_gradients(
    model: list, optimizer: Any, stages: list, result: dict[str, Any], first: bool
) -> None:
    """Take all gradients at the first optimizer step."""
    step = optimizer.step

    def captured() -> Any:
        if "grads" not in result:
            for chunk in model:
                _gather_gradients(chunk)
            grads = full_tensors(stages, lambda p: p.main_grad if p.requires_grad else None)
            result["grads"] = grads if first else None
            result["replicas"] = _replica_difference(stages)
        return step()

    optimizer.step = captured


def _gather_gradients(chunk: Any) -> None:
    """With the distributed optimizer a rank's gradients are complete in its own shard only: gather them."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for bucket_group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
        group = bucket_group.intra_distributed_optimizer_instance_group
        for bucket in bucket_group.buckets:
            mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def _replica_difference(stages: list) -> float:
    """Largest difference, between TP ranks, of the gradient of a weight that all of them hold.

    Relative to the largest element of that gradient. `full_tensors` shows one rank's copy only.
    """
    group = mpu.get_tensor_model_parallel_group()
    grads = [
        p.main_grad.float()
        for stage in stages
        for p in stage.parameters()
        if p.requires_grad
        and not getattr(p, "tensor_model_parallel", False)
        and getattr(p, "allreduce", True)
    ]
    if group.size() == 1 or not grads:
        return 0.0
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    sizes, least = [grad.numel() for grad in grads], flat.clone()
    torch.distributed.all_reduce(flat, torch.distributed.ReduceOp.MAX, group=group)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group)
    return max(
        ((high - low).max() / torch.maximum(high, -low).max().clamp(min=1e-30)).item()
        for high, low in zip(flat.split(sizes), least.split(sizes), strict=True)
    )


def save_start(changes: list[str], path: str) -> None:
    """Initialise on this one rank and write the full weights, every one of them random.

    Norm weights, zero biases and layer scales are perturbed as well, so that no gradient is hidden
    by a value of 0 or 1.
    """
    start = train([*changes, "--train-iters", "1"], keep=("start",))["start"]
    generator = torch.Generator().manual_seed(5)
    noisy = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in start.items()}
    torch.save(noisy, path)
