"""Limits of one CUDA graph per step and of deterministic attention, for checks of arguments."""

from __future__ import annotations

import argparse
import importlib.util
import os

from megatron_internvlx.config import (
    CompressionSettings,
    DataSettings,
    TrainSettings,
    VisionSettings,
    settings_from,
    untrained_parts,
)
from megatron_internvlx.lora_settings import LoraSettings
from megatron_internvlx.megatron_settings import Batches, Dropout, Execution, ParallelSizes
from megatron_internvlx.model.sizes import ModelSizes
from megatron_internvlx.planning.flops import Recomputation
from megatron_internvlx.platform import cards
from megatron_internvlx.precision import Precision

HOPPER = (9, 0)
SCORES_LIMIT = 1 << 30
"""Scores from which Transformer Engine 2.20 takes no deterministic fused attention for packs on Hopper."""
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
WORKSPACE_PER_SCORE = 128
"""Bytes that cuDNN's deterministic backward pass asks for, as Transformer Engine's source has it."""


def check_graph(args: argparse.Namespace, sizes: ModelSizes) -> None:
    """Check that one CUDA graph can hold a step, and set what Megatron needs for it. Raises ValueError.

    Megatron's check of each loss is switched off, and the generators are Transformer Engine's.
    """
    kind = args.cuda_graph_impl
    if kind == "none":
        return
    flag = f"--cuda-graph-impl {kind}"
    if kind != "full_iteration":
        raise ValueError(
            f"{flag}: graphs of single layers are not made for layers of two lengths; use full_iteration with "
            "--boundary static, or none"
        )
    train, precision = settings_from(args, TrainSettings), settings_from(args, Precision)
    parallel, batches = settings_from(args, ParallelSizes), settings_from(args, Batches)
    data = settings_from(args, DataSettings)
    refused = {
        "--boundary variable (micro-batches of different shapes; use static)": train.boundary != "static",
        "--transformer-impl local (no GPU kernels)": precision.transformer_impl == "local",
        "--pipeline-model-parallel-size above 1 (messages between stages were never recorded)": (
            parallel.pipeline_model_parallel_size > 1
        ),
        "--num-experts (tokens per expert are read on the host)": bool(sizes.experts),
        "--fp16 (its loss scale changes on the host; use --bf16)": precision.fp16,
        "--rampup-batch-size (a graph has as many micro-batches as it was recorded with)": bool(
            batches.rampup_batch_size
        ),
        "--clip-grad 0 (the norm shows bad gradients, for which a graph has no other check)": not args.clip_grad,
        "--cuda-graph-warmup-steps 0 (kernels are chosen and compiled in the first step)": (
            args.cuda_graph_warmup_steps < 1
        ),
        "--timing-log-level above 0 (timers wait for the GPU)": args.timing_log_level > 0,
        # Transformer Engine 2.20 keeps the FP8 weights that a step's first micro-batch casts. A pass without gradients
        # casts them again and drops their transposes, at whose addresses the graph goes on writing and reading.
        "--valid-data in FP8 (an evaluation frees FP8 weights that the graph has recorded; leave it out, and evaluate "
        "the checkpoints in a job of their own)": bool(precision.fp8 and data.valid_data),
        # Seen on an H100 with torch 2.11, Transformer Engine 2.20.2: benchmarks/results/gpu_parts-2026-11-26.md.
        "a trained vision encoder with Transformer Engine's attention (the first replay ended with an illegal memory "
        "access; add --vision-attention torch or --freeze-vision)": (
            "vision" not in untrained_parts(train, settings_from(args, LoraSettings))
            and settings_from(args, VisionSettings).vision_attention != "torch"
        ),
        # Megatron 0.19.2 asserts it of its other kinds of graphs ("illegal memory access"), not of this one.
        "NCCL_GRAPH_REGISTER above 0 with expandable_segments:True (NCCL would keep addresses that move; leave the "
        "first out, and training sets it to 0)": registers_moving_memory(),
    }
    if repeated := drawn_again(args):
        # Generators of graphs are objects, of which Megatron 0.19.2 and Transformer Engine 2.20 keep references, not
        # positions: the second forward pass would go on where the first has ended.
        refused[
            f"recomputation of what drops at random ({', '.join(repeated)}: other numbers would be drawn the second "
            "time; set them to 0, or recompute nothing)"
        ] = True
    if asked := [what for what, on in refused.items() if on]:
        raise ValueError(
            f"{flag} cannot go with {'; '.join(asked)}. --cuda-graph-impl none trains without a graph"
        )
    # It reads every loss on the host. `training/graph.py` checks each step as a whole instead.
    args.check_for_nan_in_loss_and_grad = False
    args.te_rng_tracker = True  # Megatron would do it, with a warning


