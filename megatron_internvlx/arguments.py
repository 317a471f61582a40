"""The command line: our settings added to Megatron's arguments, and the checks that need both.

Later defaults override earlier ones: Megatron's, the platform's (CPU), ours, the model preset, the precision,
the recipe file, the command line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables

from megatron_internvlx import platform
from megatron_internvlx.config import (
    SETTINGS,
    CompressionSettings,
    DataSettings,
    RunSettings,
    TrainSettings,
    check_decoding,
    check_packing,
    check_projector,
    check_static_budgets,
    check_supervised_budget,
    settings_from,
    untrained_parts,
)
from megatron_internvlx.data.epochs import epoch_steps
from megatron_internvlx.data.rvtc import NAMES_VERSION
from megatron_internvlx.lora_settings import LoraSettings, check_lora
from megatron_internvlx.megatron_settings import Batches, Execution, ParallelSizes, Rotary, Schedule
from megatron_internvlx.model.presets import preset
from megatron_internvlx.model.sizes import ModelSizes, model_sizes
from megatron_internvlx.parallel.layout import check_layout
from megatron_internvlx.planning.graph import check_deterministic_attention, check_graph
from megatron_internvlx.planning.split import settle_split
from megatron_internvlx.precision import (
    DecoderWidths,
    Precision,
    check_precision,
    precision_defaults,
)
from megatron_internvlx.ranges import check_numbers, check_required, check_schedule
from megatron_internvlx.recipe import raise_instead_of_exit, read_recipe
from megatron_internvlx.refusals import translate_refusals
from megatron_internvlx.usage import Formatter

# Megatron settings that every run of ours needs, whatever the model.
OUR_DEFAULTS: dict[str, Any] = {
    "calculate_per_token_loss": True,
    "dataloader_type": "external",
    "tokenizer_type": "NullTokenizer",
    "ckpt_format": "torch_dist",
    "micro_batch_size": 1,
    "eval_iters": 0,
    "eval_interval": 1000,
    "rerun_mode": "disabled",
    "log_interval": 10,
    # A resumed run follows its own arguments, not the checkpoint's; equal arguments change nothing.
    "override_opt_param_scheduler": True,
}


def add_our_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags and set the layered defaults; the `extra_args_provider` of Megatron's parser."""
    for settings in SETTINGS:
        ArgumentGroupFactory(settings).build_group(parser, title=settings.__name__)
    parser.add_argument("--recipe", help="flat YAML file of arguments; the command line overrides it")
    parser.add_argument(
        "--without", nargs="+", metavar="NAME", help="ignore these settings of the recipe, such as packing"
    )
    parser.add_argument("--help-all", action="help", help="list all arguments, Megatron's too, and exit")
    parser.formatter_class = Formatter
    raise_instead_of_exit(parser)
    known = {action.dest for action in parser._actions}
    chosen = _parse_early_flags(sys.argv[1:])
    recipe = read_recipe(chosen.recipe, parser, chosen.without or ()) if chosen.recipe else {}
    name = chosen.model_preset or recipe.get("model_preset")
    _set_dry_run_world(chosen, recipe)
    numbers = precision_defaults(chosen.precision or recipe.get("precision"))
    named = (preset(name) if name else {}) | numbers
    defaults = platform.args_defaults() | OUR_DEFAULTS | named | recipe
    unknown = sorted(set(defaults) - known)
    if unknown:
        raise ValueError(f"settings unknown to this version of Megatron: {', '.join(unknown)}")
    tokenizer = chosen.tokenizer_model or defaults.get("tokenizer_model")
    if chosen.dry_run and tokenizer and not Path(tokenizer).is_dir():
        tokenizer = None  # a dry run needs no files; the preset has the vocabulary size
    if tokenizer and chosen.vocab_size is None and "vocab_size" not in recipe:
        size = tokenizer_size(tokenizer)
        # A released embedding often has more rows than its tokenizer has ids: keep the larger size.
        keep = name is not None and "tiny" not in name
        defaults["vocab_size"] = max(size, defaults.get("vocab_size", 0) if keep else 0)
    # Stored with every checkpoint, so that a name in an older one is not taken for another rule.
    parser.set_defaults(**defaults, rvtc_version=NAMES_VERSION)
    return parser


def _parse_early_flags(argv: list[str]) -> argparse.Namespace:
    """Parse the flags on which the defaults of other flags depend."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--model-preset")
    peek.add_argument("--recipe")
    peek.add_argument("--without", nargs="+")
    peek.add_argument("--precision")
    peek.add_argument("--tokenizer-model")
    peek.add_argument("--vocab-size", type=int)
    peek.add_argument("--dry-run", action="store_true")
    peek.add_argument("--dry-run-world-size", type=int)
    return peek.parse_known_args(argv)[0]


def _set_dry_run_world(chosen: argparse.Namespace, recipe: dict[str, Any]) -> None:
    """Give a dry run the requested number of GPUs instead of this process's world size."""
    if chosen.dry_run:
        platform.pretend_hopper()
    size = chosen.dry_run_world_size
    size = recipe.get("dry_run_world_size") if size is None else size
    if size is not None and size < 1:
        raise ValueError(f"--dry-run-world-size {size}: must be a number of GPUs, at least 1")
    if chosen.dry_run and size:
        os.environ["WORLD_SIZE"] = str(size)  # Megatron reads the world size only here


