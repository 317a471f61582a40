"""Picture of a run: loss, accuracy, and six held-out images with the model's answers."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_EXAMPLES = 6
INK, FAINT, RULE = "#212529", "#6c757d", "#dee2e6"
LOSS_COLOUR, ACCURACY_COLOUR = "#1f5fa8", "#c2570c"
RIGHT_COLOUR, WRONG_COLOUR = "#1a7f37", "#b42318"
IMAGE_SIDE = 480  # pixels at most that an example is drawn from; the figure shows no more
SMOOTHING = 0.9  # of the exponential mean drawn over the single losses
SMOOTH_FROM = 200  # fewer points are averages over log intervals already


@dataclass(frozen=True)
class Example:
    """Held-out answer. `cols` x `rows` is the tile grid, `thumbnail` whether a thumbnail was appended."""

    image: str | Path | None
    cols: int
    rows: int
    thumbnail: bool
    question: str
    expected: str
    given: str

    @property
    def correct(self) -> bool:
        """Whether the given answer is the expected one, letter for letter."""
        return self.given == self.expected


@dataclass(frozen=True)
class Prediction(Example):
    """Line of a predictions file: an example with its sample's key, kind and the evaluator's verdict."""

    key: str = ""
    kind: str | None = None
    judged_correct: bool = False

    @property
    def correct(self) -> bool:
        """The evaluator's verdict, which compares tokens."""
        return self.judged_correct


