"""Where the milliseconds of a step go, as one bar per row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import kernels
from benchmarks.gpu_report.figures import milliseconds


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Write the picture; False if no row has a profile. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {name: row for name, row in results.items() if row.get("profile") and milliseconds(row)}
    if not rows:
        return False
    used = [k for k in kernels.ORDER if any(k in row["profile"]["classes"] for row in rows.values())]
    colours = pyplot.get_cmap("tab20")
    figure, axes = pyplot.subplots(figsize=(12, 1.8 + 0.5 * len(rows)))
    names = list(rows)
    left = [0.0] * len(names)
    for number, name in enumerate([*used, kernels.IDLE]):
        widths = [_width(rows[row], name) for row in names]
        colour = "0.85" if name == kernels.IDLE else colours(number % 20)
        axes.barh(names, widths, left=left, color=colour, label=name, edgecolor="white", linewidth=0.4)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms per step")
    axes.set_title("Where the milliseconds go")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _width(row: Mapping[str, Any], name: str) -> float:
    """Milliseconds of a class; overlapping kernels are scaled to the time in which any of them ran."""
    profile = row["profile"]
    if name == kernels.IDLE:
        step = milliseconds(row)
        return max((step or 0.0) - profile["busy_ms"], 0.0)
    total = sum(spent for spent, _ in profile["classes"].values())
    return profile["classes"].get(name, [0.0, 0])[0] * profile["busy_ms"] / total if total else 0.0