def tokenizer_size(directory: str) -> int:
    """Number of token ids of a Hugging Face tokenizer directory."""
    from megatron_internvlx.data.tokenizer import load_tokenizer

    return len(load_tokenizer(directory))


def check_arguments(args: argparse.Namespace) -> None:
    """Check all arguments and their combinations before anything is built. Raises ValueError."""
    check_numbers(args)
    _settle_epochs(args)
    check_required(args)
    check_schedule(settings_from(args, Schedule))
    sizes, parallel = model_sizes(args), settings_from(args, ParallelSizes)
    check_projector(
        settings_from(args, CompressionSettings),
        hidden_size=sizes.hidden,
        tensor_parallel=parallel.tensor_model_parallel_size,
    )
    batches = settings_from(args, Batches)
    _check_world(parallel, batches, sizes, dry_run=settings_from(args, RunSettings).dry_run)
    _check_unsupported(args)
    _check_positions(settings_from(args, Rotary), batches.seq_length)
    _check_overlap(settings_from(args, Execution), sizes)
    train, data = settings_from(args, TrainSettings), settings_from(args, DataSettings)
    precision, fuses = settings_from(args, Precision), args.use_transformer_engine_op_fuser
    check_lora(settings_from(args, LoraSettings), sizes.experts, sizes.hidden, fuses_operations=fuses)
    check_precision(
        precision,
        settings_from(args, DecoderWidths),
        train,
        tokens_per_tile=sizes.vision.tokens_per_tile,
        cells=(sizes.entry_grid**2, sizes.high_grid**2),
    )
    _check_static(sizes, train, data, batches, alignment=precision.row_alignment)
    _check_training(args, train, data, precision)
    check_graph(args, sizes)
    check_deterministic_attention(args, sizes)


def _settle_epochs(args: argparse.Namespace) -> None:
    """Set the number of steps from --epochs. Raises ValueError."""
    data, batches = settings_from(args, DataSettings), settings_from(args, Batches)
    if data.epochs is None:
        return
    if batches.train_iters or settings_from(args, Schedule).train_samples:
        raise ValueError(
            "--epochs, --train-iters and --train-samples: set only one of them; --without drops a recipe's"
        )
    if data.packing:
        raise ValueError(
            "--epochs and --packing: a step takes packs, and how many an epoch fills is known after packing only; give "
            "--train-iters, from the packs that prepare_data's stats estimates"
        )
    if not batches.global_batch_size or batches.rampup_batch_size:
        raise ValueError("--epochs needs --global-batch-size, without --rampup-batch-size")
    # A dry run needs no data: what it prints does not depend on the number of steps.
    args.train_iters = epoch_steps(data, batches.global_batch_size) if data.data else 1


