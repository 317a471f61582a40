"""Picture of the simulated timeline of a step: one row per pipeline rank, one bar per pass."""

from __future__ import annotations

from pathlib import Path

from megatron_internvlx.planning.search import PipelinePlan

# Forward and backward, light for the first chunk and darker for the later ones.
_COLOURS = {
    "F": ("#9ecae1", "#4292c6", "#2171b5", "#08519c"),
    "B": ("#fdd0a2", "#fd8d3c", "#d94801", "#8c2d04"),
}
_PASSES = {"F": "forward", "B": "backward"}
_NUMBERED = 16  # micro-batches up to which bars carry their number


def draw_timeline(plans: dict[str, PipelinePlan], path: str | Path) -> None:
    """Draw a PNG with one panel per named plan, on a common time axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    ranks = max(plan.schedule.pipeline for plan in plans.values())
    figure, axes = pyplot.subplots(
        len(plans), 1, figsize=(14, len(plans) * (0.9 + 0.35 * ranks)), sharex=True, squeeze=False
    )
    for axis, (name, plan) in zip(axes[:, 0], plans.items(), strict=True):
        _panel(axis, name, plan)
    axes[-1, 0].set_xlabel("milliseconds")
    passes = [Patch(color=_COLOURS[key][0], label=label) for key, label in _PASSES.items()]
    # Above the first panel, where no bar can be.
    axes[0, 0].legend(
        handles=passes, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axis, name: str, plan: PipelinePlan) -> None:
    pipeline = plan.schedule.pipeline
    for event in plan.events:
        if event.end == event.start:
            continue
        shades = _COLOURS[event.direction]
        colour = shades[min(event.stage // pipeline, len(shades) - 1)]
        start, width = event.start * 1e3, (event.end - event.start) * 1e3
        axis.barh(event.rank, width, left=start, height=0.85, color=colour, edgecolor="white", linewidth=0.4)
        if plan.schedule.micro_batches <= _NUMBERED:
            axis.text(
                start + width / 2, event.rank, str(event.micro_batch), ha="center", va="center", fontsize=6
            )
    axis.set_yticks(range(pipeline), [f"rank {rank}" for rank in range(pipeline)])
    axis.invert_yaxis()
    layers = " ".join("+".join(map(str, plan.counts[rank::pipeline])) for rank in range(pipeline))
    axis.set_title(
        f"{name}: {plan.seconds * 1e3:.1f} ms, bubble {plan.bubble:.1%}, layers per rank {layers}",
        loc="left",
        fontsize=9,
    )
