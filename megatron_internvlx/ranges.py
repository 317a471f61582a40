"""The allowed range of every numeric argument, and the rules that relate two of them.

Checked before anything is built, also in a dry run. Numbers that are not in the table must be finite and fit
into 64 bits. Sizes that depend on each other (layouts, budgets, grids) are checked in `arguments.py` and `config.py`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_internvlx.megatron_settings import Schedule


@dataclass(frozen=True)
class Range:
    """Interval of allowed values; both bounds are allowed unless `open` names them."""

    low: float
    high: float
    what: str
    """Meaning and unit of the number; the end of the error message."""
    open: str = ""
    """"low", "high" or both: bounds that are excluded."""

    def contains(self, value: float) -> bool:
        """Whether the value is in the interval; False for NaN."""
        above = value > self.low if "low" in self.open else value >= self.low
        return above and (value < self.high if "high" in self.open else value <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if 'low' in self.open else 'at least'} {self.low:,}"
        return f"{low} and {'below' if 'high' in self.open else 'at most'} {self.high:,}"


_LARGE = 2**31 - 1  # largest 32-bit size, far above the needs of any run
_RATE = (0.0, 1.0)


def _table(*rows: tuple[str, Range]) -> dict[str, Range]:
    return {name: span for names, span in rows for name in names.split()}


RANGES = _table(
    # Vision and compression
    ("image_size", Range(1, 65_536, "pixels of a tile's side")),
    ("patch_size", Range(1, 4096, "pixels of a patch's side")),
    ("select_layer", Range(-4096, 4096, "a hidden state of the vision encoder, -1 the last")),
    ("vision_drop_path projector_drop_path", Range(*_RATE, "the share that is dropped", "high")),
    ("expand_layer inject_layers", Range(0, 65_536, "a decoder layer, counted from 0")),
    ("low_ratio high_ratio", Range(*_RATE, "tokens per patch along a side", "low")),
    # Adapters
    ("lora_rank", Range(1, 65_536, "the rank of the adapters, such as 16")),
    ("lora_alpha", Range(0, 1e6, "the scale of the adapters, such as 32", "low")),
    ("lora_dropout", Range(*_RATE, "the share that is dropped", "high")),
    # Samples and packs
    ("shallow_seq_length seq_length max_position_embeddings", Range(1, _LARGE, "tokens")),
    ("max_tiles_per_pack min_tiles max_tiles", Range(1, 65_536, "tiles")),
    ("max_samples_per_pack", Range(1, 65_536, "samples")),
    ("max_supervised_tokens_per_pack", Range(1, _LARGE, "tokens with a loss; unset for all rows")),
    ("pack_buffer", Range(1, _LARGE, "samples of a loader process among which packs are chosen")),
    ("shuffle_buffer", Range(0, _LARGE, "samples of a loader process from which one is drawn")),
    ("loader_workers num_workers", Range(0, 4096, "processes, 0: none of their own")),
    ("valid_records", Range(1, _LARGE, "held-out records; unset for all")),
    ("max_rejects", Range(0, _LARGE, "samples; unset for no limit")),
    ("max_reject_rate", Range(*_RATE, "a share of the samples, 1: no limit")),
    # Dry runs, resuming and fault handling
    ("dry_run_world_size", Range(1, 10_000_000, "GPUs")),
    ("dry_run_pictures", Range(1, 2**53, "pictures of an epoch")),
    ("gpu_memory_gib", Range(0, 1e6, "GiB of one GPU", "low")),
    ("max_tries", Range(1, _LARGE, "starts without a newer checkpoint")),
    ("stall_minutes", Range(0, 1e6, "minutes for one step, 0: not watched")),
    # The language model
    ("num_layers", Range(1, 65_536, "decoder layers")),
    (
        "hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels",
        Range(1, _LARGE, "a width"),
    ),
    ("num_experts moe_router_topk", Range(1, 65_536, "experts")),
    ("moe_ffn_hidden_size moe_shared_expert_intermediate_size", Range(1, _LARGE, "a width")),
    ("moe_aux_loss_coeff moe_z_loss_coeff", Range(0, 1e6, "the weight of a loss, 0: off")),
    ("moe_input_jitter_eps", Range(*_RATE, "a share", "high")),
    (
        "moe_expert_capacity_factor",
        Range(0, 1e6, "a multiple of the mean load; unset to drop no token", "low"),
    ),
    ("hidden_dropout attention_dropout", Range(*_RATE, "the share that is dropped", "high")),
    ("norm_epsilon", Range(0, 1, "added to the variance, such as 1e-6", "low")),
    ("rotary_base", Range(1, 2**53, "RoPE's base")),
    ("rotary_percent", Range(*_RATE, "the share of a head that RoPE turns", "low")),
    ("rope_scaling_factor", Range(0, 1e6, "RoPE's stretch", "low")),
    ("init_method_std embedding_init_method_std", Range(0, 1e3, "the spread of random weights")),
    ("vocab_size", Range(1, _LARGE, "token ids; unset for the tokenizer's")),
    ("make_vocab_size_divisible_by", Range(1, _LARGE, "token ids")),
    # Layout
    (
        "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size "
        "expert_tensor_parallel_size context_parallel_size num_distributed_optimizer_instances",
        Range(1, 10_000_000, "ranks"),
    ),
    (
        "num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank",
        Range(1, 65_536, "a count"),
    ),
    (
        "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers",
        Range(0, 65_536, "decoder layers"),
    ),
    ("recompute_num_layers", Range(1, 65_536, "decoder layers")),
    ("num_layers_at_start_in_bf16 num_layers_at_end_in_bf16", Range(0, 65_536, "decoder layers")),
    ("fp8_amax_history_len fp8_interval", Range(1, _LARGE, "steps")),
    ("ddp_bucket_size", Range(1, 2**53, "parameters")),
    # Batches and steps
    ("micro_batch_size global_batch_size", Range(1, _LARGE, "samples (packs, with --packing)")),
    ("eval_micro_batch_size eval_global_batch_size", Range(1, _LARGE, "samples of the held-out data")),
    ("epochs", Range(0, 1e6, "passes over the data", "low")),
    ("train_iters", Range(1, _LARGE, "steps")),
    ("train_samples", Range(1, 2**53, "samples")),
    ("eval_iters", Range(0, _LARGE, "global batches of the held-out data")),
    ("log_interval eval_interval save_interval save_retain_interval", Range(1, _LARGE, "steps between two")),
    ("tensorboard_log_interval log_memory_interval", Range(1, _LARGE, "steps between two")),
    ("exit_interval", Range(1, _LARGE, "steps")),
    ("exit_duration_in_mins", Range(1, _LARGE, "minutes")),
    ("distributed_timeout_minutes", Range(1, 1_000_000, "minutes until a collective counts as stuck")),
    ("manual_gc_interval", Range(0, _LARGE, "steps, 0: none")),
    ("ckpt_step", Range(0, _LARGE, "the step of a checkpoint")),
    ("seed", Range(1, _LARGE, "the seed of the random numbers")),
    # Optimizer
    ("lr decoupled_lr", Range(0, 1e3, "the peak of the learning rate")),
    ("min_lr decoupled_min_lr lr_warmup_init", Range(0, 1e3, "a learning rate")),
    ("lr_warmup_fraction", Range(*_RATE, "the share of --lr-decay-iters that warms up", "high")),
    ("lr_warmup_iters lr_wsd_decay_iters", Range(0, _LARGE, "steps")),
    ("lr_decay_iters", Range(1, _LARGE, "steps")),
    ("lr_warmup_samples lr_wsd_decay_samples", Range(0, 2**53, "samples")),
    ("lr_decay_samples", Range(1, 2**53, "samples")),
    ("weight_decay start_weight_decay end_weight_decay", Range(0, 1e3, "the weight decay, 0: none")),
    ("clip_grad", Range(0, 1e9, "the largest gradient norm, 0: not clipped")),
    ("adam_beta1 adam_beta2 lion_beta1 lion_beta2", Range(*_RATE, "the decay of a running mean", "high")),
    ("sgd_momentum muon_momentum", Range(*_RATE, "the momentum", "high")),
    ("adam_eps", Range(0, 1, "added to the root of the second moment, such as 1e-8", "low")),
    ("loss_scale initial_loss_scale min_loss_scale", Range(0, 2**53, "the loss scale of fp16", "low")),
    ("loss_scale_window hysteresis", Range(1, _LARGE, "steps of the loss scale of fp16")),
)
DESTINATIONS = {"norm_epsilon": "layernorm_epsilon"}
"""Flags whose argparse destination has another name: flag -> destination."""


def _numbers(value: Any) -> Iterator[float]:
    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, int | float) and not isinstance(one, bool):
            yield one


def check_numbers(args: argparse.Namespace) -> None:
    """Check that every number is finite and in its range. Raises ValueError that lists all violations."""
    flags = {dest: name for name, dest in DESTINATIONS.items()}
    wrong = []
    for dest, given in sorted(vars(args).items()):
        name = flags.get(dest, dest)
        flag = f"--{name.replace('_', '-')}"
        for value in _numbers(given):
            if (span := RANGES.get(name)) is not None and not span.contains(value):
                wrong.append(f"{flag} {_shorten(value)}: must be {span} ({span.what})")
            elif not math.isfinite(value):
                wrong.append(f"{flag} {value}: must be a finite number")
            elif isinstance(value, int) and abs(value) >= 2**63:
                wrong.append(f"{flag} {_shorten(value)}: must fit into 64 bits")
    if wrong:
        raise ValueError("; ".join(wrong))


def _shorten(value: float) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}... ({len(text)} digits)"


def check_schedule(schedule: Schedule) -> None:
    """Check rules between two settings of the optimizer's schedules. Raises ValueError with both values."""
    for flag, rate in (("--min-lr", schedule.min_lr), ("--lr-warmup-init", schedule.lr_warmup_init)):
        if rate > schedule.lr:
            raise ValueError(f"{flag} {rate} is more than the peak, --lr {schedule.lr}")
    start, end, style = (
        schedule.start_weight_decay,
        schedule.end_weight_decay,
        schedule.weight_decay_incr_style,
    )
    if style != "constant" and (start is None or end is None or start > end):
        raise ValueError(
            f"--weight-decay-incr-style {style} needs --start-weight-decay (now {start}) "
            f"and --end-weight-decay (now {end}), and the start must not be above the end"
        )
    iterations, samples = schedule.train_iters, schedule.train_samples
    if iterations and samples:
        raise ValueError(f"--train-iters {iterations} and --train-samples {samples}: set only one of them")
    if iterations:
        lengths = (iterations, schedule.lr_decay_iters, schedule.lr_warmup_iters, schedule.lr_wsd_decay_iters)
        _check_warmup(schedule, "iters", *lengths)
    if samples:
        lengths = (
            samples,
            schedule.lr_decay_samples,
            schedule.lr_warmup_samples,
            schedule.lr_wsd_decay_samples,
        )
        _check_warmup(schedule, "samples", *lengths)