def _check_world(parallel: ParallelSizes, batches: Batches, sizes: ModelSizes, *, dry_run: bool) -> None:
    """Check that ranks, experts and the global batch can be divided over the layout. Raises ValueError."""
    ranks, experts = parallel.world_size, sizes.experts
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    expert = parallel.expert_model_parallel_size
    if expert > 1 and (not experts or experts % expert):
        raise ValueError(
            f"the model's {experts} experts cannot be divided by --expert-model-parallel-size {expert}: "
            + (f"use one of {', '.join(map(str, _divisors(experts)))}" if experts else "remove it")
        )
    if sizes.topk > experts:
        raise ValueError(f"--moe-router-topk {sizes.topk} is more than the model's {experts} experts")
    if layout := parallel.pipeline_model_parallel_layout:
        check_layout(layout, pipeline=pipeline, layers=sizes.layers)
    expert_tensor = parallel.expert_tensor_parallel_size or tensor
    for what, product in (
        (f"TP {tensor} x PP {pipeline}", tensor * pipeline),
        (
            f"EP {expert} x expert TP {expert_tensor} x PP {pipeline}",
            expert * expert_tensor * pipeline if experts else 1,
        ),
    ):
        if ranks % product:
            up = -(-ranks // product) * product
            remedy = (
                f"--dry-run-world-size {up}" if dry_run else f"start {up} ranks (torchrun --nproc-per-node)"
            )
            raise ValueError(
                f"{ranks} rank{'s' if ranks > 1 else ''} cannot be divided into {what} = {product}: {remedy}, "
                "or change the parallel sizes"
            )
    micro, batch, data = batches.micro_batch_size, batches.global_batch_size, ranks // (tensor * pipeline)
    if batch and not batches.rampup_batch_size and batch % (micro * data):
        near = max(round(batch / (micro * data)), 1) * micro * data
        raise ValueError(
            f"--global-batch-size {batch} must be a multiple of --micro-batch-size {micro} x {data} data-parallel "
            f"ranks = {micro * data} ({ranks} ranks / TP {tensor} / PP {pipeline}): use {near}"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _check_unsupported(args: argparse.Namespace) -> None:
    refused = {
        "--context-parallel-size": args.context_parallel_size > 1,
        "--mtp-num-layers": bool(args.mtp_num_layers),
        "--multi-latent-attention": args.multi_latent_attention,
        "--use-megatron-fsdp": args.use_megatron_fsdp,
        "--use-torch-fsdp2": args.use_torch_fsdp2,
        "--heterogeneous-layers-config-path": args.heterogeneous_layers_config_path is not None,
        "--sft": args.sft,
        "--multiple-validation-sets": args.multiple_validation_sets,
    }
    asked = [flag for flag, on in refused.items() if on]
    if asked:
        raise ValueError(
            f"{', '.join(asked)}: not supported with InternVL-X, because the sequence length changes inside "
            "the decoder; remove these flags"
        )


def _check_overlap(execution: Execution, sizes: ModelSizes) -> None:
    """Check that products and their communication can overlap. Raises ValueError."""
    if execution.tp_comm_overlap and sizes.lvtc:
        raise ValueError(
            "--tp-comm-overlap: its buffers are made for one number of rows, --seq-length, and layers before "
            "--expand-layer have fewer; remove it"
        )


def _check_positions(rotary: Rotary, seq_length: int) -> None:
    limit = rotary.max_position_embeddings
    if limit is not None and seq_length > limit:
        raise ValueError(
            f"--seq-length {seq_length} is more than the model's --max-position-embeddings {limit}: RoPE was not "
            "trained beyond it"
        )


def _check_static(
    sizes: ModelSizes, train: TrainSettings, data: DataSettings, batches: Batches, *, alignment: int
) -> None:
    samples = max(
        1 if data.packing else batches.micro_batch_size,
        (batches.eval_micro_batch_size or batches.micro_batch_size) if data.valid_data else 1,
    )
    if train.boundary == "static":
        check_static_budgets(
            train,
            deep=batches.seq_length,
            alignment=alignment,
            samples=samples,
            sample_tiles=1 if data.static_image_size else data.image_tiles,
            low_rows=sizes.low_grid**2,
            high_rows=sizes.high_grid**2,
            lvtc=sizes.lvtc,
        )
    entry_rows = (sizes.lvtc and train.shallow_seq_length) or batches.seq_length
    check_supervised_budget(train, entry_rows=entry_rows, samples=samples)


def _check_training(
    args: argparse.Namespace, train: TrainSettings, data: DataSettings, precision: Precision
) -> None:
    if len(untrained_parts(train, settings_from(args, LoraSettings))) == 3:
        raise ValueError("--freeze-vision --freeze-llm --freeze-projectors: nothing is left to train")
    if precision.bf16 and precision.fp16:
        raise ValueError("--bf16 and --fp16: set only one of them; --precision bf16 sets the first")
    if not 1 <= data.min_tiles <= data.max_tiles:
        raise ValueError(
            f"--min-tiles {data.min_tiles} must be at least 1 and at most --max-tiles {data.max_tiles}"
        )
    if not args.calculate_per_token_loss:
        raise ValueError("the loss weights need Megatron's --calculate-per-token-loss: do not turn it off")
    check_decoding(data)
    check_packing(data, train, micro_batch_size=settings_from(args, Batches).micro_batch_size)


def validate(args: argparse.Namespace) -> None:
    """Run Megatron's own checks. Raises ValueError with the message or condition of a failed one."""
    if args.use_checkpoint_opt_param_scheduler:
        args.override_opt_param_scheduler = False
    if args.transformer_impl == "local" and not platform.output_layer_fuses_accumulation():
        args.gradient_accumulation_fusion = False
    with translate_refusals(args):
        validate_args(args)


def parse(
    prepare: Callable[[argparse.Namespace], None] = lambda args: None,
    made_with: Callable[[argparse.Namespace], str | None] = lambda args: None,
) -> argparse.Namespace:
    """Parse and check sys.argv, and set Megatron's global variables. Raises ValueError.

    Args:
        prepare: changes the parsed arguments before they are checked.
        made_with: see `settle_split`.
    """
    platform.quiet_prints()
    args = parse_args(add_our_arguments)
    prepare(args)
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    check_arguments(args)
    settle_split(args, made_with)
    validate(args)
    with translate_refusals(args):
        set_global_variables(args)
    return args


def default_to_one_rank() -> None:
    """Without torchrun, set RANK=0, WORLD_SIZE=1 and MASTER_PORT=0: the store takes a free port when it is made."""
    if "RANK" in os.environ or "MASTER_ADDR" in os.environ:
        return
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
