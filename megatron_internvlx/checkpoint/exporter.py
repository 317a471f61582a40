"""A torch_dist checkpoint of any layout becomes a Hugging Face directory, on CPU, tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_internvlx.checkpoint import torch_dist
from megatron_internvlx.checkpoint.checks import read_object
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.export_files import write_files
from megatron_internvlx.checkpoint.hf_config import DTYPES, FAMILIES, dims, family_of
from megatron_internvlx.checkpoint.importer import NOTES, SIDE
from megatron_internvlx.checkpoint.mapping import LAYOUTS, Dims, Entry, output_names, table
from megatron_internvlx.checkpoint.ops import our_shape
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
from megatron_internvlx.checkpoint.target import fingerprint, group_by_size, new_directory, run_units
from megatron_internvlx.checkpoint.torch_dist import CheckpointReader, Stored, checkpoint_folder

SHARD_BYTES = 5 * 10**9
UNIT_BYTES = 256 << 20


@dataclass(frozen=True)
class ExportPlan:
    """Everything that is known before the first byte is written."""

    folder: Path
    arguments: dict[str, Any]
    family: str
    layout: str
    dims: Dims
    dtype: str
    entries: tuple[Entry, ...]
    tensors: dict[str, TensorInfo]
    """Every tensor of the directory, with its file."""
    side: Path | None
    """Files of the directory that the model came from, if any."""
    notes: dict[str, Any]
    """conversion.json of that directory, or empty."""
    tied_copy: str | None
    """The stored copy of a tied output layer."""
    iteration: int


def read_arguments(reader: CheckpointReader) -> tuple[dict[str, Any], str, int]:
    """(arguments, family or "", iteration) of a checkpoint. Raises ConversionError."""
    common = reader.common()
    imported = common.get("internvlx")
    if imported:
        return dict(imported["arguments"]), imported["family"], 0
    if common.get("args") is None:
        raise ConversionError(f"{reader.folder}: it holds no arguments, so its model is not known")
    arguments = dict(vars(common["args"]))
    if "expand_layer" not in arguments:
        raise ConversionError(f"{reader.folder}: not a checkpoint of this project (no InternVL-X settings)")
    return arguments, "", int(common.get("iteration", 0))


def find_side(load: Path, arguments: Mapping[str, Any], given: Path | None) -> Path | None:
    """Where tokenizer and original config.json are: --like, beside the checkpoint, or the tokenizer's.

    Raises ConversionError for a --like that is not there.
    """
    if given is not None and not given.is_dir():
        raise ConversionError(f"--like {given}: no such directory")
    tokenizer = arguments.get("tokenizer_model")
    for path in (given, load / SIDE, load.parent / SIDE, Path(tokenizer) if tokenizer else None):
        if path is not None and path.is_dir():
            return path
    return None


def read_notes(side: Path | None) -> dict[str, Any]:
    """conversion.json of an import; empty where there is none. Raises ConversionError for a broken one."""
    if side is None or not (side / NOTES).is_file():
        return {}
    notes = read_object(side / NOTES)
    get = notes.get
    kinds = get("layout") in (*LAYOUTS, None) and get("family") in (*FAMILIES, None)
    if not (kinds and isinstance(get("arguments", {}), dict) and isinstance(get("tied_copy") or "", str)):
        raise ConversionError(f"{side / NOTES}: not as an import writes it; remove it to export without it")
    tensors = notes.get("tensors")
    for entry in tensors.values() if isinstance(tensors, dict) else [None]:
        file, dtype = (entry.get("file"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
        known = isinstance(getattr(torch, str(dtype), None), torch.dtype)
        if not isinstance(file, str) or Path(file).name != file or not known:
            raise ConversionError(
                f"{side / NOTES}: not as an import writes it ({entry!r}); remove it to export without it"
            )
    return notes


def plan_export(
    load: Path,
    *,
    like: Path | None = None,
    dtype: str | None = None,
    max_shard_size: int = SHARD_BYTES,
) -> ExportPlan:
    """Decide the layout, the names, the types and the files.

    Args:
        load: checkpoint directory (the latest iteration is taken) or the folder of one iteration.
        like: directory with tokenizer and, if the model was imported, what import kept of the original.
        dtype: of all weights; None: as the original had them, or else as the model was trained.
        max_shard_size: bytes of a weight file at most.

    Raises ConversionError.
    """
    folder = checkpoint_folder(load)
    reader = CheckpointReader(folder)
    arguments, family, iteration = read_arguments(reader)
    side = find_side(load, arguments, like)
    notes = read_notes(side)
    family = family or notes.get("family") or family_of(arguments)
    try:
        sizes = dims(arguments, family)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ConversionError(
            f"{folder}: its arguments describe no model of this project: {reason}"
        ) from error
    layout = _layout(sizes, notes)
    if side is not None and layout == notes.get("layout") != "internvlx":
        read_object(side / "config.json")
    entries = table(sizes, layout)
    original: Mapping[str, Any] = notes.get("tensors", {}) if layout == notes.get("layout") else {}
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    fallback = dtype or _model_dtype(original, arguments)
    copy = notes.get("tied_copy") if original and sizes.tied else None
    infos: dict[str, TensorInfo] = {}
    for entry in entries:
        _check_shape(reader, entry, sizes)
        for name, shape in zip(entry.theirs, entry.shapes, strict=True):
            kept = None if dtype else original.get(name, {}).get("dtype")
            infos[name] = TensorInfo("", shape, getattr(torch, kept or fallback))
    if copy:
        infos[copy] = infos[output_names(family, layout)[1]]
    infos = _files(infos, original, max_shard_size)
    return ExportPlan(
        folder,
        arguments,
        family,
        layout,
        sizes,
        fallback,
        tuple(entries),
        infos,
        side,
        notes,
        copy,
        iteration,
    )


def _layout(sizes: Dims, notes: Mapping[str, Any]) -> str:
    """Released names wherever they exist; with LVTC ours. An original MLP model keeps its own format."""
    if sizes.injections:
        return "internvlx"
    source = notes.get("layout", "chat")
    if source == "internvlx" or (source != "chat" and sizes.projector != "mlp"):
        return "chat"
    return source


def _model_dtype(original: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    if original:
        types = [entry["dtype"] for entry in original.values()]
        return max(set(types), key=types.count)
    return "bfloat16" if arguments.get("bf16") else "float16" if arguments.get("fp16") else "float32"


def _check_shape(reader: CheckpointReader, entry: Entry, sizes: Dims) -> None:
    key, place = reader.find(entry.ours)
    stored = reader.tensors[key].shape
    stored = stored if place is None else stored[1:]
    wanted = our_shape(entry.shapes)
    vocabulary = entry.ours.endswith(("word_embeddings.weight", "output_layer.weight"))
    # A layout may have padded the vocabulary.
    fits = stored[0] >= wanted[0] and stored[1:] == wanted[1:] if vocabulary else stored == wanted
    if not fits:
        raise ConversionError(f"{reader.folder}: {key} is {list(stored)}, its arguments want {list(wanted)}")


def _files(infos: dict[str, TensorInfo], original: Mapping[str, Any], limit: int) -> dict[str, TensorInfo]:
    """File of every tensor: the original's if all its names are there, else by size in order."""
    kept = all(entry["file"].endswith(".safetensors") for entry in original.values())
    if original and kept and set(original) == set(infos):
        return {name: TensorInfo(original[name]["file"], i.shape, i.dtype) for name, i in infos.items()}
    names = list(infos)
    groups = group_by_size([infos[name].nbytes for name in names], limit)
    files: dict[str, str] = {}
    for number, group in enumerate(groups):
        single = len(groups) == 1
        file = SINGLE if single else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        files |= {names[i]: file for i in group}
    return {name: TensorInfo(files[name], info.shape, info.dtype) for name, info in infos.items()}


