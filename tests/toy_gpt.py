"""A GPT of a few thousand weights on mock data, trained by Megatron's `pretrain` in a rank of the pool."""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from megatron_internvlx import platform

platform.setup()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.training import get_args, pretrain  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args  # noqa: E402

from megatron_internvlx.model.norm import RMSNorm  # noqa: E402

VOCABULARY = 64
LENGTH = 16

ARGUMENTS = f"""
--num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --seq-length {LENGTH}
--max-position-embeddings {LENGTH} --micro-batch-size 1 --global-batch-size 4 --lr 1e-2 --min-lr 1e-2
--lr-decay-style constant --vocab-size {VOCABULARY} --make-vocab-size-divisible-by 1
--tokenizer-type NullTokenizer --log-interval 1 --eval-iters 1 --eval-interval 1000 --normalization RMSNorm
--swiglu --disable-bias-linear --position-embedding-type rope --no-create-attention-mask-in-dataloader
--override-opt-param-scheduler --ckpt-format torch_dist --num-workers 0
""".split()

NO_DROPOUT = ["--hidden-dropout", "0", "--attention-dropout", "0"]
# Optimizer state saved in a form that any layout can load.
RESHARDABLE = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]


class CountingRows(torch.utils.data.Dataset):
    """Row i counts up from a start that depends on i: easy to learn, and the same on every rank."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> torch.Tensor:
        return (7 * index + torch.arange(LENGTH + 1)) % VOCABULARY


def datasets(_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, None]:
    return CountingRows(), CountingRows(), None


def model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage)
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    block.layer_norm = RMSNorm
    return GPTModel(
        config,
        block,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=LENGTH,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def _loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    total = losses.float().sum()
    count = torch.tensor(losses.numel(), dtype=torch.int)
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def _row(rows: Iterator[torch.Tensor] | None) -> torch.Tensor:
    """The next row; only the first rank of a tensor parallel group has a loader."""
    row = next(rows) if rows is not None else torch.empty(1, LENGTH + 1, dtype=torch.long)
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.broadcast(row, parallel_state.get_tensor_model_parallel_src_rank(), group=group)
    return row


def forward_step(rows: Iterator[torch.Tensor] | None, gpt: GPTModel) -> tuple[torch.Tensor, Any]:
    row = _row(rows)
    positions = torch.arange(LENGTH).expand(len(row), LENGTH)
    mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH), 1).bool()
    losses = gpt(row[:, :-1].contiguous(), positions, mask, labels=row[:, 1:].contiguous())
    return losses, partial(_loss)


def train(arguments: list[str]) -> dict[str, Any]:
    """Trains with these arguments on top of the common ones.

    Returns the losses by iteration (empty but on the last pipeline stage), the gradient norms, the values of
    the evaluation at the end, and the final random state.
    """
    losses: dict[int, float] = {}
    norms: dict[int, float | None] = {}
    evaluations: dict[str, dict[str, float]] = {}

    def line(record: platform.LogRecord) -> str:
        norms[record.iteration] = record.grad_norm
        if record.losses:
            losses[record.iteration] = record.losses["lm loss"]
        return f"iteration {record.iteration} {record.losses}"

    def eval_line(prefix: str, values: dict[str, float]) -> None:
        evaluations[prefix] = values

    platform.install_log_line(line, eval_line)
    saved = sys.argv
    sys.argv = ["toy_gpt", *ARGUMENTS, *arguments]
    try:
        args = parse_and_validate_args(extra_args_provider=platform.set_args_defaults)
    finally:
        sys.argv = saved
    config = pretrain_cfg_container_from_args(args)
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step, model)
    return {
        "losses": losses,
        "norms": norms,
        "evaluations": evaluations,
        "random": torch.get_rng_state().numpy().tobytes(),
    }
