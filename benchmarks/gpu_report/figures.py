"""The figures that the rows are measured for, beside their goals and what was measured before."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.gpu_report.kernels import ATTENTION, PRODUCTS
from megatron_internvlx.planning.metrics import mfu, peak_flops

Result = Mapping[str, Any]
Results = Mapping[str, Result]


def milliseconds(result: Result | None) -> float | None:
    """Median step of a row; None if it was not measured."""
    seconds = (result or {}).get("seconds")
    return statistics.median(seconds) * 1e3 if seconds else None


def busy(result: Result | None) -> float | None:
    """Share of an unrecorded step in which any kernel ran; recording slows steps, not kernels."""
    step, profile = milliseconds(result), (result or {}).get("profile")
    return profile["busy_ms"] / step if step and profile else None


def product_share(result: Result | None) -> float | None:
    """Share of the kernels' time in matrix products and attention."""
    classes = ((result or {}).get("profile") or {}).get("classes")
    if not classes:
        return None
    total = sum(spent for spent, _ in classes.values())
    return sum(classes[name][0] for name in (PRODUCTS, ATTENTION) if name in classes) / total


def useful_share(result: Result | None, fp8: bool) -> float | None:
    """MFU against the device's dense peak, in bf16 or FP8."""
    step, useful = milliseconds(result), (result or {}).get("useful_flops")
    if not step or not useful or result is None:
        return None
    return mfu(useful, step / 1e3, 1, peak_flops(result.get("device", ""), "fp8" if fp8 else "bf16"))


def ratio(results: Results, slow: str, fast: str) -> float | None:
    """Step time of one row over another's."""
    a, b = milliseconds(results.get(slow)), milliseconds(results.get(fast))
    return a / b if a and b else None


def lvtc_gain(results: Results, on: str, off: str) -> tuple[float, float] | None:
    """(measured, predicted by counted FLOPs) time without LVTC over time with it."""
    measured = ratio(results, off, on)
    without, given = (results.get(name, {}).get("flops") for name in (off, on))
    return (measured, without / given) if measured and without and given else None


def largest_difference(results: Results, name: str, reference: str) -> float | None:
    """Largest relative difference of two loss curves, over the steps that both have."""
    a, b = (results.get(n, {}).get("losses") for n in (name, reference))
    if not a or not b:
        return None
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=False))


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _gain(found: tuple[float, float] | None) -> str:
    if found is None:
        return ""
    measured, predicted = found
    part = f", {(measured - 1) / (predicted - 1):.0%} of the gain" if predicted > 1 else ""
    return f"{measured:.3f} of {predicted:.3f}{part}"


def _difference(value: float | None) -> str:
    return "" if value is None else "equal to the bit" if value == 0 else f"{value:.1e}"


def _memory(results: Results) -> str:
    found = [
        row["peak_gib"] / row["predicted_gib"]
        for row in results.values()
        if row.get("peak_gib") and row.get("predicted_gib")
    ]
    return f"{min(found):.2f} to {max(found):.2f}" if found else ""


def _replays(results: Results) -> str:
    found = [row["replay_difference"] for row in results.values() if row.get("replay_difference") is not None]
    return f"{_difference(max(found))} ({len(found)} rows)" if found else ""


# Figure, measured at commit 12e0e59 on 2026-11-26, goal, and how it follows from the rows.
FIGURES: tuple[tuple[str, str, str, Callable[[Results], str]], ...] = (
    ("2B whole, bf16, graph: MFU", "18.4 % (eager)", "45 %",
     lambda r: _share(useful_share(r.get("2b-bf16-graph"), False))),
    ("the same, eager", "18.4 %", "", lambda r: _share(useful_share(r.get("2b-bf16-eager"), False))),
    ("GPU busy share of that step, graph", "48 % (eager)", "95 %", lambda r: _share(busy(r.get("2b-bf16-graph")))),
    ("the same, eager", "48 %", "", lambda r: _share(busy(r.get("2b-bf16-eager")))),
    ("share of kernel time in matrix products and attention, graph", "56 % (eager)", "80 %",
     lambda r: _share(product_share(r.get("2b-bf16-graph")))),
    ("the same, eager", "56 %", "", lambda r: _share(product_share(r.get("2b-bf16-eager")))),
    ("eager over graph, 2B bf16, vision encoder frozen", "", "",
     lambda r: _times(ratio(r, "2b-bf16-eager-frozen", "2b-bf16-graph-frozen"))),
    ("eager over graph, 2B bf16", "", "", lambda r: _times(ratio(r, "2b-bf16-eager", "2b-bf16-graph"))),
    ("FP8 over bf16, 8B widths, graph", "0.87 (eager)", "1.25",
     lambda r: _times(ratio(r, "8b-bf16-graph", "8b-fp8-graph"))),
    ("the same, eager", "0.87", "", lambda r: _times(ratio(r, "8b-bf16-eager", "8b-fp8-eager"))),
    ("plain loop's step over ours, same samples, graph", "1.14 (eager)", "2.2",
     lambda r: _times(ratio(r, "plain-loop", "plain-ours-graph"))),
    ("the same, eager", "1.14", "", lambda r: _times(ratio(r, "plain-loop", "plain-ours-eager"))),
    ("LVTC off over on, 2B: measured of predicted", "", "90 % of the gain",
     lambda r: _gain(lvtc_gain(r, "2b-bf16-graph", "2b-bf16-graph-no-lvtc"))),
    ("LVTC off over on, 8B: measured of predicted", "", "90 % of the gain",
     lambda r: _gain(lvtc_gain(r, "8b-bf16-graph", "8b-bf16-graph-no-lvtc"))),
    ("losses of 50 steps, graph against eager", "", "rounding",
     lambda r: _difference(largest_difference(r, "curve-bf16-graph", "curve-bf16"))),
    ("the same, deterministic mode", "", "equal to the bit",
     lambda r: _difference(largest_difference(r, "curve-exact-graph", "curve-exact-eager"))),
    ("first replay of a graph against the step without it, largest of all rows", "", "rounding", _replays),
    ("peak memory over the dry run's (without its reserve), all rows", "", "", _memory),
)  # fmt: skip
