"""Adapters in PEFT's format: a directory with `adapter_config.json` and `adapter_model.safetensors`.

Names are those that `peft` gives the modules of the exported base. A Hugging Face module that fuses n projections
(InternLM2's wqkv, the vision encoder's qkv) gets an adapter of rank n*r and an alpha that keeps the scale. Parts that
were trained whole are PEFT's `modules_to_save`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_internvlx.checkpoint.adapters import AdaptedWeight
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.export_plan import ExportPlan, plan_export
from megatron_internvlx.checkpoint.mapping import Entry, table
from megatron_internvlx.checkpoint.safetensors_io import (
    TensorInfo,
    plan_shard,
    tensor_bytes,
    write_at,
    write_header,
)
from megatron_internvlx.checkpoint.sources import StoredAdapter
from megatron_internvlx.checkpoint.target import fingerprint, new_directory
from megatron_internvlx.lora_settings import LoraSettings
from megatron_internvlx.model.sizes import ModelSizes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."


def loaded_table(sizes: ModelSizes, family: str, layout: str) -> list[Entry]:
    """Table with the names that modules have once the exported base is loaded.

    transformers renames the weights of older directories of its own InternVL when it loads them.
    """
    return table(sizes, family, "native" if layout == "native_old" else layout)


def module_of(name: str) -> str:
    """Module of a Hugging Face weight."""
    return name.removesuffix(".weight")


@dataclass(frozen=True)
class PeftExport:
    """Finished export of adapters."""

    plan: ExportPlan
    modules: int
    """Number of Hugging Face modules with an adapter."""
    saved: tuple[str, ...]
    """Modules that were trained whole."""
    size: int
    """Bytes of the weights."""


def export_peft(
    load: Path,
    directory: Path,
    *,
    base: Path | None = None,
    base_name: str | None = None,
    dtype: str | None = None,
    remote_code: bool = False,
) -> PeftExport:
    """Write the adapters of a checkpoint to a PEFT directory.

    Args:
        load: checkpoint of adapters, or the folder of one iteration.
        directory: to write.
        base: checkpoint of the base; None: the one that the checkpoint names.
        base_name: `base_model_name_or_path`, the exported base's directory or its name on a hub. None: left open.
        dtype: type of the tensors; None: that of training.
        remote_code: the base was exported so; see `plan_export`.

    Raises ConversionError; `directory` then does not exist.
    """
    plan = plan_export(load, base=base, dtype=dtype, remote_code=remote_code)
    if not plan.adapters:
        raise ConversionError(
            f"{plan.folder}: it has no adapters (--lora-rank was not set in its training); --hf exports it whole"
        )
    entries = loaded_table(plan.sizes, plan.family, plan.layout)
    whole = [entry for entry in entries if plan.weights.reader.holds(entry.ours)]
    saved = saved_modules(plan.folder, whole)
    adapters = [_renamed(plan.adapters[e.ours], e) for e in entries if e.ours in plan.adapters]
    config = adapter_config(plan.weights.lora, entries, [a.weight for a in adapters], saved, base_name)
    infos = _tensor_infos(plan, adapters, whole, dtype)
    shard = plan_shard(WEIGHTS, infos)
    mark = fingerprint("peft", plan.weights.stamps(), config, dtype)
    with new_directory(directory, mark, shard.size + (16 << 20)) as target:
        write_header(target.partial, shard)
        descriptor = os.open(target.partial / WEIGHTS, os.O_WRONLY)
        try:
            for name, tensor in _tensors(plan, adapters, whole):
                data = tensor_bytes(tensor.to(infos[name].dtype))
                write_at(descriptor, data, shard.offsets[name])
        finally:
            os.close(descriptor)
        (target.partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (target.partial / "README.md").write_text(_card(plan, config), encoding="utf-8")
    return PeftExport(plan, sum(len(a.weight.entry.theirs) for a in adapters), saved, shard.size)


def _renamed(adapter: StoredAdapter, entry: Entry) -> StoredAdapter:
    weight = AdaptedWeight(entry, adapter.weight.widths, adapter.weight.order)
    return StoredAdapter(weight, adapter.lora_a, adapter.lora_b, adapter.scale)


def saved_modules(folder: Path, whole: Sequence[Entry]) -> tuple[str, ...]:
    """Hugging Face modules that hold the weights trained whole: projectors and the vision encoder.

    Raises ConversionError for weights of the decoder, which PEFT would have to save as a whole.
    """
    groups: dict[str, list[str]] = {}
    for entry in whole:
        if not entry.is_projector and not entry.ours.startswith("vision_model."):
            raise ConversionError(
                f"{folder}: the language model was trained whole ({entry.ours}), so an adapter of the other parts "
                "would be useless without it; export the merged model with --hf"
            )
        group = entry.ours.partition("projector.")[0] if entry.is_projector else "vision"
        groups.setdefault(group, []).extend(name.replace(".", "/") for name in entry.theirs)
    return tuple(os.path.commonpath(names).replace("/", ".") for names in groups.values())


def adapter_config(
    lora: LoraSettings,
    entries: Iterable[Entry],
    adapted: Sequence[AdaptedWeight],
    saved: Sequence[str],
    base_name: str | None,
) -> dict[str, Any]:
    """Content of adapter_config.json.

    Args:
        lora: settings of the adapters.
        entries: all tensors of the base.
        adapted: weights with an adapter.
        saved: modules that were trained whole.
        base_name: directory or name of the base, or None.
    """
    assert lora.lora_rank is not None
    modules = {module_of(name): weight for weight in adapted for name in weight.entry.theirs}
    others = {module_of(name) for entry in entries for name in entry.theirs} - set(modules)
    suffixes = {module: unique_suffix(module, others) for module in modules}
    ranks, alphas = {}, {}
    for module, weight in modules.items():
        fused = len(weight.widths) // len(weight.entry.theirs)
        if fused > 1:
            ranks[suffixes[module]] = fused * lora.lora_rank
            # The scale is alpha / rank, or alpha / sqrt(rank).
            alphas[suffixes[module]] = lora.alpha * (fused**0.5 if lora.lora_rslora else fused)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "r": lora.lora_rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": sorted(set(suffixes.values())),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": list(saved) or None,
        "use_rslora": lora.lora_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def unique_suffix(module: str, others: Collection[str]) -> str:
    """Shortest end of a module's name, in whole words, that is the end of no other module's name."""
    words = module.split(".")
    for count in range(1, len(words)):
        suffix = ".".join(words[-count:])
        if not any(other == suffix or other.endswith(f".{suffix}") for other in others):
            return suffix
    return module


def _tensor_infos(
    plan: ExportPlan, adapters: Sequence[StoredAdapter], whole: Sequence[Entry], dtype: str | None
) -> dict[str, TensorInfo]:
    infos = {}
    for adapter in adapters:
        kind = getattr(torch, dtype) if dtype else adapter.lora_b.tensor.dtype
        a, b = (torch.empty(at.shape, device="meta") for at in (adapter.lora_a, adapter.lora_b))
        inputs, theirs = a.shape[2], adapter.weight.entry.theirs
        rank = a.shape[1] * (len(adapter.weight.widths) // len(theirs))
        for name, shape in zip(theirs, adapter.weight.entry.shapes, strict=True):
            root = ROOT + module_of(name)
            infos[f"{root}.lora_A.weight"] = TensorInfo(WEIGHTS, (rank, inputs), kind)
            infos[f"{root}.lora_B.weight"] = TensorInfo(
                WEIGHTS, (shape[0], b.shape[1] * rank // a.shape[1]), kind
            )
    for entry in whole:
        kind = getattr(torch, dtype) if dtype else plan.weights.find(entry.ours).tensor.dtype
        for name, shape in zip(entry.theirs, entry.shapes, strict=True):
            infos[ROOT + name] = TensorInfo(WEIGHTS, shape, kind)
    return infos


def _tensors(
    plan: ExportPlan, adapters: Sequence[StoredAdapter], whole: Sequence[Entry]
) -> Iterable[tuple[str, Tensor]]:
    """Yield every tensor of the directory with its name."""
    for adapter in adapters:
        pairs = adapter.weight.to_theirs(*adapter.read())
        for name, (a, b) in zip(adapter.weight.entry.theirs, pairs, strict=True):
            yield f"{ROOT}{module_of(name)}.lora_A.weight", a
            yield f"{ROOT}{module_of(name)}.lora_B.weight", b
    for entry in whole:
        parts = entry.op.to_theirs(plan.weights.find(entry.ours).read())
        for name, tensor in zip(entry.theirs, parts, strict=True):
            yield ROOT + name, tensor


def _card(plan: ExportPlan, config: dict[str, Any]) -> str:
    """Text of README.md."""
    base = config["base_model_name_or_path"] or "the exported base"
    whole = ", ".join(config["modules_to_save"] or ()) or "nothing"
    return (
        "---\nlibrary_name: peft\n"
        + (
            f"base_model: {base}\n"
            if config["base_model_name_or_path"] and not Path(base).is_absolute()
            else ""
        )
        + "---\n\n# LoRA adapters of an InternVL-X model\n\n"
        f"Rank {config['r']}, alpha {config['lora_alpha']:g}, {plan.iteration} steps of training. Modules that were "
        f"trained whole: {whole}.\n\n"
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForImageTextToText\n\n"
        f'base = AutoModelForImageTextToText.from_pretrained("{base}", trust_remote_code=True)\n'
        'model = PeftModel.from_pretrained(base, "this directory")\n```\n'
    )
