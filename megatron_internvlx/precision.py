"""Named precisions: Megatron's arguments for each, the sizes that FP8 needs, and FP8 per part.

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

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_internvlx.config import Arguments, TrainSettings, settings_from

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
    """Argparse defaults of a named precision; {} without a name. Raises ValueError for an unknown one."""
    if name is None:
        return {}
    if name not in PRECISIONS:
        raise ValueError(f"--precision {name}: unknown; one of {', '.join(PRECISIONS)}")
    return dict(PRECISIONS[name])


@dataclass(frozen=True)
class Precision:
    """Megatron's arguments for number formats, and for the ranks that share the rows and widths of a matrix product."""

    bf16: bool
    fp16: bool
    fp8: str | None
    """Formats of the forward and the backward pass, such as hybrid; None for no FP8."""
    fp8_recipe: str
    fp8_param_gather: bool
    """Keep the decoder's weights in FP8 only."""
    first_last_layers_bf16: bool
    transformer_impl: str
    """transformer_engine or local."""
    tensor_model_parallel_size: int
    sequence_parallel: bool

    @property
    def row_multiple(self) -> int:
        """Number of which the rows of a matrix product must be a multiple: 1 without FP8, 32 for MXFP8, else 16."""
        if not self.fp8:
            return 1
        return 32 if self.fp8_recipe == "mxfp8" else 16

    @property
    def row_alignment(self) -> int:
        """Number of which the rows of both phases must be a multiple, so that each rank's share suits FP8."""
        return self.row_multiple * (self.tensor_model_parallel_size if self.sequence_parallel else 1)

    @property
    def description(self) -> str:
        """Format of most matrix products, for reports: fp8 tensorwise, bfloat16, float16 or float32."""
        if self.fp8:
            return f"fp8 {self.fp8_recipe}"
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"


@dataclass(frozen=True)
class DecoderWidths:
    """Megatron's arguments for the widths of the decoder's matrix products, before it fills in what is not given."""

    hidden_size: int
    num_attention_heads: int
    kv_channels: int | None
    """Width of a head; None: hidden_size / num_attention_heads."""
    group_query_attention: bool
    num_query_groups: int
    ffn_hidden_size: int | None
    num_experts: int | None
    moe_ffn_hidden_size: int | None


def row_alignment(arguments: Arguments) -> int:
    """Number of which the rows of both phases must be a multiple, for FP8 and sequence parallelism."""
    return settings_from(arguments, Precision).row_alignment


def check_precision(
    precision: Precision,
    widths: DecoderWidths,
    train: TrainSettings,
    *,
    tokens_per_tile: int,
    cells: tuple[int, ...],
) -> None:
    """Check that FP8 can run with these sizes. Raises ValueError with the numbers and the remedy.

    Args:
        precision: number formats and tensor parallelism.
        widths: of the decoder.
        train: settings that name the parts in FP8 and hold the static budgets.
        tokens_per_tile: tokens of a tile in the vision encoder, CLS included.
        cells: visual rows per tile of each projector.
    """
    parts = train.fp8_parts or ["decoder"]
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"--fp8-parts {' '.join(unknown)}: unknown; of {', '.join(PARTS)}")
    if not precision.fp8:
        return
    if "decoder" not in parts:
        raise ValueError("--fp8-parts without decoder: use --precision bf16, the rest gains little by FP8")
    if precision.transformer_impl != "transformer_engine":
        raise ValueError(
            "FP8 needs --transformer-impl transformer_engine, it is "
            f"{precision.transformer_impl}: without a GPU use --precision bf16"
        )
    if precision.first_last_layers_bf16 and precision.fp8_recipe == "delayed":
        raise ValueError(
            "--first-last-layers-bf16: delayed scaling cannot leave single layers out; use fp8_tensorwise"
        )
    if precision.fp8_param_gather and "projectors" not in parts:
        raise ValueError(
            "--fp8-param-gather keeps the injections' weights in FP8: name projectors in --fp8-parts, or "
            "leave it off"
        )
    _check_widths(precision, widths)
    multiple = precision.row_multiple
    wrong = [n for n in (*cells, tokens_per_tile - 1) if n % multiple]
    if "projectors" in parts and wrong:
        raise ValueError(
            f"--fp8-parts projectors: {wrong[0]} rows per tile are not a multiple of {multiple}; leave it out"
        )
    if "vision" in parts:
        _check_vision(precision, train, tokens_per_tile)


def _check_widths(precision: Precision, widths: DecoderWidths) -> None:
    """Check that every rank's share of a weight can be divided as well, along both dimensions."""
    multiple, tensor = precision.row_multiple, precision.tensor_model_parallel_size
    heads, hidden = widths.num_attention_heads, widths.hidden_size
    head_dim = widths.kv_channels or hidden // heads
    groups = widths.num_query_groups if widths.group_query_attention else heads
    found = {
        "--hidden-size": (hidden, 1),
        "query, key and value width": ((heads + 2 * groups) * head_dim, tensor),
        "attention output width": (heads * head_dim, tensor),
        "--ffn-hidden-size": (widths.ffn_hidden_size or 0, tensor),
        "--moe-ffn-hidden-size": ((widths.num_experts and widths.moe_ffn_hidden_size) or 0, 1),
    }
    for name, (width, ranks) in found.items():
        if width % (multiple * ranks):
            raise ValueError(
                f"{name} {width} is not a multiple of {multiple * ranks}: {precision.fp8_recipe} FP8 needs {multiple} "
                f"on each of {ranks} tensor-parallel ranks; use another tensor-parallel size, or bf16"
            )


def _check_vision(precision: Precision, train: TrainSettings, tokens: int) -> None:
    """Check the encoder's rows: tiles times tokens, which only a fixed number of tiles can align."""
    multiple, tensor = precision.row_multiple, precision.tensor_model_parallel_size
    budget = train.max_tiles_per_pack
    remedy = f"--max-tiles-per-pack a multiple of {multiple * tensor}"
    if train.boundary != "static" or budget is None:
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
    """Context in which a projector multiplies its matrices of patches and tokens: in FP8 if `config.fp8` is set.

    Without it they stay in bf16, even inside a decoder layer that runs in FP8.
    """
    if config.transformer_impl == "local":
        return nullcontext()
    if config.fp8:
        from megatron.core.fp8_utils import get_fp8_context

        return get_fp8_context(config)
    return high_precision(config)


def high_precision(config: TransformerConfig) -> AbstractContextManager:
    """Context of bf16 inside any other; for matrix products with too few rows for FP8."""
    if config.transformer_impl == "local":
        return nullcontext()
    from transformer_engine.pytorch import fp8_autocast

    return fp8_autocast(enabled=False)
