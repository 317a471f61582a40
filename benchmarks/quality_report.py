"""Table and plot of the quality study: accuracy of every kind of question over visual tokens and step time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import table

Combination = tuple[str, str, str]
"""Projector, LVTC's expansion, rule of RVTC."""
Run = dict[str, Any]

EXPANSIONS: dict[str, int | None] = {"off": None, "L/4": 1, "L/2": 2, "3L/4": 3}
"""Name of an expansion, and the quarters of the decoder's layers before it."""
RULES = ("off", "edge", "area")
FINE = ("digit", "word", "count", "shape", "position")
"""Kinds that need detail."""
COARSE = ("background", "colour", "half", "two_images")
"""Kinds that do not. Questions without a picture belong to neither: no compressor touches them."""
# What the paper states; its models are thousands of times larger, so only the direction compares.
PAPER = (
    "The paper states for RVTC 49.62 % and 58.51 % of the training time at 97.77 % and 99.04 % of the quality, and "
    "gains of 2.25 % by PVTC and 2.32 % by LVTC."
)


def of(run: Run) -> Combination:
    """The combination of a run."""
    return run["projector"], run["expansion"], run["rvtc"]


def share(run: Run, kinds: Sequence[str]) -> float:
    """Right answers of these kinds in percent, each kind with the same weight."""
    found = [run["kinds"][kind] for kind in kinds if kind in run["kinds"]]
    return 100 * statistics.mean(right / asked for right, asked in found) if found else 0.0


def share_of_all(run: Run) -> float:
    """Right answers about pictures in percent, each question with the same weight."""
    counted = [numbers for kind, numbers in run["kinds"].items() if kind in (*FINE, *COARSE)]
    right, asked = (sum(numbers) for numbers in zip(*counted, strict=True))
    return 100 * right / asked


def report_lines(
    runs: list[Run],
    ms: Mapping[Combination, float],
    tokens: Mapping[Combination, tuple[float, float]],
    same: Mapping[str, str],
) -> list[str]:
    """Markdown: what was run, a table per combination, and the effect of each compressor by itself.

    Args:
        runs: of all combinations, those of rules that cut alike included.
        ms: milliseconds per step.
        tokens: tiles per image, and visual tokens per image in the mean of the layers.
        same: each rule and the first one that cuts alike.
    """
    alike = [f"`{rule}` cuts every image as `{other}` does" for rule, other in same.items() if rule != other]
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    head = f"the runs are of the commits {commits}. "
    head += "".join(f"{text}: the same tiles, so the same runs. " for text in alike)
    effects = table(effect_rows(runs, ms))
    return [head, "", *table(combination_rows(runs, ms, tokens)), "", *effects, "", PAPER]


def combination_rows(
    runs: list[Run], ms: Mapping[Combination, float], tokens: Mapping[Combination, tuple[float, float]]
) -> list[list[str]]:
    """Rows per combination: compression, accuracy of all questions and of every kind, step time."""
    kinds = [kind for kind in (*FINE, *COARSE) if any(kind in run["kinds"] for run in runs)]
    rows = [
        [
            "projector",
            "LVTC k",
            "RVTC",
            "tiles",
            "visual tokens",
            "seeds",
            "right %, mean (range)",
            *kinds,
            "ms",
        ]
    ]
    for key in ms:
        mine = [run for run in runs if of(run) == key]
        if not mine:
            continue
        right = [share_of_all(run) for run in mine]
        rows.append(
            [
                *key,
                *(f"{number:.2f}" for number in tokens[key]),
                str(len(mine)),
                f"{statistics.mean(right):.1f} ({min(right):.1f}-{max(right):.1f})",
                *(f"{statistics.mean(share(run, [kind]) for run in mine):.0f}" for kind in kinds),
                f"{ms[key]:.0f}",
            ]
        )
    return rows


def effect_rows(runs: list[Run], ms: Mapping[Combination, float]) -> list[list[str]]:
    """Rows per compressor: the same runs with it and without it, over all settings of the others."""
    changes = [("PVTC for MLP", 0, "mlp", "pvtc")]
    changes += [(f"LVTC {name}", 1, "off", name) for name in EXPANSIONS if name != "off"]
    changes += [(f"RVTC {rule}", 2, "off", rule) for rule in RULES if rule != "off"]
    rows = [["change", "pairs", "fine kinds, points", "coarse kinds, points", "quality kept", "step time"]]
    by_key = {(*of(run), run["seed"]): run for run in runs}
    for name, at, without, with_ in changes:
        pairs = [
            (by_key[key], by_key[other])
            for key in by_key
            if key[at] == without and (other := (*key[:at], with_, *key[at + 1 :])) in by_key
        ]
        if pairs:
            gains = [
                statistics.mean(share(b, kinds) - share(a, kinds) for a, b in pairs)
                for kinds in (FINE, COARSE)
            ]
            kept = statistics.mean(share_of_all(b) / share_of_all(a) for a, b in pairs)
            time = statistics.mean(ms[of(b)] / ms[of(a)] for a, b in pairs)
            shares = (f"{100 * kept:.1f} %", f"{100 * time:.0f} %")
            rows.append([name, str(len(pairs)), *(f"{gain:+.1f}" for gain in gains), *shares])
    return rows


def plot(
    runs: list[Run],
    ms: Mapping[Combination, float],
    tokens: Mapping[Combination, tuple[float, float]],
    same: Mapping[str, str],
    path: Path,
) -> None:
    """Accuracy of every kind over visual tokens and over step time, fine kinds on the left, one scale for all.

    Colour: projector; marker: LVTC; size and filling: RVTC. Rules that cut alike are one point.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [key for key in ms if same[key[2]] == key[2] and any(of(run) == key for run in runs)]
    rows = max(len(FINE), len(COARSE))
    figure, axes = pyplot.subplots(rows, 4, figsize=(15, 2.6 * rows), sharey=True, sharex="col")
    for first, kinds in ((0, FINE), (2, COARSE)):
        for row in range(rows):
            pair = axes[row][first : first + 2]
            if row >= len(kinds):
                for axis in pair:
                    axis.set_visible(False)
                continue
            for key in shown:
                right = [share(run, [kinds[row]]) for run in runs if of(run) == key]
                for axis, x in zip(pair, (tokens[key][1], ms[key]), strict=True):
                    _point(axis, x, right, key)
            pair[0].set_ylabel(f"{kinds[row]}: right, %")
        for axis, text in zip(
            axes[len(kinds) - 1][first : first + 2],
            ("visual tokens per image, mean of the layers", "ms per step"),
            strict=True,
        ):
            axis.set_xlabel(text)
            axis.tick_params(labelbottom=True)
    figure.suptitle(
        "Left: kinds that need detail; right: kinds that do not. "
        "Open: RVTC off; large: edge; middle: area; bars: deviation over seeds",
        fontsize=11,
    )
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=9, loc="lower right", ncols=2)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _point(axis: Any, x: float, right: Sequence[float], key: Combination) -> None:
    """One combination: mean and deviation of its seeds."""
    axis.errorbar(
        x,
        statistics.mean(right),
        yerr=statistics.pstdev(right),
        fmt=dict(zip(EXPANSIONS, "os^D", strict=True))[key[1]],
        markersize={"off": 5, "edge": 10, "area": 7}[key[2]],
        fillstyle="none" if key[2] == "off" else "full",
        alpha=0.7,
        color={"mlp": "tab:gray", "pvtc": "tab:blue"}[key[0]],
        label=f"{key[0]}, k {key[1]}" if key[2] == "off" else None,
    )
