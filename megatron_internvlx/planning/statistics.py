"""Costs of a prepared data set under each RVTC policy: sizes, tiles, tokens, pack fill, compute."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_internvlx.config import DataSettings
from megatron_internvlx.data.images import FolderImages, ImageStore, ShardImages
from megatron_internvlx.data.manifest import JsonlFile, Record
from megatron_internvlx.data.packing import Budget, Fill, as_costs, fill, pack
from megatron_internvlx.data.prepared import SHARD_JSON, Part, ShardRecord, prepared_sets, size_table
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.data.rvtc import POLICIES
from megatron_internvlx.data.sample import SampleEncoder
from megatron_internvlx.model.presets import preset
from megatron_internvlx.model.sizes import model_sizes
from megatron_internvlx.planning.flops import PlanStats, forward_flops

INK, FAINT = "#212529", "#dee2e6"
COLOURS = {"off": "#868e96", "edge": "#1f5fa8", "area": "#c2570c"}
# A budget of supervised tokens is proposed from so many samples: the least multiple of `_ROUND` (whole tiles of a
# matrix product) that leaves so many percent of them whole and takes at most this share of packs more, if it is worth
# the setting: at most so much of the shallow budget.
_TRIED, _ROUND, _WHOLE, _MORE_PACKS, _WORTH = 4_000, 128, 99.9, 0.01, 0.75


@dataclass
class PolicyStats:
    """Counts of one policy: costs int64 [n, 4] per sample, in the order of `packing.Cost`."""

    policy: str
    costs: np.ndarray
    fill: Fill | None = None
    flops: float = 0.0
    """Forward FLOPs of the samples, with LVTC."""
    flops_without_lvtc: float = 0.0


@dataclass
class DataStats:
    """Sizes int64 [images, 2] and a `PolicyStats` per policy; `bad` counts records left out, per cause."""

    sizes: np.ndarray
    policies: dict[str, PolicyStats]
    bad: dict[str, int] = field(default_factory=dict)


def stored_records(out: Path, limit: int) -> Iterator[tuple[Record, ImageStore]]:
    """At most `limit` records of a prepared directory, spread evenly over each JSONL file."""
    parts = [entry.parts[0] for entry in prepared_sets(out) if entry.parts]
    for part in parts:
        flavors = part.flavors
        count = min(part.records, max(1, limit // len(parts)))
        if flavors.sharded:
            yield from _shard_records(out, part, count)
            continue
        file = JsonlFile(out / part.path, flavors.label)
        store = FolderImages(flavors.image_root(out), size_table(out, flavors.data_set))
        for number in range(count):
            index = number * part.records // count
            record = Record(file.key(index), file[index], "", flavors.data_augment, flavors.max_tiles)
            yield record, store


def _shard_records(out: Path, part: Part, count: int) -> Iterator[tuple[Record, ImageStore]]:
    augment, most = part.flavors.data_augment, part.flavors.max_tiles
    for shard in sorted((out / part.path).glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if not member.name.endswith(f".{SHARD_JSON}"):
                    continue
                if not count:
                    return
                count -= 1
                handle = tar.extractfile(member)
                assert handle is not None
                found = ShardRecord.from_json(handle.read())
                record = Record(found.key, found.record, "", augment, most)
                yield record, ShardImages(found.sizes, record.key, None)


def collect(out: Path, encoder: SampleEncoder, *, limit: int = 20_000) -> DataStats:
    """Count tokens and tiles of records of a prepared directory under every policy.

    Raises ValueError if no record is usable.
    """
    # A budget would already change what a policy costs; it is applied when packing.
    settings = replace(encoder.settings, budget=None, max_length=None)
    tools = {p: SampleEncoder(encoder.tokenizer, replace(settings, rvtc=p)) for p in POLICIES}
    sizes: list[tuple[int, int]] = []
    costs: dict[str, list[Any]] = {policy: [] for policy in POLICIES}
    bad: dict[str, int] = {}
    for record, store in stored_records(out, limit):
        try:
            for policy, tool in tools.items():
                exif = tool.apply_exif
                sample = tool.encode(record, lambda name, s=store, e=exif: s.size(name, apply_exif=e))  # type: ignore[misc]
                costs[policy].append(tool.cost(sample))
        except BadSample as error:
            bad[error.cause] = bad.get(error.cause, 0) + 1
            continue
        sizes += [(image.width, image.height) for image in sample.images]
    if not costs["off"]:
        raise ValueError(f"{out}: no usable record ({bad or 'it is empty'})")
    return DataStats(
        np.asarray(sizes, np.int64).reshape(-1, 2),
        {policy: PolicyStats(policy, as_costs(rows)) for policy, rows in costs.items()},
        bad,
    )


def add_fill(stats: DataStats, budget: Budget) -> int:
    """Pack the samples of every policy and return the number that were over the budget and cut down to it."""
    over = 0
    for policy in stats.policies.values():
        limits = budget.limits()
        over = max(over, int((policy.costs > limits).any(1).sum()))
        fitting = np.minimum(policy.costs, limits)
        policy.fill = fill(fitting, pack(fitting, budget), budget)
    return over


@dataclass(frozen=True)
class Proposal:
    """A budget of supervised tokens per pack."""

    most: int
    more: float
    """Share of packs that it takes more; below 0 where the packing happens to succeed with fewer."""
    over: float
    """Share of samples that are over it by themselves: cut after their last whole answer that fits, or refused."""


def propose_supervised(costs: np.ndarray, budget: Budget) -> Proposal | None:
    """Budget of supervised tokens for static boundaries; None if it saves less than a quarter of the shallow one.

    Args:
        costs: int64 [n, 4] within the budget, in the order of `packing.Cost`.
        budget: limits of a pack; that of supervised tokens is not looked at.
    """
    costs, free = costs[:: -(-len(costs) // _TRIED)].copy(), replace(budget, supervised=None)
    counts, packs = costs[:, 3].copy(), len(pack(costs, free))
    least = max(float(np.percentile(counts, _WHOLE)), counts.sum() / packs, 1.0)
    for slack in (1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0, 3.0):
        most = -(-int(least * slack) // _ROUND) * _ROUND
        if most > budget.shallow * _WORTH:
            break
        costs[:, 3] = np.minimum(counts, most)
        more = len(pack(costs, replace(budget, supervised=most))) / packs - 1
        if more <= _MORE_PACKS:
            return Proposal(most, more, float((counts > most).mean()))
    return None


def supervised_line(policy: PolicyStats, budget: Budget) -> str:
    """Supervised tokens of a policy's samples and packs, after `add_fill`, and a budget for them, as text."""
    assert policy.fill is not None
    costs = np.minimum(policy.costs, replace(budget, supervised=None).limits())
    costs[:, 3] = np.minimum(costs[:, 3], costs[:, 0])  # a text that is cut loses answers
    counts = costs[:, 3]
    line = (
        f"supervised tokens ({policy.policy}): {counts.mean():,.0f} per sample, the longest {counts.max():,}"
    )
    if budget.supervised is not None:
        over = float((counts > budget.supervised).mean())
        kept = np.minimum(counts, budget.supervised)
        return (
            f"{line}; of {budget.supervised:,} per pack {kept.sum() / policy.fill.packs:,.0f} are used, and {over:.2%} "
            "of the samples are over it by themselves: cut or refused"
        )
    line += f", {counts.sum() / policy.fill.packs:,.0f} per pack"
    found = propose_supervised(costs, budget)
    if found is None:
        return f"{line}; a budget of their own would be almost as large as the shallow one"
    return (
        f"{line}; --boundary static with --max-supervised-tokens-per-pack {found.most} pads to {found.most:,} rows "
        f"instead of {budget.shallow:,}, takes {max(found.more, 0):.1%} more packs and cuts or refuses "
        f"{found.over:.2%} of the samples"
    )


