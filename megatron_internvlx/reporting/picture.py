"""Picture of a run: loss, accuracy by kind of question, and held-out images with the model's answers."""

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

MAX_EXAMPLES = 12
COLUMNS = 4  # of examples
ROW_HEIGHT = 3.1  # inches of an example, its text included
INK, FAINT, RULE = "#212529", "#6c757d", "#dee2e6"
LOSS_COLOUR, ACCURACY_COLOUR = "#1f5fa8", "#c2570c"
RIGHT_COLOUR, WRONG_COLOUR = "#1a7f37", "#b42318"
IMAGE_SIDE = 480  # pixels at most that an example is drawn from; the figure shows no more
SMOOTHING = 0.9  # of the exponential mean drawn over the single losses
SMOOTH_FROM = 200  # fewer points are averages over log intervals already


@dataclass(frozen=True)
class Example:
    """Held-out answer. `cols` x `rows` is the tile grid of `image`, `thumbnail` whether a thumbnail was appended."""

    image: str | Path | None
    cols: int
    rows: int
    thumbnail: bool
    question: str
    expected: str
    given: str
    further_images: tuple[str | Path, ...] = ()

    @property
    def correct(self) -> bool:
        """Whether the given answer is the expected one, letter for letter."""
        return self.given == self.expected


@dataclass(frozen=True)
class KindAccuracy:
    """Right and asked questions of a kind; `commonest` is the accuracy of its commonest answer, 0 to 1."""

    name: str
    right: int
    asked: int
    commonest: float


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
        further_images=tuple(row.get("images") or ())[1:],
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


def kind_accuracies(predictions: Sequence[Prediction]) -> list[KindAccuracy]:
    """Right and asked questions of every kind, and the accuracy of its commonest answer, in the order of names."""
    expected: dict[str, list[str]] = {}
    for prediction in predictions:
        expected.setdefault(prediction.kind or "other", []).append(prediction.expected)
    return [
        KindAccuracy(kind, right, asked, most_common_baseline(expected[kind]))
        for kind, (right, asked) in accuracy_by_kind(predictions).items()
    ]


