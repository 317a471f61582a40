"""Text of the training and validation lines, and the values for trackers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_internvlx.platform import LogRecord
from megatron_internvlx.reporting.interval import IntervalTotals
from megatron_internvlx.reporting.time_left import Left
from megatron_internvlx.training.validation import ValidationCounts


def training_line(record: LogRecord, totals: IntervalTotals, left: Left | None = None) -> str:
    """Format the line of a log interval; unknown values are shown as `-`."""
    digits = 3 if totals.tflops < 10 else 0
    parts = [
        f"step {record.iteration:>{len(str(record.train_iters))}}/{record.train_iters}",
        f"loss {_number(record.losses.get('loss'), '.4f')}",
        f"grad norm {_number(record.grad_norm, '.3f')}",
        f"lr {_number(record.learning_rate, '.2e')}",
        f"{totals.tokens_per_s:,.0f} tokens/s",
        f"{totals.seconds * 1000:.0f} ms/step",
        f"left {left or '-'}",
        f"{totals.tflops:.{digits}f} TFLOP/s",
        f"MFU {_number(totals.mfu, '.1%')}",
        f"padding {totals.padding:.1%}",
        f"data wait {totals.wait:.1%}",
        f"memory {totals.memory:.2f} GiB",
    ]
    if totals.packs_ready is not None:
        parts.append(f"{totals.images_per_s:,.0f} images/s, {totals.packs_ready:.0f} packs ready")
    if totals.fallbacks:
        parts.append(f"images cut by Pillow {sum(totals.fallbacks.values())} ({_causes(totals.fallbacks)})")
    if totals.blank_images:
        parts.append(f"black images {totals.blank_images}")
    if totals.rejects:
        parts.append(f"unusable samples {sum(totals.rejects.values())} ({_causes(totals.rejects)})")
    parts += _cut(totals.cut_tiles, totals.cut_tokens)
    if record.skipped or record.nan:
        parts.append(f"skipped {record.skipped} nan {record.nan}")
    return " | ".join(parts)


def validation_line(iteration: int, values: Mapping[str, float], counts: ValidationCounts) -> str:
    """Format the line of a complete evaluation."""
    parts = [
        f"validation at step {iteration}",
        f"loss {_number(values.get('loss'), '.4f')}",
        f"answers right {_number(values.get('accuracy'), '.1%')}",
        f"{counts.records} records",
    ]
    if counts.rejects:
        parts.append(f"unusable {sum(counts.rejects.values())} ({_causes(counts.rejects)})")
    return " | ".join(parts + _cut(counts.cut_tiles, counts.cut_tokens))


def tracked_values(
    record: LogRecord, totals: IntervalTotals, world_size: int, left: Left | None = None
) -> dict[str, float | None]:
    """Metrics of a log interval for trackers such as MLflow; None for unknown ones."""
    return {
        "loss": record.losses.get("loss"),
        "learning_rate": record.learning_rate,
        "grad_norm": record.grad_norm,
        "step_seconds": totals.seconds,
        "seconds_left": left.seconds if left else None,
        "tokens_per_s": totals.tokens_per_s,
        "tflops": totals.tflops,
        "mfu": totals.mfu,
        "padding": totals.padding,
        "data_wait": totals.wait,
        "memory": totals.memory,
        "rejects": float(sum(totals.rejects.values())),
        "skipped_steps": float(record.skipped),
        "consumed_samples": float(record.consumed_samples),
        "teraflop_per_step": totals.tflops * totals.seconds * world_size,
        "images_per_s": totals.images_per_s,
        "images_cut_by_pillow": float(sum(totals.fallbacks.values())),
        "black_images": float(totals.blank_images),
        "packs_ready": totals.packs_ready,
        **{f"rejects_{cause}": float(count) for cause, count in totals.rejects.items()},
    }


def _number(value: float | None, digits: str) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:{digits}}"


def _causes(rejects: Mapping[str, int]) -> str:
    """Counts per cause, the most frequent first."""
    counts = sorted(rejects.items(), key=lambda item: -item[1])
    return ", ".join(f"{cause} {count}" for cause, count in counts)


def _cut(tiles: float, tokens: float) -> list[str]:
    """Format the amount removed from samples to fit `--seq-length` and the budgets; [] if nothing was."""
    return [f"cut to fit {tiles:.0f} tiles, {tokens:.0f} tokens"] if tiles or tokens else []
