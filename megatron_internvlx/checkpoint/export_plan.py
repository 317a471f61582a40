"""Plan of an export: arguments, table, tensors and files, determined before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_internvlx.checkpoint.checks import read_object
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.families import FAMILIES
from megatron_internvlx.checkpoint.hf_config import DTYPES, family_of
from megatron_internvlx.checkpoint.importer import NOTES, SIDE
from megatron_internvlx.checkpoint.mapping import LAYOUTS, Entry, output_names, table
from megatron_internvlx.checkpoint.safetensors_io import SINGLE, TensorInfo
from megatron_internvlx.checkpoint.sources import ModelWeights, StoredAdapter, with_present_rule
from megatron_internvlx.checkpoint.target import group_by_size
from megatron_internvlx.model.sizes import ModelSizes, model_sizes

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class ExportPlan:
    """Everything about an export that is determined before anything is written."""

    folder: Path
    arguments: dict[str, Any]
    family: str
    layout: str
    sizes: ModelSizes
    dtype: str
    entries: tuple[Entry, ...]
    tensors: dict[str, TensorInfo]
    """All tensors of the directory, with their files."""
    side: Path | None
    """Directory with the tokenizer and the original's other files, if any."""
    notes: dict[str, Any]
    """Content of its conversion.json, or empty."""
    tied_copy: str | None
    """Name of the stored copy of a tied output layer."""
    iteration: int
    weights: ModelWeights
    """Places of the stored tensors."""
    adapters: Mapping[str, StoredAdapter]
    """Adapters that the export merges, by our name of the weight."""
    rounding: tuple[str, float] | None = None
    """Of a finished export: weight in which rounding lost the largest share of an adapter's change, and the share."""


def find_side(
    load: Path, arguments: Mapping[str, Any], given: Path | None, base: Path | None = None
) -> Path | None:
    """Find the directory with tokenizer and original config.json, or None.

    Searched in this order: --like, next to the checkpoint, next to the base of its adapters, the tokenizer
    directory. Raises ConversionError if --like does not exist.
    """
    if given is not None and not given.is_dir():
        raise ConversionError(f"--like {given}: no such directory")
    tokenizer = arguments.get("tokenizer_model")
    roots = [load, *([base] if base is not None else [])]
    beside = [*(root / SIDE for root in roots), *(root.parent / SIDE for root in roots)]
    for path in (given, *beside, Path(tokenizer) if tokenizer else None):
        if path is not None and path.is_dir():
            return path
    return None


def read_notes(side: Path | None) -> dict[str, Any]:
    """Read conversion.json of an import; empty if there is none. Raises ConversionError if it is invalid."""
    if side is None or not (side / NOTES).is_file():
        return {}
    notes = read_object(side / NOTES)
    get = notes.get
    kinds = get("layout") in (*LAYOUTS, None) and get("family") in (*FAMILIES, None)
    if not (kinds and isinstance(get("arguments", {}), dict) and isinstance(get("tied_copy") or "", str)):
        raise ConversionError(f"{side / NOTES}: not written by an import; remove it to export without it")
    tensors = notes.get("tensors")
    for entry in tensors.values() if isinstance(tensors, dict) else [None]:
        file, dtype = (entry.get("file"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
        known = isinstance(getattr(torch, str(dtype), None), torch.dtype)
        if not isinstance(file, str) or Path(file).name != file or not known:
            raise ConversionError(
                f"{side / NOTES}: not written by an import ({entry!r}); remove it to export without it"
            )
    if "arguments" in notes:
        notes["arguments"] = with_present_rule(notes["arguments"], notes.get("rvtc_version"))
    return notes


def plan_export(
    load: Path,
    *,
    base: Path | None = None,
    like: Path | None = None,
    dtype: str | None = None,
    max_shard_size: int = SHARD_BYTES,
    remote_code: bool = False,
) -> ExportPlan:
    """Determine layout, names, types and files of an export.

    Args:
        load: checkpoint directory (the latest iteration is used) or the folder of one iteration.
        base: checkpoint of the base of adapters; None: the one that the checkpoint of adapters names.
        like: directory with a tokenizer and, if the model was imported, the original's files.
        dtype: type of all weights; None: that of the original, or else of training.
        max_shard_size: maximum size of a weight file in bytes.
        remote_code: write our own names and the code to run them without LVTC too.

    Raises ConversionError.
    """
    weights = ModelWeights(load, base)
    folder, arguments = weights.folder, weights.model_arguments
    side = find_side(load, arguments, like, weights.base_path)
    notes = read_notes(side)
    family = weights.family or notes.get("family") or family_of(arguments)
    try:
        sizes = model_sizes(arguments)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ConversionError(
            f"{folder}: its arguments do not describe a model of this project: {reason}"
        ) from error
    layout = "internvlx" if remote_code else _layout(sizes, notes)
    if side is not None and layout == notes.get("layout") != "internvlx":
        read_object(side / "config.json")
    entries = table(sizes, family, layout)
    original: Mapping[str, Any] = notes.get("tensors", {}) if layout == notes.get("layout") else {}
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    fallback = dtype or _model_dtype(original, arguments)
    copy = notes.get("tied_copy") if original and sizes.tied else None
    infos: dict[str, TensorInfo] = {}
    for entry in entries:
        weights.check_shape(entry)
        for name, shape in zip(entry.theirs, entry.shapes, strict=True):
            kept = None if dtype else original.get(name, {}).get("dtype")
            infos[name] = TensorInfo("", shape, getattr(torch, kept or fallback))
    if copy:
        infos[copy] = infos[output_names(family, layout)[1]]
    infos = _files(infos, original, max_shard_size)
    return ExportPlan(
        folder, arguments, family, layout, sizes, fallback, tuple(entries), infos, side, notes, copy, weights.iteration,
        weights, weights.adapters(sizes, entries),
    )  # fmt: skip


def _layout(sizes: ModelSizes, notes: Mapping[str, Any]) -> str:
    """Layout of the export.

    internvlx with LVTC, or if the original had that layout without LVTC; else the original's for a model with MLP
    projector; else chat.
    """
    source = notes.get("layout", "chat")
    without = source == "internvlx" and notes.get("arguments", {}).get("expand_layer") is None
    if sizes.injection_layers or without:
        return "internvlx"
    if source == "internvlx" or (source != "chat" and sizes.projector != "mlp"):
        return "chat"
    return source


def _model_dtype(original: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    if original:
        types = [entry["dtype"] for entry in original.values()]
        return max(set(types), key=types.count)
    return "bfloat16" if arguments.get("bf16") else "float16" if arguments.get("fp16") else "float32"


def _files(infos: dict[str, TensorInfo], original: Mapping[str, Any], limit: int) -> dict[str, TensorInfo]:
    """Assign a file to every tensor: the original's if all names are the same, else by size, in order."""
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