def choose_examples(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Choose twelve answers with images: one of every kind, if there are not too many, and a wrong one if any."""
    drawable = [p for p in predictions if p.image is not None]
    # One of each kind, of an image that is not shown yet, with many tiles; then whatever follows in the file's order.
    ranked = sorted(drawable, key=lambda p: (not p.correct, -p.cols * p.rows))
    chosen: list[Prediction] = []
    for kind in dict.fromkeys(p.kind for p in ranked):
        mine = [p for p in ranked if p.kind == kind]
        shown = {p.image for p in chosen}
        chosen.append(next((p for p in mine if p.correct and p.image not in shown), mine[0]))
    wrong = [p for p in drawable if not p.correct and p not in chosen][:1]
    chosen = chosen[: MAX_EXAMPLES - len(wrong)] + wrong
    chosen += [p for p in drawable if p not in chosen]
    return sorted(chosen[:MAX_EXAMPLES], key=lambda p: (not p.correct, p.kind or ""))


def write_report(
    out_png: str | Path,
    *,
    losses: Sequence[tuple[int, float]],
    accuracies: Sequence[tuple[int, float]] = (),
    kinds: Sequence[KindAccuracy] = (),
    examples: Sequence[Example] = (),
    title: str,
    caption: str = "",
) -> None:
    """Draw the report as a PNG.

    `losses` and `accuracies` are (step, value), accuracies from 0 to 1; `kinds` are drawn as bars beside the
    curves; at most twelve examples are drawn.
    Raises ValueError if there is nothing at all to draw.
    """
    # Not pyplot: it would pick the process's backend and keep figures alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not losses and not examples:
        raise ValueError("a report needs losses or examples, and both are empty")
    shown = list(examples)[:MAX_EXAMPLES]
    caption_lines = textwrap.wrap(caption, 150)
    height = 4.6 + 0.22 * len(caption_lines) + ROW_HEIGHT * -(-len(shown) // COLUMNS)
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
    width = 0.48 if kinds else 0.86
    curve = figure.add_axes((0.07, top - 2.9 / height, width, 2.9 / height))
    _draw_curves(curve, losses, accuracies)
    if kinds:
        _draw_kinds(figure.add_axes((0.72, top - 2.9 / height, 0.21, 2.9 / height)), kinds)
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


def _draw_kinds(axes: Axes, kinds: Sequence[KindAccuracy]) -> None:
    """Bars of the share of right answers, with a mark where the commonest answer alone would end."""
    _plain_axes(axes)
    axes.spines["left"].set_visible(False)
    places = range(len(kinds))
    right = [100 * kind.right / max(1, kind.asked) for kind in kinds]
    axes.barh(places, [100] * len(kinds), color=RULE, height=0.6, alpha=0.5)
    axes.barh(places, right, color=ACCURACY_COLOUR, height=0.6)
    marks = [100 * kind.commonest for kind in kinds]
    axes.plot(marks, places, "|", color=INK, markersize=9, markeredgewidth=1.5)
    for place, kind, share in zip(places, kinds, right, strict=True):
        axes.text(103, place, f"{share:.0f}% of {kind.asked}", va="center", fontsize=9, color=INK)
    axes.set_yticks(places, [kind.name.replace("_", " ") for kind in kinds], fontsize=9.5, color=INK)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 100)
    axes.set_ylim(len(kinds) - 0.4, -0.6)  # the first kind on top
    axes.set_xlabel("right (%); |: always the commonest answer", color=FAINT, fontsize=9)


def _draw_examples(figure: Figure, examples: Sequence[Example], height: float) -> None:
    rows = -(-len(examples) // COLUMNS)
    width = 0.9 / COLUMNS
    for number, example in enumerate(examples):
        row, column = divmod(number, COLUMNS)
        bottom = (0.25 + ROW_HEIGHT * (rows - 1 - row)) / height
        left = 0.05 + width * column
        axes = figure.add_axes((left, bottom + 1.2 / height, width - 0.025, (ROW_HEIGHT - 1.5) / height))
        _draw_tiles(axes, example)
        # One size for every line: the answer stands out by its colour.
        lines = textwrap.wrap(example.question, 34, max_lines=2, placeholder=" …") or [""]
        y = bottom + 1.08 / height
        step = 0.21 / height
        figure.text(left, y, _grid_text(example), fontsize=8.5, color=FAINT, va="top", parse_math=False)
        for line in lines:
            y -= step
            figure.text(left, y, line, fontsize=10.5, color=INK, va="top", parse_math=False)
        verdict = RIGHT_COLOUR if example.correct else WRONG_COLOUR
        answers = [(f"given: {example.given or '(nothing)'}", verdict)]
        answers.append((f"expected: {example.expected}", FAINT))
        for text, colour in answers:
            y -= step
            weight = "bold" if colour == verdict else "normal"
            short = textwrap.shorten(text, 34, placeholder=" …")
            figure.text(
                left, y, short, fontsize=10.5, color=colour, weight=weight, va="top", parse_math=False
            )


def _grid_text(example: Example) -> str:
    if example.further_images:
        return f"{1 + len(example.further_images)} images"
    tiles = example.cols * example.rows
    if tiles < 2:
        return "1 tile"
    return f"{example.cols} × {example.rows} tiles" + (" + thumbnail" if example.thumbnail else "")


def _open_image(path: str | Path) -> Image.Image:
    """The image, enlarged or reduced to a longer side of `IMAGE_SIDE`. Raises OSError."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    scale = IMAGE_SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    gap = IMAGE_SIDE // 16
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    joined = Image.new("RGB", (width, max(image.height for image in images)), "white")
    x = 0
    for image in images:
        joined.paste(image, (x, 0))
        x += image.width + gap
    return joined


def _draw_tiles(axes: Axes, example: Example) -> None:
    """The image in its own aspect, with the lines along which it is cut; several images side by side, uncut."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_anchor("SW")
    for spine in axes.spines.values():
        spine.set_color(RULE)
    try:
        if example.image is None:
            raise FileNotFoundError
        image = _open_image(example.image)
        if example.further_images:
            image = _side_by_side([image, *map(_open_image, example.further_images)])
    except (OSError, UnidentifiedImageError):
        # A report about a finished run must not fail for want of one picture.
        text = "text only" if example.image is None else "image not readable"
        axes.text(0.5, 0.5, text, color=FAINT, ha="center", va="center", transform=axes.transAxes)
        return
    width, height = image.size
    axes.imshow(image, extent=(0, width, height, 0))
    if example.further_images:
        return
    for column in range(1, example.cols):
        _cut_line(axes, [column * width / example.cols] * 2, [0, height])
    for row in range(1, example.rows):
        _cut_line(axes, [0, width], [row * height / example.rows] * 2)


def _cut_line(axes: Axes, xs: list[float], ys: list[float]) -> None:
    # White under black: visible on every background.
    axes.plot(xs, ys, color="white", linewidth=2.6)
    axes.plot(xs, ys, color="black", linewidth=1.1, dashes=(4, 3))
