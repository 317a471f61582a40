"""Import a PEFT directory of adapters to a checkpoint from which training continues, over a base in our format."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_internvlx import files
from megatron_internvlx.checkpoint.adapters import AdaptedWeight, Pair, adapted_weights, target_of_weight
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.export_plan import ExportPlan, plan_export
from megatron_internvlx.checkpoint.mapping import Entry
from megatron_internvlx.checkpoint.peft_config import PeftConfig, read_peft_config
from megatron_internvlx.checkpoint.peft_files import CONFIG, ROOT, WEIGHTS, loaded_table, module_of
from megatron_internvlx.checkpoint.safetensors_io import TensorInfo, read_tensor, tensor_infos
from megatron_internvlx.checkpoint.sources import BASE, BASE_FINGERPRINT, BASE_STEP
from megatron_internvlx.checkpoint.target import file_stamps, fingerprint, new_directory
from megatron_internvlx.checkpoint.torch_dist_write import (
    append_tensor,
    common_state,
    release_folder,
    write_release,
)
from megatron_internvlx.lifecycle.base import base_fingerprint
from megatron_internvlx.lora_settings import TARGETS, LoraSettings

_LORA = re.compile(r"(.+)\.lora_([AB])\.weight")

DATA = "__0_0.distcp"  # as Megatron names the file of the first rank


@dataclass(frozen=True)
class PeftImport:
    """Everything about an import of adapters that is determined before anything is written."""

    base: ExportPlan
    config: PeftConfig
    settings: LoraSettings
    weights: tuple[AdaptedWeight, ...]
    given: frozenset[str]
    """Hugging Face modules with an adapter in the directory."""
    whole: tuple[Entry, ...]
    """Tensors of parts that were trained whole."""
    infos: Mapping[str, TensorInfo]

    @property
    def frozen(self) -> list[str]:
        """Parts of the model in which nothing is trained: those that training must freeze with a flag."""
        whole = {"vision" if entry.ours.startswith("vision_model.") else "projectors" for entry in self.whole}
        return [part for part in ("vision", "projectors", "llm") if part not in whole | self.settings.parts]

    @property
    def added(self) -> int:
        """Number of Hugging Face modules that get an adapter that adds zero."""
        return sum(len(weight.entry.theirs) for weight in self.weights) - len(self.given)


def plan_peft_import(directory: Path, base: Path) -> PeftImport:
    """Determine what becomes of every tensor of a PEFT directory.

    Raises ConversionError, which names modules that our adapters do not cover, and tensors that are missing, unknown
    or of another shape.
    """
    config, infos = read_peft_config(directory), _read_infos(directory)
    plan = plan_export(base)
    if plan.adapters:
        raise ConversionError(
            f"--base {base}: it holds adapters itself; merge them first, with ivlx export --save"
        )
    entries = loaded_table(plan.sizes, plan.family, plan.layout)
    known = {module_of(name): weight for weight in _adaptable(plan, entries) for name in weight.entry.theirs}
    ranks = _module_ranks(directory, config, infos, known)
    whole = _whole_entries(directory, config, entries, infos)
    rank = _common_rank(directory, ranks, known)
    scales = {module: config.scale(module, r) for module, r in ranks.items()}
    first = next(iter(scales))
    if other := next((m for m, s in scales.items() if abs(s / scales[first] - 1) > 1e-6), None):
        raise ConversionError(
            f"{directory}: {first} has scale {scales[first]:g} and {other} {scales[other]:g}; all adapters must have "
            "the same alpha / rank"
        )
    used = {_target(known[module]) for module in ranks}
    # The scale may leave 7.999999999999999 of 8, and training accepts only the value that the summary prints.
    alpha = float(f"{scales[first] * (rank**0.5 if config.rslora else rank):.9g}")
    settings = LoraSettings(
        rank, alpha, config.dropout, [name for name in TARGETS if name in used], config.rslora
    )
    weights = adapted_weights(plan.sizes, entries, settings.targets)
    return PeftImport(plan, config, settings, tuple(weights), frozenset(ranks), whole, infos)


def _adaptable(plan: ExportPlan, entries: Sequence[Entry]) -> list[AdaptedWeight]:
    """Weights that can have adapters in training: those of experts cannot."""
    targets = [name for name in TARGETS if not (plan.sizes.experts and name == "decoder_mlp")]
    return adapted_weights(plan.sizes, entries, targets)


def _target(weight: AdaptedWeight) -> str:
    target = target_of_weight(weight.entry.ours)
    assert target is not None
    return target


def _read_infos(directory: Path) -> dict[str, TensorInfo]:
    if not (directory / WEIGHTS).is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        hint = (
            "only adapter_model.bin, a pickle; save it as safetensors with peft" if pickled else "no adapters"
        )
        raise ConversionError(f"{directory}: no {WEIGHTS} ({hint})")
    infos = tensor_infos(directory, WEIGHTS)
    if not infos:
        raise ConversionError(f"{directory / WEIGHTS}: it has no tensors")
    outside = [name for name in infos if not name.startswith(ROOT)]
    if outside:
        raise ConversionError(f"{directory / WEIGHTS}: {outside[0]}: names must begin with {ROOT}")
    integers = [name for name, info in infos.items() if not info.dtype.is_floating_point]
    if integers:
        raise ConversionError(
            f"{directory / WEIGHTS}: {integers[0]} is {infos[integers[0]].dtype}, not a float type"
        )
    return infos


def _module_ranks(
    directory: Path,
    config: PeftConfig,
    infos: Mapping[str, TensorInfo],
    known: Mapping[str, AdaptedWeight],
) -> dict[str, int]:
    """Rank of each adapted module. Raises ConversionError for unknown or incomplete modules and wrong shapes."""
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in infos.items():
        if match := _LORA.fullmatch(name.removeprefix(ROOT)):
            parts.setdefault(match[1], {})[match[2]] = info
    if not parts:
        raise ConversionError(f"{directory / WEIGHTS}: it has no LoRA tensors (lora_A, lora_B)")
    if unknown := sorted(parts.keys() - known.keys()):
        raise ConversionError(
            f"{directory}: {len(unknown)} adapted modules are not ones that training adapts ("
            f"{', '.join(TARGETS)}; no experts, embeddings or output layers): {', '.join(unknown[:5])}. Train the "
            "adapter without them, or merge it into its base with peft and import that"
        )
    expected = {m for m in known if config.has_adapter(m)} if not config.some_layers else set()
    missing = sorted(expected - parts.keys()) if config.targets != ".*" else []
    missing += [m for m, held in parts.items() if len(held) < 2]
    if missing:
        raise ConversionError(
            f"{directory / WEIGHTS}: {len(missing)} modules of {CONFIG} lack tensors: {', '.join(missing[:5])}"
        )
    ranks = {}
    for module, held in parts.items():
        weight = known[module]
        shape = next(
            s for n, s in zip(weight.entry.theirs, weight.entry.shapes, strict=True) if module_of(n) == module
        )
        rank = config.rank_of(module)
        for letter, wanted in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
            if held[letter].shape != wanted:
                raise ConversionError(
                    f"{directory / WEIGHTS}: {module}.lora_{letter} is {list(held[letter].shape)}, expected "
                    f"{list(wanted)} from {CONFIG} and the base"
                )
        ranks[module] = rank
    return ranks


def _common_rank(directory: Path, ranks: Mapping[str, int], known: Mapping[str, AdaptedWeight]) -> int:
    """Rank of all adapters. Raises ConversionError if they differ, but for modules that fuse projections."""
    fused = {m: len(known[m].widths) // len(known[m].entry.theirs) for m in ranks}
    single = {ranks[m] for m in ranks if fused[m] == 1}
    # With fused modules alone, the rank may be n times that of the projections, or that of all of them.
    wanted = min(single, default=0) or min(ranks.values())
    if other := next((m for m, r in ranks.items() if r not in (wanted, fused[m] * wanted)), None):
        first = next(m for m, r in ranks.items() if r == wanted)
        raise ConversionError(
            f"{directory}: {first} has rank {wanted} and {other} {ranks[other]}; all adapters must have the same rank. "
            "Merge the adapter into its base with peft (merge_and_unload), and import that"
        )
    return wanted


def _whole_entries(
    directory: Path, config: PeftConfig, entries: Sequence[Entry], infos: Mapping[str, TensorInfo]
) -> tuple[Entry, ...]:
    """Entries of the parts that were trained whole. Raises ConversionError if one is incomplete, or of the decoder."""
    saved = {n.removeprefix(ROOT): i for n, i in infos.items() if not _LORA.fullmatch(n.removeprefix(ROOT))}
    owners = {name: entry for entry in entries for name in entry.theirs}
    if missing := sorted(name for name in owners if name not in saved and config.saves(name)):
        raise ConversionError(
            f"{directory / WEIGHTS}: {len(missing)} tensors of the modules_to_save in {CONFIG} are missing: "
            f"{', '.join(missing[:5])}"
        )
    wrong = [
        name for name in saved
        if name not in owners
        or not (owners[name].is_projector or owners[name].ours.startswith("vision_model."))
    ]  # fmt: skip
    if wrong:
        raise ConversionError(
            f"{directory / WEIGHTS}: {len(wrong)} tensors are neither adapters nor weights of projectors or of the "
            f"vision encoder: {', '.join(sorted(wrong)[:5])}"
        )
    whole = []
    for part in ("projectors", "vision"):
        mine = [
            e for e in entries if (e.is_projector if part == "projectors" else e.ours.startswith("vision_"))
        ]
        held = [name for entry in mine for name in entry.theirs if name in saved]
        if not held:
            continue
        for entry in mine:
            for name, shape in zip(entry.theirs, entry.shapes, strict=True):
                if name not in saved or saved[name].shape != shape:
                    state = f"is {list(saved[name].shape)}" if name in saved else "is missing"
                    raise ConversionError(
                        f"{directory / WEIGHTS}: {name} {state}, expected {list(shape)}: of {part} that were trained "
                        "whole, all tensors must be there"
                    )
        whole += mine
    return tuple(whole)


def import_peft(directory: Path, save: Path, base: Path, *, seed: int = 1234) -> PeftImport:
    """Write the adapters of a PEFT directory to the checkpoint `save`, which training loads over `base`.

    Raises ConversionError; `save` then does not exist.
    """
    plan = plan_peft_import(directory, base)
    needed = sum(info.nbytes for info in plan.infos.values()) * 3 + (64 << 20)
    mark = fingerprint("peft", file_stamps(directory, [CONFIG, WEIGHTS]), plan.base.weights.stamps(), seed)
    with new_directory(save, mark, needed) as target:
        written = []
        with (release_folder(target.partial) / DATA).open("wb", buffering=1 << 20) as file:
            for name, tensor in _tensors(directory, plan, seed):
                layers = plan.base.sizes.vision.num_layers
                written.append(append_tensor(file, DATA, name, tensor, experts=0, vision_layers=layers))
        common = common_state(_arguments(plan, base), plan.base.family)
        # Training reads from here on which base the adapters were trained, and how.
        common["args"] = Namespace(**common["internvlx"]["arguments"])
        write_release(target.partial, written, common)
    return plan


def _arguments(plan: PeftImport, base: Path) -> dict[str, Any]:
    """Arguments of the checkpoint: the base's, those of the adapters, and no progress."""
    lora = {field.name: getattr(plan.settings, field.name) for field in fields(LoraSettings)}
    progress = ("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples")
    return {
        **plan.base.arguments,
        **lora,
        **dict.fromkeys(progress, 0),
        **{f"freeze_{part}": part in plan.frozen for part in ("vision", "projectors", "llm")},
        BASE: str(base),
        BASE_FINGERPRINT: base_fingerprint(plan.base.folder),
        BASE_STEP: files.step_of(plan.base.folder),
    }


def _tensors(directory: Path, plan: PeftImport, seed: int) -> Any:
    """Yield (full name, tensor) of every tensor of the checkpoint. Raises ConversionError for values that are NaN."""

    def read(name: str) -> Tensor:
        tensor = read_tensor(directory, WEIGHTS, ROOT + name)
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ConversionError(f"{directory / WEIGHTS}: {ROOT + name} has values that are not finite")
        return tensor

    types = [info.dtype for info in plan.infos.values()]
    dtype = max(set(types), key=types.count)
    for weight in plan.weights:
        pairs: list[Pair | None] = []
        for module in map(module_of, weight.entry.theirs):
            given = module in plan.given
            pairs.append(
                (read(f"{module}.lora_A.weight"), read(f"{module}.lora_B.weight")) if given else None
            )
        made = weight.from_theirs(pairs, plan.settings.lora_rank or 0, seed)
        yield from zip(weight.names, (tensor.to(dtype) for tensor in made), strict=True)
    for entry in plan.whole:
        yield entry.ours, entry.op.to_ours([read(name) for name in entry.theirs])