def add_flops(stats: DataStats, model: str, tiles: Mapping[str, Any]) -> None:
    """Count the forward FLOPs of all samples in a preset's model, with LVTC at the preset's layer and without.

    Args:
        stats: result of `collect`; changed in place.
        model: name of the preset.
        tiles: arguments of the counted tiles: image_size, patch_size, low_ratio, high_ratio.
    """
    flags = {"expand_layer": None, **preset(model), **tiles}
    sizes = model_sizes(flags | {"expand_layer": flags["expand_layer"] or max(1, flags["num_layers"] // 2)})
    for policy in stats.policies.values():
        shallow, deep, count, rows = (int(total) for total in policy.costs.sum(0))
        squares = [int((policy.costs[:, i] ** 2).sum()) for i in (0, 1)]
        with_lvtc = PlanStats(count, count, count, shallow, squares[0], deep, squares[1], rows)
        without = PlanStats(count, count, 0, 0, 0, deep, squares[1], rows)
        policy.flops = forward_flops(sizes, with_lvtc).total
        policy.flops_without_lvtc = forward_flops(replace(sizes, injection_layers=()), without).total


def table(stats: DataStats, budget: Budget | None) -> str:
    """Numbers of all policies as text."""
    samples = len(next(iter(stats.policies.values())).costs)
    lines = [f"{samples} samples, {len(stats.sizes)} images; left out: {stats.bad or 'none'}"]
    if len(stats.sizes):
        quarters = np.percentile(stats.sizes, [5, 50, 95], axis=0).astype(int)
        shown = ", ".join(f"{w}x{h}" for w, h in quarters)
        lines.append(f"width x height at 5, 50, 95 %: {shown}")
    if budget:
        lines.append(supervised_line(stats.policies[DataSettings().rvtc], budget))
    base = stats.policies["off"].flops_without_lvtc
    head = "policy   tiles/sample  shallow tokens (mean, 95 %)  deep tokens (mean, 95 %)"
    head += "   packs  fill   binding           " if budget else ""
    lines.append(head + ("   compute saved: LVTC off, LVTC on" if base else ""))
    for policy in stats.policies.values():
        mean, high = policy.costs.mean(0), np.percentile(policy.costs, 95, axis=0)
        row = f"{policy.policy:<8} {mean[2]:12.2f}  {mean[0]:18.0f} {high[0]:9.0f}  {mean[1]:15.0f} {high[1]:8.0f}"
        if policy.fill:
            row += f"   {policy.fill.packs:>5}  {policy.fill.best:5.1%}  {policy.fill.binding:<17}"
        if base:
            row += f"   {1 - policy.flops_without_lvtc / base:21.1%}, {1 - policy.flops / base:6.1%}"
        lines.append(row)
    return "\n".join(lines)


def draw(stats: DataStats, path: Path, budget: Budget | None) -> None:
    """Draw the distributions and write them as a PNG."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Room between a label and the title below it.
    spaced = ConstrainedLayoutEngine(hspace=0.08, wspace=0.04)
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout=spaced)
    sizes, tiles, tokens, bars = axes.flat
    if len(stats.sizes):
        sizes.scatter(*stats.sizes.T, s=6, color=COLOURS["edge"], alpha=0.4, linewidths=0)
    sizes.set(xlabel="width, pixels", ylabel="height, pixels", title="Image sizes")
    for policy in stats.policies.values():
        style = {"color": COLOURS[policy.policy], "label": policy.policy}
        counts = np.bincount(policy.costs[:, 2])
        tiles.step(range(len(counts)), counts / counts.sum(), where="mid", **style)
        lengths = np.sort(policy.costs[:, 1])
        tokens.plot(lengths, np.arange(1, len(lengths) + 1) / len(lengths), **style)
    tiles.set(xlabel="tiles, thumbnail included", ylabel="share of samples", title="Tiles per sample")
    tokens.set(xlabel="tokens in the deep phase", ylabel="share of samples up to", title="Tokens per sample")
    if budget:
        tokens.axvline(budget.deep, color=INK, linestyle=":", linewidth=1)
    _bars(bars, stats)
    for axis in axes.flat:
        axis.grid(color=FAINT, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    tiles.legend(frameon=False, title="RVTC policy")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axis: Any, stats: DataStats) -> None:
    """Draw compute relative to the first policy without LVTC, and the fill of packs."""
    base = stats.policies["off"].flops_without_lvtc
    for number, policy in enumerate(stats.policies.values()):
        values = [policy.flops_without_lvtc / base, policy.flops / base] if base else []
        values += [policy.fill.best] if policy.fill else []
        at = np.arange(len(values)) + (number - 1) * 0.26
        bars = axis.bar(at, values, width=0.24, color=COLOURS[policy.policy])
        axis.bar_label(bars, [f"{value:.0%}" for value in values], fontsize=8)
    names = ["compute,\nLVTC off", "compute,\nLVTC on"] if base else []
    names += ["pack fill"] if next(iter(stats.policies.values())).fill else []
    compared = "Compute against InternVL (off, LVTC off)"
    titles = {3: f"{compared}, and pack fill", 2: compared, 1: "Pack fill", 0: ""}
    axis.set(title=titles[len(names)], ylim=(0, 1.1))
    axis.set_xticks(range(len(names)), names)
