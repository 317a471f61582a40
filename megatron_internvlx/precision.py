"""Named precisions: Megatron's own arguments for each, what FP8 asks of the sizes, and FP8 per part.

| name          | GPUs              | scales                                             | forward, backward |
|---------------|-------------------|----------------------------------------------------|-------------------|
| bf16          | all               | -                                                  | bf16              |
| fp8_tensorwise| Hopper, Blackwell | one per tensor, from the tensor at hand            | E4M3, E5M2        |
| fp8_delayed   | Hopper, Blackwell | one per tensor, from a history of maxima           | E4M3, E5M2        |
| fp8_blockwise | Hopper            | one per 1x128 (activations) or 128x128 (weights)   | E4M3, E4M3        |
| mxfp8         | Blackwell         | one per 32 elements, a power of two                | E4M3, E4M3        |

The decoder runs in FP8 with any of the FP8 recipes, the vision encoder and the projectors if
`--fp8-parts` names them. Embedding, norms, attention products, router, output layer and loss never do.
The decoder's first and last layers stay in bf16 with Megatron's `--first-last-layers-bf16`.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

_BF16: dict[str, Any] = {"bf16": True, "fp8": None}
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": _BF16,
    "fp8_tensorwise": _BF16 | {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    # History and rule of Transformer Engine's own default; Megatron's default of one step is no history.
    "fp8_delayed": _BF16
    | {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    },
    "fp8_blockwise": _BF16 | {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "mxfp8": _BF16 | {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
}
PARTS = ("vision", "projectors", "decoder")


def precision_defaults(name: str | None) -> dict[str, Any]:
    """The argparse defaults of a named precision; {} without a name. Raises ValueError for an unknown one."""
    if name is None:
        return {}
    if name not in PRECISIONS:
        raise ValueError(f"--precision {name}: unknown; one of {', '.join(PRECISIONS)}")
    return dict(PRECISIONS[name])


def row_multiple(args: argparse.Namespace) -> int:
    """Rows of every FP8 matrix product are a multiple of this: 1 without FP8, 32 for MXFP8, else 16."""
    if not args.fp8:
        return 1
    return 32 if args.fp8_recipe == "mxfp8" else 16


def row_alignment(args: argparse.Namespace) -> int:
    """Both phases hold a multiple of this many rows: what FP8 and sequence parallelism need.

    FP8 matrix products need multiples of 16, MXFP8 blocks 32, on every rank of the split.
    """
    return row_multiple(args) * (args.tensor_model_parallel_size if args.sequence_parallel else 1)


def check_precision(
    args: argparse.Namespace, parts: list[str], *, tokens_per_tile: int, cells: tuple[int, ...]
) -> None:
    """Check that FP8 can run with these sizes. Raises ValueError with the numbers and the remedy.

    Args:
        args: parsed arguments.
        parts: value of --fp8-parts.
        tokens_per_tile: of the vision encoder, CLS included.
        cells: visual rows per tile of each projector.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"--fp8-parts {' '.join(unknown)}: unknown; of {', '.join(PARTS)}")
    if not args.fp8:
        return
    if "decoder" not in parts:
        raise ValueError("--fp8-parts without decoder: use --precision bf16, the rest gains little by FP8")
    if args.transformer_impl != "transformer_engine":
        raise ValueError(
            "FP8 needs --transformer-impl transformer_engine, it is "
            f"{args.transformer_impl}: without a GPU use --precision bf16"
        )
    if args.first_last_layers_bf16 and args.fp8_recipe == "delayed":
        raise ValueError(
            "--first-last-layers-bf16: delayed scaling cannot leave single layers out; use fp8_tensorwise"
        )
    if args.fp8_param_gather and "projectors" not in parts:
        raise ValueError(
            "--fp8-param-gather keeps the injections' weights in FP8: name projectors in --fp8-parts, or "
            "leave it off"
        )
    _check_widths(args)
    multiple = row_multiple(args)
    wrong = [n for n in (*cells, tokens_per_tile - 1) if n % multiple]
    if "projectors" in parts and wrong:
        raise ValueError(
            f"--fp8-parts projectors: {wrong[0]} rows per tile are not a multiple of {multiple}; leave it out"
        )
    if "vision" in parts:
        _check_vision(args, tokens_per_tile)


def _check_widths(args: argparse.Namespace) -> None:
    """Every rank's share of a weight must divide as well, along both dimensions."""
    multiple, tensor = row_multiple(args), args.tensor_model_parallel_size
    heads, hidden = args.num_attention_heads, args.hidden_size
    head_dim = args.kv_channels or hidden // heads
    groups = args.num_query_groups if args.group_query_attention else heads
    widths = {
        "--hidden-size": (hidden, 1),
        "query, key and value width": ((heads + 2 * groups) * head_dim, tensor),
        "attention output width": (heads * head_dim, tensor),
        "--ffn-hidden-size": (args.ffn_hidden_size or 0, tensor),
        "--moe-ffn-hidden-size": ((args.num_experts and args.moe_ffn_hidden_size) or 0, 1),
    }
    for name, (width, ranks) in widths.items():
        if width % (multiple * ranks):
            raise ValueError(
                f"{name} {width} is not a multiple of {multiple * ranks}: {args.fp8_recipe} FP8 needs {multiple} "
                f"on each of {ranks} tensor-parallel ranks; use another tensor-parallel size, or bf16"
            )


def _check_vision(args: argparse.Namespace, tokens: int) -> None:
    """The encoder's rows are tiles times tokens, which only a fixed number of tiles can align."""
    multiple, tensor = row_multiple(args), args.tensor_model_parallel_size
    budget = args.max_tiles_per_pack
    remedy = f"--max-tiles-per-pack a multiple of {multiple * tensor}"
    if args.boundary != "static" or budget is None:
        raise ValueError(
            f"--fp8-parts vision: a tile has {tokens} tokens, so only a fixed number of tiles makes "
            f"multiples of {multiple} rows: use --boundary static and {remedy}"
        )
    rows = -(-budget // tensor) * tokens
    if rows % multiple:
        raise ValueError(
            f"--fp8-parts vision: --max-tiles-per-pack {budget} makes {rows} rows on each of {tensor} "
            f"tensor-parallel ranks, not a multiple of {multiple}: use {remedy}"
        )


def projector_precision(config: TransformerConfig) -> AbstractContextManager:
    """The precision of a projector's matrix products over patches and tokens.

    With `config.fp8` unset they stay in bf16 even inside a decoder layer that runs in FP8.
    """
    if config.transformer_impl == "local":
        return nullcontext()
    if config.fp8:
        from megatron.core.fp8_utils import get_fp8_context

        return get_fp8_context(config)
    return high_precision(config)


def high_precision(config: TransformerConfig) -> AbstractContextManager:
    """bf16, whatever surrounds it; for products with too few rows for FP8."""
    if config.transformer_impl == "local":
        return nullcontext()
    from transformer_engine.pytorch import fp8_autocast

    return fp8_autocast(enabled=False)
