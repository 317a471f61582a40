"""Report of a scaling experiment: a table and three plots of its runs in MLflow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Series = dict[str, list[tuple[int, float]]]
"""Metric -> (step, value), by step."""

_METRICS = (
    "loss",
    "validation_loss",
    "validation_accuracy",
    "tokens_per_s",
    "step_seconds",
    "teraflop_per_step",
)
INK, FAINT, RULE = "#212529", "#6c757d", "#dee2e6"
_COLOURS = ("#1f5fa8", "#c2570c", "#1a7f37", "#8250df", "#b42318", "#0e7490", "#a16207", "#475569")


@dataclass(frozen=True)
class Result:
    """A point of a grid with the metrics of its run."""

    name: str
    labels: dict[str, str]
    figures: dict[str, Any]
    """Results of the dry run."""
    series: Series

    def last(self, metric: str, share: float = 0.1) -> float | None:
        """Mean of the last `share` of a metric's values; None if it was not logged."""
        values = [value for _, value in self.series.get(metric, [])]
        tail = values[-max(1, round(len(values) * share)) :]
        return sum(tail) / len(tail) if tail else None

    def median(self, metric: str) -> float | None:
        """Median of a metric, so that the slow first steps have no influence; None if it was not logged."""
        values = sorted(value for _, value in self.series.get(metric, []))
        return values[len(values) // 2] if values else None

    def compute(self) -> list[tuple[float, float]]:
        """Points (cumulative PFLOP, loss) of the run."""
        work = dict(self.series.get("teraflop_per_step", []))
        total, before, points = 0.0, 0, []
        for step, loss in self.series.get("loss", []):
            total += work.get(step, 0.0) * (step - before) / 1000
            before = step
            points.append((total, loss))
        return points


def read_runs(uri: str, experiment: str) -> dict[str, Series]:
    """Read the metrics of an experiment's runs, by run name; the latest run with a name is used."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ValueError(f"{uri} has no experiment {experiment!r}: run `ivlx scaling submit` first")
    runs: dict[str, Series] = {}
    for run in client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"]):
        series = {}
        for metric in _METRICS:
            # A step that was repeated after a restart is used once.
            values = {m.step: m.value for m in client.get_metric_history(run.info.run_id, metric)}
            series[metric] = sorted(values.items())
        runs[run.info.run_name] = series
    return runs


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write_report(out: Path, name: str, results: Sequence[Result]) -> Path:
    """Write report.md and its pictures to a directory; returns the report's path."""
    if not results:
        raise ValueError("no run of this grid has results yet: run `ivlx scaling submit` first")
    rows = [
        ["point", "parameters", "tokens/tile", "GPUs", "PFLOP", "loss", "validation loss", "accuracy",
         "tokens/s", "ms/step"]
    ]  # fmt: skip
    for result in results:
        compute = result.compute()
        seconds = result.median("step_seconds")
        rows.append(
            [
                result.name,
                f"{result.figures['parameters']:,}",
                str(result.figures["tokens_per_tile"]),
                str(result.figures["world_size"]),
                f"{compute[-1][0]:.3g}" if compute else "-",
                _format_value(result.last("loss"), ".3f"),
                _format_value(result.last("validation_loss", 0), ".3f"),
                _format_value(result.last("validation_accuracy", 0), ".1%"),
                _format_value(result.median("tokens_per_s"), ",.0f"),
                _format_value(None if seconds is None else seconds * 1000, ".0f"),
            ]
        )
    out.mkdir(parents=True, exist_ok=True)
    pictures = {
        "loss_against_compute.png": _draw_compute,
        "throughput_against_gpus.png": _draw_throughput,
        "quality_against_visual_tokens.png": _draw_quality,
    }
    for file, draw in pictures.items():
        draw(out / file, results)
    images = "\n".join(f"![{file.removesuffix('.png').replace('_', ' ')}]({file})" for file in pictures)
    path = out / "report.md"
    path.write_text(f"# Scaling: {name}\n\n{table(rows)}\n\n{images}\n")
    return path


def _format_value(value: float | None, digits: str) -> str:
    return "-" if value is None else f"{value:{digits}}"


def _make_axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    # Not pyplot: it would select a backend for the whole process and keep figures in memory.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, color=INK, loc="left", fontsize=12)
    axes.set_xlabel(x, color=FAINT)
    axes.set_ylabel(y, color=FAINT)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _draw_compute(path: Path, results: Sequence[Result]) -> None:
    figure, axes = _make_axes("Loss against compute", "PFLOP of forward and backward", "training loss")
    for number, result in enumerate(results):
        points = [(x, y) for x, y in result.compute() if x > 0]
        if points:
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, label=result.name)
    axes.set_xscale("log")
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _draw_throughput(path: Path, results: Sequence[Result]) -> None:
    figure, axes = _make_axes("Throughput against GPUs", "GPUs", "tokens/s")
    for number, (label, members) in enumerate(_group_by_other_axes(results, "layout").items()):
        points = sorted((r.figures["world_size"], r.median("tokens_per_s") or 0.0) for r in members)
        axes.plot(
            *zip(*points, strict=True),
            "o-",
            color=_COLOURS[number % len(_COLOURS)],
            label=label,
            linewidth=1.4,
        )
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({r.figures["world_size"] for r in results}))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _draw_quality(path: Path, results: Sequence[Result]) -> None:
    measured = all(result.last("validation_accuracy", 0) is not None for result in results)
    title = "Quality and step time against visual tokens"
    figure, axes = _make_axes(
        title, "visual tokens per tile", "held-out accuracy (%)" if measured else "training loss"
    )
    twin = axes.twinx()
    twin.set_ylabel("ms per step (dashed)", color=FAINT)
    twin.spines["top"].set_visible(False)
    for number, (label, members) in enumerate(_group_by_other_axes(results, "tokens").items()):
        members = sorted(members, key=lambda r: r.figures["tokens_per_tile"])
        tokens = [r.figures["tokens_per_tile"] for r in members]
        accuracy = [100 * (r.last("validation_accuracy", 0) or 0.0) for r in members]
        quality = accuracy if measured else [r.last("loss") for r in members]
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(tokens, quality, "o-", color=colour, label=label, linewidth=1.6)
        times = [1000 * (r.median("step_seconds") or 0.0) for r in members]
        twin.plot(tokens, times, "s--", color=colour, linewidth=1, markersize=4)
    twin.set_ylim(bottom=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := sorted({r.figures["tokens_per_tile"] for r in results}), [str(t) for t in ticks])
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _group_by_other_axes(results: Sequence[Result], along: str) -> dict[str, list[Result]]:
    """Group results that differ only on one axis, by their other labels."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        rest = ", ".join(f"{axis} {label}" for axis, label in result.labels.items() if axis != along)
        groups.setdefault(rest or "all", []).append(result)
    return groups