def read_predictions(path: str | Path) -> list[Prediction]:
    """Read a predictions file (JSON lines, one per answer). Raises ValueError with file and line number."""
    predictions = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                predictions.append(prediction_of(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                reason = f"missing {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"{path}:{number}: not a prediction: {reason}") from None
    return predictions


def prediction_of(row: dict[str, Any]) -> Prediction:
    """Parse a row of a predictions file. Raises KeyError or ValueError if it is malformed."""
    return Prediction(
        key=str(row["key"]),
        kind=row.get("kind"),
        image=row["image"],
        cols=int(row["cols"]),
        rows=int(row["rows"]),
        thumbnail=bool(row["thumbnail"]),
        question=str(row["question"]),
        expected=str(row["expected"]),
        given=str(row["given"]),
        judged_correct=bool(row["correct"]),
    )


def most_common_baseline(expected: Sequence[str]) -> float:
    """Accuracy, 0 to 1, of always giving the most common expected answer; 0 for no answers."""
    if not expected:
        return 0.0
    return Counter(expected).most_common(1)[0][1] / len(expected)


def accuracy_by_kind(predictions: Sequence[Prediction]) -> dict[str, tuple[int, int]]:
    """(right, asked) for every kind of question, by name; answers without a kind count as `other`."""
    table: dict[str, tuple[int, int]] = {}
    for prediction in predictions:
        kind = prediction.kind or "other"
        right, asked = table.get(kind, (0, 0))
        table[kind] = (right + prediction.correct, asked + 1)
    return dict(sorted(table.items()))


def choose_examples(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Choose six answers with images: of different kinds, with a wrong one if there is any."""
    drawable = [p for p in predictions if p.image is not None]
    wrong = [p for p in drawable if not p.correct][:1]
    # First one of each kind, the image with the most tiles, then whatever follows in the file's order.
    seen = {p.kind for p in wrong}
    chosen = list(wrong)
    for prediction in sorted(drawable, key=lambda p: -p.cols * p.rows):
        if prediction.correct and prediction.kind not in seen:
            seen.add(prediction.kind)
            chosen.append(prediction)
    chosen += [p for p in drawable if p not in chosen]
    return sorted(chosen[:MAX_EXAMPLES], key=lambda p: not p.correct)


def write_report(
    out_png: str | Path,
    *,
    losses: Sequence[tuple[int, float]],
    accuracies: Sequence[tuple[int, float]] = (),
    examples: Sequence[Example] = (),
    title: str,
    caption: str = "",
) -> None:
    """Draw the report as a PNG.

    `losses` and `accuracies` are (step, value), accuracies from 0 to 1; at most six examples are drawn.
    Raises ValueError if there is nothing at all to draw.
    """
    # Not pyplot: it would pick the process's backend and keep figures alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not losses and not examples:
        raise ValueError("a report needs losses or examples, and both are empty")
    shown = list(examples)[:MAX_EXAMPLES]
    caption_lines = textwrap.wrap(caption, 150)
    height = 4.6 + 0.22 * len(caption_lines) + 3.7 * -(-len(shown) // 3)
    figure = Figure(figsize=(12, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(
        0.05, 1 - 0.32 / height, title, fontsize=16, color=INK, weight="bold", va="top", parse_math=False
    )
    figure.text(
        0.05,
        1 - 0.72 / height,
        "\n".join(caption_lines),
        fontsize=10,
        color=FAINT,
        va="top",
        parse_math=False,
        linespacing=1.4,
    )
    top = 1 - (1.0 + 0.22 * len(caption_lines)) / height
    curve = figure.add_axes((0.07, top - 2.9 / height, 0.86, 2.9 / height))
    _draw_curves(curve, losses, accuracies)
    _draw_examples(figure, shown, height)
    figure.savefig(out_png, format="png")


def _smooth(values: Sequence[float]) -> list[float]:
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + 1 - SMOOTHING
        smoothed.append(mean / weight)  # the early mean is not drawn towards zero
    return smoothed


def _plain_axes(axes: Axes, *, right: bool = False) -> None:
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side in ("bottom", "right" if right else "left"))
        axes.spines[side].set_color(RULE)
    axes.tick_params(colors=FAINT, labelsize=9, length=3, color=RULE)


def _draw_curves(
    axes: Axes, losses: Sequence[tuple[int, float]], accuracies: Sequence[tuple[int, float]]
) -> None:
    _plain_axes(axes)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("step", color=FAINT, fontsize=10)
    axes.set_ylabel("training loss", color=LOSS_COLOUR, fontsize=10)
    if losses:
        steps, values = zip(*losses, strict=True)
        axes.plot(steps, values, color=LOSS_COLOUR, linewidth=0.8, alpha=0.3)
        shown = _smooth(values) if len(values) > SMOOTH_FROM else values
        axes.plot(steps, shown, color=LOSS_COLOUR, linewidth=2)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0, right=max(max(steps), *(step for step, _ in accuracies), 1))
    if accuracies:
        twin = axes.twinx()
        _plain_axes(twin, right=True)
        steps, values = zip(*accuracies, strict=True)
        twin.plot(
            steps, [100 * v for v in values], "o-", color=ACCURACY_COLOUR, linewidth=1.6, markersize=5,
            clip_on=False,
        )  # fmt: skip
        twin.set_ylim(0, 100)
        twin.set_ylabel("held-out accuracy (%)", color=ACCURACY_COLOUR, fontsize=10)
        twin.annotate(
            f"{values[-1]:.1%}", (steps[-1], 100 * values[-1]), xytext=(-8, -16), ha="right",
            textcoords="offset points", color=ACCURACY_COLOUR, fontsize=11, weight="bold",
        )  # fmt: skip


def _draw_examples(figure: Figure, examples: Sequence[Example], height: float) -> None:
    rows = -(-len(examples) // 3)
    for number, example in enumerate(examples):
        row, column = divmod(number, 3)
        bottom = (0.25 + 3.7 * (rows - 1 - row)) / height
        left = 0.05 + 0.31 * column
        axes = figure.add_axes((left, bottom + 1.2 / height, 0.28, 2.2 / height))
        _draw_tiles(axes, example)
        tiles = example.cols * example.rows
        # One size for every line: the answer stands out by its colour.
        lines = textwrap.wrap(example.question, 46, max_lines=2, placeholder=" …") or [""]
        grid = f"{example.cols} × {example.rows} tiles" if tiles > 1 else "1 tile"
        y = bottom + 1.08 / height
        step = 0.21 / height
        figure.text(left, y, grid + (" + thumbnail" if example.thumbnail and tiles > 1 else ""),
                    fontsize=8.5, color=FAINT, va="top", parse_math=False)  # fmt: skip
        for line in lines:
            y -= step
            figure.text(left, y, line, fontsize=10.5, color=INK, va="top", parse_math=False)
        verdict = RIGHT_COLOUR if example.correct else WRONG_COLOUR
        answers = [(f"given: {example.given or '(nothing)'}", verdict)]
        answers.append((f"expected: {example.expected}", FAINT))
        for text, colour in answers:
            y -= step
            weight = "bold" if colour == verdict else "normal"
            short = textwrap.shorten(text, 46, placeholder=" …")
            figure.text(
                left, y, short, fontsize=10.5, color=colour, weight=weight, va="top", parse_math=False
            )


def _draw_tiles(axes: Axes, example: Example) -> None:
    """The image in its own aspect, with the lines along which it is cut."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_anchor("SW")
    for spine in axes.spines.values():
        spine.set_color(RULE)
    try:
        if example.image is None:
            raise FileNotFoundError
        with Image.open(example.image) as file:
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError):
        # A report about a finished run must not fail for want of one picture.
        text = "text only" if example.image is None else "image not readable"
        axes.text(0.5, 0.5, text, color=FAINT, ha="center", va="center", transform=axes.transAxes)
        return
    scale = IMAGE_SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    axes.imshow(image.resize((width, height), Image.Resampling.BICUBIC), extent=(0, width, height, 0))
    for column in range(1, example.cols):
        _cut_line(axes, [column * width / example.cols] * 2, [0, height])
    for row in range(1, example.rows):
        _cut_line(axes, [0, width], [row * height / example.rows] * 2)


def _cut_line(axes: Axes, xs: list[float], ys: list[float]) -> None:
    # White under black: visible on every background.
    axes.plot(xs, ys, color="white", linewidth=2.6)
    axes.plot(xs, ys, color="black", linewidth=1.1, dashes=(4, 3))