def _check_warmup(
    schedule: Schedule, unit: str, total: int, decay: int | None, warmup: int, last: int | None
) -> None:
    """Check that the warm-up ends before the decay, as Megatron's scheduler requires.

    Args:
        schedule: the settings that hold for both units.
        unit: iters or samples, in which the lengths are given.
        total: length of the training.
        decay: length of the decay; None: that of the training.
        warmup: length of the warm-up.
        last: length of the last decay of --lr-decay-style WSD.
    """
    decay = decay or total
    if schedule.lr_warmup_fraction is not None and warmup:
        raise ValueError(
            f"--lr-warmup-fraction {schedule.lr_warmup_fraction} and --lr-warmup-{unit} {warmup}: "
            "set only one of them"
        )
    if warmup >= decay:
        raise ValueError(
            f"--lr-warmup-{unit} {warmup} must be below the length of the decay, {decay} {unit} "
            f"(--lr-decay-{unit}, else --train-{unit})"
        )
    if schedule.lr_decay_style == "WSD" and (last is None or not 0 < last <= decay):
        raise ValueError(f"--lr-decay-style WSD: --lr-wsd-decay-{unit} is {last}, must be 1 to {decay}")


def check_required(args: argparse.Namespace) -> None:
    """Check that all required settings are set. Raises ValueError that lists the missing ones."""
    wanted = {
        "num_layers": "or a --model-preset",
        "hidden_size": "or a --model-preset",
        "num_attention_heads": "or a --model-preset",
        "seq_length": "tokens of a sample or a pack",
        "lr": "the peak of the learning rate",
        "train_iters": "or --train-samples, or --epochs",
    }
    if args.train_samples:
        del wanted["train_iters"]
    if args.save:
        wanted["save_interval"] = "steps between two checkpoints"
    if not args.dry_run:
        wanted["data"] = (
            "meta.json of the training data"
            if args.loader == "simple"
            else "directory made by tools/prepare_data.py"
        )
        wanted["tokenizer_model"] = "a Hugging Face tokenizer directory"
    missing = [
        f"--{name.replace('_', '-')} ({what})"
        for name, what in wanted.items()
        if getattr(args, name) in (None, "")
    ]
    if missing:
        raise ValueError(f"not set: {', '.join(missing)}; give them on the command line or in a --recipe")