# ----------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Unit:
    """Tensors that one process reads, rearranges and writes into their places."""

    folder: str
    partial: str
    items: tuple[tuple[Entry, Stored, int | None], ...]
    places: Mapping[str, tuple[str, int, str]]
    """Per Hugging Face name: file, position, type."""
    copies: Mapping[str, str]
    """Names that are written twice: name -> name of the copy."""


def write_unit(unit: Unit) -> int:
    """Write the unit's tensors; returns how many."""
    torch.set_num_threads(1)
    writer = _UnitWriter(unit)
    try:
        for entry, stored, place in unit.items:
            if not writer.copy(entry, stored, place):
                writer.convert(entry, stored, place)
    finally:
        writer.close()
    return writer.written


class _UnitWriter:
    """Puts the tensors of a unit into the files."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.written = 0
        self._descriptors: dict[str, int] = {}

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def copy(self, entry: Entry, stored: Stored, place: int | None) -> bool:
        """Copy bytes; False if they must be rearranged or get another type."""
        folder = Path(self.unit.folder)
        types = {getattr(torch, self.unit.places[name][2]) for name in entry.theirs}
        if not entry.op.keeps_order or types != {stored.dtype}:
            return False
        runs = torch_dist.stored_runs(folder, stored, place)
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

    def convert(self, entry: Entry, stored: Stored, place: int | None) -> None:
        """Read the tensor, rearrange it, write it in its type."""
        ours = torch_dist.read_stored(Path(self.unit.folder), stored, place)
        for name, tensor in zip(entry.theirs, entry.op.to_theirs(ours), strict=True):
            typed = tensor.to(getattr(torch, self.unit.places[name][2]))
            for descriptor, position in self._targets(name):
                write_at(descriptor, tensor_bytes(typed), position)

    def _targets(self, name: str) -> Iterator[tuple[int, int]]:
        """(open file, position) of a tensor and of its copy."""
        for target in filter(None, (name, self.unit.copies.get(name))):
            file, position, _ = self.unit.places[target]
            if file not in self._descriptors:
                self._descriptors[file] = os.open(Path(self.unit.partial) / file, os.O_WRONLY)
            self.written += 1
            yield self._descriptors[file], position


def _units(plan: ExportPlan, partial: Path, shards: Mapping[str, ShardPlan]) -> tuple[list[Unit], list[int]]:
    reader = CheckpointReader(plan.folder)
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
            key, place = reader.find(plan.entries[i].ours)
            items.append((plan.entries[i], reader.tensors[key], place))
        names = [n for entry, _, _ in items for n in entry.theirs]
        mine = {n: places[n] for n in [*names, *(copies[n] for n in names if n in copies)]}
        units.append(Unit(str(plan.folder), str(partial), tuple(items), mine, copies))
        totals.append(sum(sizes[i] for i in group))
    return units, totals


def export_checkpoint(
    load: Path,
    directory: Path,
    *,
    like: Path | None = None,
    dtype: str | None = None,
    max_shard_size: int = SHARD_BYTES,
    processes: int = 2,
    quiet: bool = False,
) -> ExportPlan:
    """Write the Hugging Face directory `directory`; see `plan_export` for the arguments.

    Raises ConversionError, after which `directory` does not exist.
    """
    plan = plan_export(load, like=like, dtype=dtype, max_shard_size=max_shard_size)
    if plan.layout == "internvlx":
        check_tokenizer(plan)
    by_file: dict[str, dict[str, TensorInfo]] = {}
    for name, info in plan.tensors.items():
        by_file.setdefault(info.file, {})[name] = info
    shards = {file: plan_shard(file, tensors) for file, tensors in by_file.items()}
    metadata = (plan.folder / ".metadata").stat()
    mark = fingerprint(
        "export", str(plan.folder), metadata.st_mtime_ns, {n: str(i) for n, i in plan.tensors.items()}
    )
    needed = sum(shard.size for shard in shards.values()) + (64 << 20)
    with new_directory(directory, mark, needed) as target:
        for shard in shards.values():
            write_header(target.partial, shard)
        units, sizes = _units(plan, target.partial, shards)
        run_units(target, units, write_unit, sizes=sizes, processes=processes, title="export", quiet=quiet)
        _write_index(plan, target.partial, shards)
        write_files(plan, target.partial)
    return plan


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
