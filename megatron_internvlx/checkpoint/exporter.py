"""Export a torch_dist checkpoint of any layout to a Hugging Face directory, on CPU, one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_internvlx.checkpoint import torch_dist
from megatron_internvlx.checkpoint.checks import read_object
from megatron_internvlx.checkpoint.export_files import write_files
from megatron_internvlx.checkpoint.export_plan import SHARD_BYTES, ExportPlan, plan_export
from megatron_internvlx.checkpoint.mapping import Entry, output_names
from megatron_internvlx.checkpoint.remote_code import check_tokenizer
from megatron_internvlx.checkpoint.safetensors_io import (
    INDEX,
    SINGLE,
    ShardPlan,
    TensorInfo,
    copy_bytes,
    plan_shard,
    tensor_bytes,
    write_at,
    write_header,
)
from megatron_internvlx.checkpoint.sources import Location, StoredAdapter
from megatron_internvlx.checkpoint.target import fingerprint, group_by_size, new_directory, run_units

UNIT_BYTES = 256 << 20


@dataclass(frozen=True)
class Item:
    """One of our tensors: its table entry, its place, and the adapter to merge into it, if any."""

    entry: Entry
    stored: Location
    adapter: StoredAdapter | None


@dataclass(frozen=True)
class Unit:
    """Group of tensors that one process reads, converts and writes."""

    partial: str
    items: tuple[Item, ...]
    places: Mapping[str, tuple[str, int, str]]
    """File, position and type of each tensor by Hugging Face name."""
    copies: Mapping[str, str]
    """Tensors that are written twice: name -> name of the copy."""


def write_unit(unit: Unit) -> list[tuple[str, float]]:
    """Write the unit's tensors; returns for each merged weight the share of its adapter's change that rounding lost."""
    torch.set_num_threads(1)
    writer = _UnitWriter(unit)
    try:
        for item in unit.items:
            if not writer.copy(item):
                writer.convert(item)
    finally:
        writer.close()
    return writer.lost


class _UnitWriter:
    """Writer of a unit's tensors into the weight files."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.lost: list[tuple[str, float]] = []
        self._descriptors: dict[str, int] = {}

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def copy(self, item: Item) -> bool:
        """Copy a tensor's bytes; returns False if its values, order or type must change."""
        entry, stored = item.entry, item.stored.tensor
        types = {getattr(torch, self.unit.places[name][2]) for name in entry.theirs}
        if item.adapter is not None or not entry.op.keeps_order or types != {stored.dtype}:
            return False
        runs = torch_dist.byte_ranges(Path(item.stored.folder), stored, item.stored.place)
        if runs is None:
            return False
        begin = 0
        for name, shape in zip(entry.theirs, entry.shapes, strict=True):
            end = begin + math.prod(shape) * stored.dtype.itemsize
            for descriptor, position in self._targets(name):
                for run in runs:
                    low, high = max(begin, run.at), min(end, run.at + run.length)
                    if low < high:
                        copy_bytes(
                            run.path, run.start + low - run.at, high - low, descriptor, position + low - begin
                        )
            begin = end
        return True

    def convert(self, item: Item) -> None:
        """Read a tensor, merge its adapter, convert its order and type, and write it."""
        entry, ours, change = item.entry, item.stored.read(), None
        if item.adapter is not None:
            change = item.adapter.change()
            ours = ours.float() + change
        exact = entry.op.to_theirs(ours)
        typed = [
            tensor.to(getattr(torch, self.unit.places[name][2]))
            for name, tensor in zip(entry.theirs, exact, strict=True)
        ]
        for name, tensor in zip(entry.theirs, typed, strict=True):
            for descriptor, position in self._targets(name):
                write_at(descriptor, tensor_bytes(tensor), position)
        if change is not None:
            self.lost.append((entry.theirs[0], lost_share(exact, typed, change)))

    def _targets(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield (file descriptor, position) of a tensor and of its copy, if any."""
        for target in filter(None, (name, self.unit.copies.get(name))):
            file, position, _ = self.unit.places[target]
            if file not in self._descriptors:
                self._descriptors[file] = os.open(Path(self.unit.partial) / file, os.O_WRONLY)
            yield self._descriptors[file], position


def lost_share(exact: Sequence[Tensor], rounded: Sequence[Tensor], change: Tensor) -> float:
    """Share of a change of a weight that its rounding to another type lost, as a ratio of Frobenius norms."""
    size = float(change.norm())
    error = sum(float((r.float() - e).norm()) ** 2 for e, r in zip(exact, rounded, strict=True)) ** 0.5
    return error / size if size else 0.0


def _units(plan: ExportPlan, partial: Path, shards: Mapping[str, ShardPlan]) -> tuple[list[Unit], list[int]]:
    places = {
        name: (info.file, shards[info.file].offsets[name], str(info.dtype).removeprefix("torch."))
        for name, info in plan.tensors.items()
    }
    embedding = output_names(plan.family, plan.layout)[1]
    copies = {embedding: plan.tied_copy} if plan.tied_copy else {}
    sizes = [sum(plan.tensors[name].nbytes for name in entry.theirs) for entry in plan.entries]
    units, totals = [], []
    for group in group_by_size(sizes, UNIT_BYTES):
        items = []
        for i in group:
            ours = plan.entries[i].ours
            items.append(Item(plan.entries[i], plan.weights.find(ours), plan.adapters.get(ours)))
        names = [name for item in items for name in item.entry.theirs]
        mine = {n: places[n] for n in [*names, *(copies[n] for n in names if n in copies)]}
        units.append(Unit(str(partial), tuple(items), mine, copies))
        totals.append(sum(sizes[i] for i in group))
    return units, totals


def export_checkpoint(
    load: Path,
    directory: Path,
    *,
    base: Path | None = None,
    like: Path | None = None,
    dtype: str | None = None,
    max_shard_size: int = SHARD_BYTES,
    remote_code: bool = False,
    processes: int = 2,
    quiet: bool = False,
) -> ExportPlan:
    """Write a checkpoint to the Hugging Face directory `directory`; see `plan_export` for the arguments.

    Adapters are merged into their base's weights in fp32. Raises ConversionError; `directory` then does not exist.
    """
    plan = plan_export(
        load, base=base, like=like, dtype=dtype, max_shard_size=max_shard_size, remote_code=remote_code
    )
    if plan.layout == "internvlx":
        check_tokenizer(plan)
    by_file: dict[str, dict[str, TensorInfo]] = {}
    for name, info in plan.tensors.items():
        by_file.setdefault(info.file, {})[name] = info
    shards = {file: plan_shard(file, tensors) for file, tensors in by_file.items()}
    mark = fingerprint("export", plan.weights.stamps(), {n: str(i) for n, i in plan.tensors.items()})
    needed = sum(shard.size for shard in shards.values()) + (64 << 20)
    with new_directory(directory, mark, needed) as target:
        for shard in shards.values():
            write_header(target.partial, shard)
        units, sizes = _units(plan, target.partial, shards)
        results = run_units(
            target, units, write_unit, sizes=sizes, processes=processes, title="export", quiet=quiet
        )
        _write_index(plan, target.partial, shards)
        write_files(plan, target.partial)
    return replace(plan, rounding=worst_rounding(results))


def worst_rounding(results: Mapping[int, Sequence[tuple[str, float]]]) -> tuple[str, float] | None:
    """Weight in which rounding lost most of an adapter's change, and the share; None if nothing was merged."""
    lost = [(name, share) for result in results.values() for name, share in result]
    return max(lost, key=lambda item: item[1], default=None)


def _write_index(plan: ExportPlan, partial: Path, shards: Mapping[str, ShardPlan]) -> None:
    kept = plan.side / INDEX if plan.side and plan.layout == plan.notes.get("layout") else None
    if kept is not None and kept.is_file():
        weight_map = read_object(kept).get("weight_map")
        if weight_map == {name: info.file for name, info in plan.tensors.items()}:
            shutil.copyfile(kept, partial / INDEX)
            return
    if len(shards) == 1 and SINGLE in shards:
        return
    total = sum(info.nbytes for info in plan.tensors.values())
    weight_map = {name: plan.tensors[name].file for name in sorted(plan.tensors)}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
