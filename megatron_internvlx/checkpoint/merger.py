"""Merge adapters into their base: a torch_dist checkpoint like the base's, to train on or to export."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.export_plan import ExportPlan, plan_export
from megatron_internvlx.checkpoint.exporter import Item, lost_share, worst_rounding
from megatron_internvlx.checkpoint.importer import NOTES, SIDE, UNIT_BYTES
from megatron_internvlx.checkpoint.target import fingerprint, group_by_size, new_directory, run_units
from megatron_internvlx.checkpoint.torch_dist_write import (
    WrittenTensor,
    append_tensor,
    common_state,
    release_folder,
    write_release,
)


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
            where = append_tensor(
                file, name, ours, typed, experts=unit.experts, vision_layers=unit.vision_layers
            )
            written.append(asdict(where))
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
        folder = release_folder(target.partial)
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
        write_release(target.partial, written, common_state(plan.arguments, plan.family, plan.iteration))
        if plan.side is not None and (plan.side / NOTES).is_file():
            shutil.copytree(plan.side, target.partial / SIDE)
    return replace(plan, rounding=worst_rounding({n: r["lost"] for n, r in results.items()}))