def drawn_again(args: argparse.Namespace) -> list[str]:
    """List the probabilities above 0 of what is dropped at random within recomputed layers, by their flags."""
    granularity = settings_from(args, Recomputation).recompute_granularity
    dropout, lora = settings_from(args, Dropout), settings_from(args, LoraSettings)
    compression, vision = settings_from(args, CompressionSettings), settings_from(args, VisionSettings)
    trained = "vision" not in untrained_parts(settings_from(args, TrainSettings), lora)
    whole = granularity == "full"
    inside = {
        "--hidden-dropout": (dropout.hidden_dropout, whole),
        "--attention-dropout": (dropout.attention_dropout, granularity is not None),
        "--lora-dropout": (lora.lora_dropout, bool(lora.lora_rank) and granularity is not None),
        # Injections belong to their layers; the first projection is never recomputed.
        "--projector-drop-path": (compression.projector_drop_path, whole and compression.lvtc),
        "--vision-drop-path": (vision.vision_drop_path, vision.vision_recompute and trained),
    }
    return [f"{flag} {value:g}" for flag, (value, recomputed) in inside.items() if value > 0 and recomputed]


def registers_moving_memory() -> bool:
    """Whether NCCL is asked to register a graph's buffers in memory that the allocator maps anew."""
    registers = os.environ.get("NCCL_GRAPH_REGISTER", "0") not in ("", "0")
    return registers and any(
        "expandable_segments:true" in os.environ.get(name, "").lower() for name in ALLOCATOR_VARIABLES
    )


def attention_scores(samples: int, heads: int, rows: int) -> int:
    """Scores of a static pack by which Transformer Engine chooses the attention: as if each sample filled the pack.

    Args:
        samples: budget of a pack; the padding is one more.
        heads: query heads of this rank.
        rows: budget of deep rows, which every sample is taken to have.
    """
    return (samples + 1) * heads * rows**2


def check_deterministic_attention(args: argparse.Namespace, sizes: ModelSizes) -> None:
    """Check that static packs have a deterministic attention on this machine's GPUs. Raises ValueError.

    On Hopper without flash-attn, packs over the limit get the unfused attention, which holds all scores of a layer.
    Elsewhere, and where no GPU is seen, nothing is known to be wrong.
    """
    execution, train = settings_from(args, Execution), settings_from(args, TrainSettings)
    precision, batches = settings_from(args, Precision), settings_from(args, Batches)
    packed = settings_from(args, DataSettings).packing and train.boundary == "static"
    if not (packed and execution.deterministic_mode and precision.transformer_impl == "transformer_engine"):
        return
    heads = sizes.heads // settings_from(args, ParallelSizes).tensor_model_parallel_size
    samples, rows = train.max_samples_per_pack, batches.seq_length
    scores = attention_scores(samples, heads, rows)
    if scores < SCORES_LIMIT or cards.capability() != HOPPER or importlib.util.find_spec("flash_attn"):
        return
    most = (SCORES_LIMIT - 1) // (heads * rows**2) - 1
    remedy = f"--max-samples-per-pack {most} or less" if most > 0 else "a smaller --seq-length or more TP"
    raise ValueError(
        f"--deterministic-mode with static packs: ({samples} samples + padding) x {heads} heads x {rows}^2 = "
        f"{scores / 2**30:.1f} x 2^30 scores. From 2^30 on Transformer Engine has no deterministic fused attention for "
        f"packs on Hopper, and the unfused one holds {2 * scores / 1e9:.0f} GB per tensor and layer: set {remedy}, or "
        "install flash-attn"
    )
