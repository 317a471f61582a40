"""The report's files: a JSON of everything, a Markdown table of it, and the picture; written anew at every result."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

from benchmarks.common import commit, packages, spread, table
from benchmarks.gpu_report import kernels
from benchmarks.gpu_report.figures import (
    FIGURES,
    busy,
    largest_difference,
    milliseconds,
    product_share,
    useful_share,
)
from benchmarks.gpu_report.picture import draw
from megatron_internvlx.files import write_atomically

MORE_PACKAGES = ("transformer-engine", "nvidia-cudnn-cu13", "nvidia-dali-cuda130", "flash-attn")
LOSS_STEPS = (1, 10, 25, 50, 100)
IMAGES_HEAD = 12  # columns of a table of images per second at most


class Report:
    """Results of rows by name, and their files `gpu_report-DATE.{json,md,png}`.

    Args:
        folder: where the files go.
        command: as it was given, for the table's head.
        name: of the files, without a suffix; None for one with today's date.
        version: short name of the commit; None asks git.
    """

    def __init__(
        self, folder: Path, command: str, name: str | None = None, version: str | None = None
    ) -> None:
        self.folder, self.name = folder, name or f"gpu_report-{date.today()}"
        self.head: dict[str, Any] = {
            "command": command,
            "commit": version or commit() or "unknown",
            "versions": packages(MORE_PACKAGES),
            "cores": os.cpu_count(),
            "started": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        }
        self.results: dict[str, dict[str, Any]] = {}

    @classmethod
    def read(cls, path: Path) -> Report:
        """A report from its JSON, to draw it or to add to it."""
        stored = json.loads(path.read_text(encoding="utf-8"))
        report = cls(path.parent, stored["command"], path.stem, stored["commit"])
        report.head = {key: stored[key] for key in report.head}
        report.results = stored["rows"]
        return report

    def finished(self, name: str) -> bool:
        """Whether a row has its result and no error."""
        row = self.results.get(name)
        return row is not None and "error" not in row and "took" in row

    def add(self, name: str, part: dict[str, Any]) -> None:
        """Merge a part of a row's result and write the JSON and the table; a row's first error stays."""
        row = self.results.setdefault(name, {})
        row.update({key: value for key, value in part.items() if key != "error" or "error" not in row})
        self.write()

    def write(self) -> Path:
        """Write JSON and table, each whole or not at all. Returns the table's path."""
        stored = {**self.head, "rows": self.results}
        write_atomically(self.folder / f"{self.name}.json", json.dumps(stored, indent=1) + "\n")
        path = self.folder / f"{self.name}.md"
        write_atomically(path, "\n".join(self.lines()) + "\n")
        return path

    def draw(self) -> str:
        """Draw the picture; returns a line that says where it is, or why there is none."""
        path = self.folder / f"{self.name}.png"
        try:
            drawn = draw(self.results, path)
        except ImportError:
            return f"no picture: matplotlib is not installed here; elsewhere: --draw {self.name}.json"
        return f"picture: {path.name}" if drawn else "no picture: no row has a profile"

    def lines(self) -> Iterator[str]:
        """The Markdown."""
        head = self.head
        cudnn = sorted({str(row["cudnn"]) for row in self.results.values() if row.get("cudnn")})
        devices = sorted({row["device"] for row in self.results.values() if row.get("device")})
        yield f"# One GPU, {self.name.removeprefix('gpu_report-')}"
        yield ""
        yield f"`{head['command']}`, commit {head['commit']}, {head['versions']}; "
        yield f"{', '.join(devices) or 'no device answered'}, cuDNN {', '.join(cudnn) or 'unknown'}, "
        yield f"{head['cores']} CPU cores; {head['started']}."
        yield ""
        yield "Times are medians of unrecorded steps; kernels were recorded in two further steps of the same process."
        yield "Busy: time in which any kernel ran, over the unrecorded step. MFU counts useful work against the dense"
        yield "peak of bf16, for FP8 rows also of FP8. An empty cell was not measured."
        for title, part in (
            ("Figures", self._figures()),
            ("Steps", self._steps()),
            ("Kernels, ms per step", self._classes()),
            ("Losses", self._curves()),
            ("Images", self._images()),
            ("Tests", self._tests()),
            ("Rows that failed or were left out", self._failures()),
        ):
            lines = list(part)
            if lines:
                yield from ("", f"## {title}", "", *lines)
        picture = self.folder / f"{self.name}.png"
        if picture.exists():
            yield from ("", f"![where the milliseconds go]({picture.name})")

    def _figures(self) -> list[str]:
        rows: list[Sequence[str]] = [["figure", "2026-11-26", "goal", "measured"]]
        rows += [[name, before, goal, value(self.results)] for name, before, goal, value in FIGURES]
        return table(rows)

    def _steps(self) -> list[str]:
        rows: list[Sequence[str]] = [
            ["row", "ms per step, median (range)", "busy", "kernels", "products, attention", "tokens/s", "TFLOP/s",
             "MFU", "of FP8's peak", "peak GiB", "held GiB", "dry run GiB", "first six, s", "compiled late"]
        ]  # fmt: skip
        for name, row in self.results.items():
            step = milliseconds(row)
            if step is None:
                continue
            profile, fp8 = row.get("profile") or {}, "fp8" in name
            cells = [
                name, spread(row["seconds"]), _percent(busy(row)), _number(profile.get("kernels"), ",.0f"),
                _percent(product_share(row)), f"{row['tokens'] / step * 1e3:,.0f}",
                _number(row.get("useful_flops"), ".0f", 1e9 * step), _percent(useful_share(row, False)),
                _percent(useful_share(row, True)) if fp8 else "", _number(row.get("peak_gib"), ".1f"),
                _number(row.get("reserved_gib"), ".1f"), _number(row.get("predicted_gib"), ".1f"),
                f"{sum(row['warmup_seconds']):.1f}", str(row.get("recompiled", "")),
            ]  # fmt: skip
            rows.append(cells)
        return table(rows) if len(rows) > 1 else []

    def _classes(self) -> list[str]:
        profiles = {name: row["profile"] for name, row in self.results.items() if row.get("profile")}
        if not profiles:
            return []
        used = [kind for kind in kernels.ORDER if any(kind in p["classes"] for p in profiles.values())]
        rows: list[Sequence[str]] = [["row", *used, kernels.IDLE]]
        for name, profile in profiles.items():
            spent = [profile["classes"].get(kind) for kind in used]
            cells = ["" if s is None else f"{s[0]:.1f} ({s[1]:.0f})" for s in spent]
            step = milliseconds(self.results[name])
            idle = "" if step is None else f"{max(step - profile['busy_ms'], 0):.1f}"
            rows.append([name, *cells, idle])
        return ["In brackets: kernels per step.", "", *table(rows)]

    def _curves(self) -> list[str]:
        curves = {name: row["losses"] for name, row in self.results.items() if row.get("losses")}
        if not curves:
            return []
        reference = {"curve-exact-graph": "curve-exact-eager"}
        rows: list[Sequence[str]] = [
            ["row", *(f"step {n}" for n in LOSS_STEPS), "from", "largest", "mean of the last 20"]
        ]
        for name, losses in curves.items():
            cells = [f"{losses[n - 1]:.4f}" if n <= len(losses) else "" for n in LOSS_STEPS]
            other = reference.get(name, "curve-bf16")
            away = largest_difference(self.results, name, other)
            if name == other or away is None:
                rows.append([name, *cells, "", "", ""])
                continue
            last = list(zip(losses, curves[other], strict=False))[-20:]
            mean = statistics.mean(abs(a - b) / abs(b) for a, b in last)
            rows.append([name, *cells, other.removeprefix("curve-"), f"{away:.2e}", f"{mean:.2e}"])
        return table(rows)

    def _images(self) -> list[str]:
        images = (self.results.get("images") or {}).get("images")
        if not images:
            return []
        keys = list(dict.fromkeys(key for row in images for key in row))[:IMAGES_HEAD]
        cells = [[_number(row.get(key), ",.1f") for key in keys] for row in images]
        return table([keys, *cells])

    def _tests(self) -> list[str]:
        found = {name: row for name, row in self.results.items() if "tests" in row}
        # Of a row that was ended too: it has these as they came.
        parts = [
            f"- `{name}`: {part} ({row.get('versions', '')}): {_one_line(answer)}"
            for name, row in self.results.items()
            for part, answer in row.get("parts", {}).items()
        ]
        if not found:
            return parts
        rows: list[Sequence[str]] = [["file", "passed", "failed", "skipped", "s"]]
        for name, row in found.items():
            passed = row["tests"] - len(row["failed"]) - row["skipped"]
            rows.append(
                [name, str(passed), str(len(row["failed"])), str(row["skipped"]), str(row.get("took", ""))]
            )
        failures = [
            f"- `{name}`: {case}: {_one_line(message)}"
            for name, row in found.items()
            for case, message in row["failed"].items()
        ]
        return [*table(rows), *([""] if failures or parts else []), *failures, *parts]

    def _failures(self) -> list[str]:
        return [
            f"- `{name}`: {_one_line(row['error'])}" for name, row in self.results.items() if row.get("error")
        ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: Any, form: str, by: float = 1.0) -> str:
    if value is None or value == "":
        return ""
    return f"{value / by:{form}}" if isinstance(value, int | float) else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
