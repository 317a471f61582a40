"""Merge adapters into their base: a torch_dist checkpoint like the base's, to train on or to export."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.export_plan import ExportPlan, plan_export
from megatron_internvlx.checkpoint.exporter import Item, lost_share, worst_rounding
from megatron_internvlx.checkpoint.importer import NOTES, SIDE, UNIT_BYTES
from megatron_internvlx.checkpoint.target import fingerprint, group_by_size, new_directory, run_units
from megatron_internvlx.checkpoint.torch_dist import RELEASE, TRACKER
from megatron_internvlx.checkpoint.torch_dist_write import (
    WrittenTensor,
    checkpoint_keys,
    save_tensor,
    write_metadata,
)
from megatron_internvlx.data.rvtc import NAMES_VERSION


@dataclass(frozen=True)
class MergeUnit:
    """Group of tensors that one process merges and writes into one data file."""

    number: int
    folder: str
    items: tuple[Item, ...]
    dtypes: tuple[str, ...]
    """Type of each tensor in the base."""
    experts: int
    vision_layers: int


def write_unit(unit: MergeUnit) -> dict[str, Any]:
    """Write one data file; returns `written`, the positions of its tensors, and `lost`, as `exporter.write_unit`."""
    torch.serialization.set_crc32_options(False)  # as an import does
    torch.set_num_threads(1)
    name = f"__{unit.number}_0.distcp"
    written, lost = [], []
    with (Path(unit.folder) / name).open("wb", buffering=1 << 20) as file:
        for item, dtype in zip(unit.items, unit.dtypes, strict=True):
            exact, ours = item.stored.read(), item.entry.ours
            change = item.adapter.change() if item.adapter is not None else None
            if change is not None:
                exact = exact.float() + change
            typed = exact.to(getattr(torch, dtype))
            if change is not None:
                lost.append((ours, lost_share([exact], [typed], change)))
            keys, place = checkpoint_keys(ours, unit.experts > 0)
            start, length = save_tensor(file, typed if place is None else typed[None])
            count = 0 if place is None else unit.experts if ".experts." in keys[0] else unit.vision_layers
            item_ = WrittenTensor(tuple(keys), place, count, tuple(typed.shape), dtype, name, start, length)
            written.append(asdict(item_))
    return {"written": written, "lost": lost}


def merge_checkpoint(
    load: Path, save: Path, *, base: Path | None = None, processes: int = 2, quiet: bool = False
) -> ExportPlan:
    """Write a checkpoint of adapters, merged into its base, to the checkpoint `save`, in the types of the base.

    Raises ConversionError; `save` then does not exist.
    """
    plan = plan_export(load, base=base)
    reader = plan.weights.base
    if reader is None:
        raise ConversionError(
            f"{plan.folder}: it has no adapters, so there is nothing to merge; --hf exports a whole checkpoint"
        )
    items = [Item(e, plan.weights.find(e.ours), plan.adapters.get(e.ours)) for e in plan.entries]
    dtypes = [str(reader.tensors[reader.find(e.ours)[0]].dtype).removeprefix("torch.") for e in plan.entries]
    sizes = [
        torch.Size(item.stored.shape).numel() * getattr(torch, dtype).itemsize
        for item, dtype in zip(items, dtypes, strict=True)
    ]
    mark = fingerprint("merge", plan.weights.stamps())
    with new_directory(save, mark, sum(sizes) + (64 << 20)) as target:
        folder = target.partial / RELEASE
        folder.mkdir(exist_ok=True)
        units, totals = [], []
        for number, group in enumerate(group_by_size(sizes, UNIT_BYTES)):
            units.append(
                MergeUnit(
                    number, str(folder), tuple(items[i] for i in group), tuple(dtypes[i] for i in group),
                    plan.sizes.experts, plan.sizes.vision.num_layers,
                )
            )  # fmt: skip
            totals.append(sum(sizes[i] for i in group))
        results = run_units(
            target, units, write_unit, sizes=totals, processes=processes, title="merge", quiet=quiet
        )
        written = [WrittenTensor(**one) for number in sorted(results) for one in results[number]["written"]]
        write_metadata(folder, written, common_state(plan.arguments, plan.family, plan.iteration))
        (target.partial / TRACKER).write_text(RELEASE)
        if plan.side is not None and (plan.side / NOTES).is_file():
            shutil.copytree(plan.side, target.partial / SIDE)
    return replace(plan, rounding=worst_rounding({n: r["lost"] for n, r in results.items()}))


def common_state(arguments: Mapping[str, Any], family: str, iteration: int) -> dict[str, Any]:
    """State besides tensors that Megatron and our export read: the model's arguments, of plain types only."""
    plain = {name: value for name, value in arguments.items() if _is_plain(value)}
    return {
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False},
        "internvlx": {
            "arguments": plain,
            "family": family,
            "rvtc_version": NAMES_VERSION,
            "iteration": iteration,
        },
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
