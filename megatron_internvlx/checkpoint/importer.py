"""Import a Hugging Face directory to a torch_dist checkpoint that loads into any layout.

Besides the weights the checkpoint contains `recipe.yaml` (the arguments to train it) and `hf/` (all files of the
directory except weights, and `conversion.json`), so that an export can reproduce the directory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from megatron_internvlx.checkpoint.counts import check_counts
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.hf_config import (
    ModelConfig,
    model_config,
    read_config,
)
from megatron_internvlx.checkpoint.import_recipe import recipe_text
from megatron_internvlx.checkpoint.initial import initial_matrix, named_generator
from megatron_internvlx.checkpoint.mapping import Entry, output_names, table
from megatron_internvlx.checkpoint.ops import our_shape
from megatron_internvlx.checkpoint.safetensors_io import INDEX, WeightFiles, read_tensor
from megatron_internvlx.checkpoint.target import (
    file_stamps,
    fingerprint,
    group_by_size,
    new_directory,
    run_units,
)
from megatron_internvlx.checkpoint.torch_dist_write import (
    WrittenTensor,
    append_tensor,
    common_state,
    release_folder,
    write_release,
)
from megatron_internvlx.config import CompressionSettings, check_projector, settings_from
from megatron_internvlx.data.rvtc import NAMES_VERSION
from megatron_internvlx.model.sizes import ModelSizes, model_sizes

SIDE, NOTES, RECIPE = "hf", "conversion.json", "recipe.yaml"
UNIT_BYTES = 256 << 20
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
# Buffers stored by old transformers versions; they are computed from the configuration.
_DERIVED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".embeddings.position_ids")


@dataclass(frozen=True)
class Source:
    """A tensor to create: its table entry and the files of its parts; without files it is initialised."""

    entry: Entry
    files: tuple[str, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        itemsize = getattr(torch, self.dtype).itemsize
        return sum(torch.Size(shape).numel() for shape in self.entry.shapes) * itemsize


@dataclass(frozen=True)
class ImportPlan:
    """Everything about an import that is determined before anything is written."""

    config: ModelConfig
    sizes: ModelSizes
    sources: tuple[Source, ...]
    initialised: tuple[str, ...]
    """Full names of tensors that are missing in the directory and are initialised."""
    unused: tuple[str, ...]
    """Tensors of the directory that are not in the model."""
    derived: tuple[str, ...]
    """Stored buffers that are computed from the configuration."""

    @property
    def nbytes(self) -> int:
        """Size of the checkpoint's tensors in bytes."""
        return sum(source.nbytes for source in self.sources)


def plan_import(
    directory: Path, weights: WeightFiles, changes: Mapping[str, Any], *, init_missing: bool = False
) -> ImportPlan:
    """Determine the source of every tensor.

    Args:
        directory: Hugging Face directory with config.json.
        weights: tensors of the directory.
        changes: compression settings that override those of the directory (projector, expand_layer, ...).
        init_missing: initialise projectors that are missing in the directory.

    Raises:
        ConversionError: names the tensors that are missing, unknown or of another shape.
    """
    found = model_config(read_config(directory), weights)
    config = replace(found, arguments={**found.arguments, **changes})
    try:
        sizes = model_sizes(config.arguments)
        compression = settings_from(config.arguments, CompressionSettings)
        check_projector(compression, hidden_size=sizes.hidden, tensor_parallel=1)
    except ValueError as error:
        raise ConversionError(f"{'' if changes else 'config.json: '}{error}") from error
    check_counts(sizes, config.layout, weights.names)
    sources: list[Source] = []
    missing: list[Entry] = []
    mismatched: list[Entry] = []
    used: set[str] = set()
    for entry in table(sizes, config.family, config.layout):
        state = _compare(entry, weights)
        if state == "there":
            used |= set(entry.theirs)
            files = tuple(weights.tensors[name].file for name in entry.theirs)
            sources.append(Source(entry, files, _dtype_of(entry, weights)))
        elif entry.is_projector and (init_missing or state == "missing"):
            missing.append(entry)
            sources.append(Source(entry, (), config.dtype))
        else:
            (missing if state == "missing" else mismatched).append(entry)
    output, _ = output_names(config.family, config.layout)
    used |= {output} if sizes.tied else set()
    left = sorted(weights.names - used)
    derived = [name for name in left if name.endswith(_DERIVED)]
    unused = [name for name in left if not name.endswith(_DERIVED)]
    _check_tensors(directory, weights, missing, mismatched, unused, init_missing)
    return ImportPlan(
        config, sizes, tuple(sources), tuple(e.ours for e in missing), tuple(unused), tuple(derived)
    )


def _compare(entry: Entry, weights: WeightFiles) -> str:
    infos = [weights.tensors.get(name) for name in entry.theirs]
    if any(info is None for info in infos):
        return "missing"
    same = all(info.shape == shape for info, shape in zip(infos, entry.shapes, strict=True))  # type: ignore[union-attr]
    return "there" if same else "mismatch"


def _dtype_of(entry: Entry, weights: WeightFiles) -> str:
    types = {weights.tensors[name].dtype for name in entry.theirs}
    if len(types) > 1:
        raise ConversionError(
            f"{', '.join(entry.theirs)} must have the same type to be joined, found {types}"
        )
    return str(types.pop()).removeprefix("torch.")


def _check_tensors(
    directory: Path,
    weights: WeightFiles,
    missing: Sequence[Entry],
    mismatched: Sequence[Entry],
    unused: Sequence[str],
    init_missing: bool,
) -> None:
    if mismatched:
        lines = []
        for entry in mismatched:
            for name, shape in zip(entry.theirs, entry.shapes, strict=True):
                if weights.tensors[name].shape != shape:
                    lines.append(f"{name} is {list(weights.tensors[name].shape)}, expected {list(shape)}")
        raise ConversionError(
            f"{directory}: config.json: {len(lines)} tensors have other shapes than expected from it; correct it, or "
            "use the weights that belong to it:\n  " + _join_limited(lines, 10)
        )
    absent = [name for e in missing if not e.is_projector for name in e.theirs if name not in weights.names]
    if absent:
        raise ConversionError(f"{directory}: {len(absent)} tensors are missing:\n  " + _join_limited(absent))
    if missing and not init_missing:
        names = [name for entry in missing for name in entry.theirs if name not in weights.names]
        raise ConversionError(
            f"{directory}: no projector of this kind; --init-missing would initialise\n  "
            + _join_limited(names)
        )
    replaced = (
        "mlp1.",
        "projector.",
        "lvtc_projectors.",
        "multi_modal_projector.",
        "model.multi_modal_projector.",
    )
    unknown = [name for name in unused if not (init_missing and name.startswith(replaced))]
    if unknown:
        raise ConversionError(
            f"{directory}: {len(unknown)} tensors are not in this model:\n  " + _join_limited(unknown)
        )


def _join_limited(names: Sequence[str], most: int = 40) -> str:
    more = [f"... and {len(names) - most} more"] if len(names) > most else []
    return "\n  ".join([*names[:most], *more])


# ----------------------------------------------------------------------------------------- tensors


def initial_value(entry: Entry, dtype: str, seed: int) -> Tensor:
    """Initial value of a missing tensor, as in a new model, drawn from the seed and the tensor's name.

    Norm weights are 1, biases 0, `cls_scale` standard normal, matrices uniform within 1/sqrt(columns).
    """
    shape = our_shape(entry.shapes)
    leaf = entry.ours.split(".")
    if entry.ours.endswith("cls_scale"):
        value = torch.randn(shape, generator=named_generator(seed, entry.ours))
    elif leaf[-1] == "bias":
        value = torch.zeros(shape)
    elif len(shape) == 1:
        value = torch.ones(shape)
    else:
        value = initial_matrix(shape, seed, entry.ours)
    return value.to(getattr(torch, dtype))


@dataclass(frozen=True)
class Unit:
    """Group of tensors that one process writes into one data file."""

    number: int
    directory: str
    pickled: bool
    folder: str
    sources: tuple[Source, ...]
    seed: int
    experts: int
    vision_layers: int


def write_unit(unit: Unit) -> list[dict[str, Any]]:
    """Write one data file; returns the positions of its tensors, as dictionaries of WrittenTensor."""
    # The checksums of torch's archives would double the time; safetensors has none either.
    torch.serialization.set_crc32_options(False)
    torch.set_num_threads(1)
    name = f"__{unit.number}_0.distcp"
    written = []
    with (Path(unit.folder) / name).open("wb", buffering=1 << 20) as file:
        for source in unit.sources:
            tensor = make_tensor(Path(unit.directory), source, unit.pickled, unit.seed)
            where = append_tensor(
                file, name, source.entry.ours, tensor, experts=unit.experts, vision_layers=unit.vision_layers
            )
            written.append(asdict(where))
    return written


def make_tensor(directory: Path, source: Source, pickled: bool, seed: int) -> Tensor:
    """Create one of our tensors: read and converted, or initialised."""
    if not source.files:
        return initial_value(source.entry, source.dtype, seed)
    parts = [
        read_tensor(directory, file, name, pickled)
        for file, name in zip(source.files, source.entry.theirs, strict=True)
    ]
    return source.entry.op.to_ours(parts)


# ---------------------------------------------------------------------------------- the conversion


def import_checkpoint(
    directory: Path,
    save: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    init_missing: bool = False,
    allow_pickle: bool = False,
    seed: int = 1234,
    processes: int = 2,
    quiet: bool = False,
) -> ImportPlan:
    """Write the Hugging Face directory `directory` to the checkpoint `save`.

    Raises ConversionError; `save` then does not exist.
    """
    weights = WeightFiles(directory, allow_pickle=allow_pickle)
    plan = plan_import(directory, weights, changes or {}, init_missing=init_missing)
    files = sorted({info.file for info in weights.tensors.values()})
    mark = fingerprint("import", file_stamps(directory, ["config.json", *files]), plan.config.arguments, seed)
    needed = plan.nbytes + (64 << 20)
    with new_directory(save, mark, needed) as target:
        folder = release_folder(target.partial)
        groups = group_by_size([source.nbytes for source in plan.sources], UNIT_BYTES)
        units = [
            Unit(
                number, str(directory), weights.pickled, str(folder),
                tuple(plan.sources[i] for i in group), seed, plan.sizes.experts,
                plan.sizes.vision.num_layers,
            )
            for number, group in enumerate(groups)
        ]  # fmt: skip
        sizes = [sum(source.nbytes for source in unit.sources) for unit in units]
        # Import the slow modules of `write_metadata` while this process waits for the others.
        Thread(target=import_module, args=["torch.distributed.checkpoint.filesystem"], daemon=True).start()
        results = run_units(
            target, units, write_unit, sizes=sizes, processes=processes, title="import", quiet=quiet
        )
        written = [WrittenTensor(**item) for number in sorted(results) for item in results[number]]
        write_release(target.partial, written, common_state(plan.config.arguments, plan.config.family))
        write_side_files(directory, target.partial / SIDE, weights, plan)
        recipe = recipe_text(recipe_of(plan, save.resolve()), directory.resolve())
        (target.partial / RECIPE).write_text(recipe, encoding="utf-8")
    return plan


def recipe_of(plan: ImportPlan, save: Path) -> dict[str, Any]:
    """Arguments of the imported model and its checkpoint; `import_recipe` adds settings for training."""
    arguments = dict(plan.config.arguments)
    arguments["seq_length"] = min(arguments["max_position_embeddings"], 4096)
    arguments["tokenizer_model"] = str(save / SIDE)
    arguments["load"] = str(save)
    if plan.config.dtype == "bfloat16":
        arguments["bf16"] = True
    return arguments


def write_side_files(directory: Path, side: Path, weights: WeightFiles, plan: ImportPlan) -> None:
    """Copy all files except weights, and write to conversion.json how the weights were stored."""
    side.mkdir(exist_ok=True)
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.suffix not in _WEIGHT_SUFFIXES:
            shutil.copyfile(path, side / path.name)
    tied, _ = output_names(plan.config.family, plan.config.layout)
    notes = {
        "layout": plan.config.layout,
        "family": plan.config.family,
        "arguments": plan.config.arguments,
        "rvtc_version": NAMES_VERSION,
        "initialised": list(plan.initialised),
        "unused": list(plan.unused),
        "derived": list(plan.derived),
        "has_index": (directory / INDEX).is_file(),
        "tied_copy": tied if plan.sizes.tied and tied in weights.names else None,
        "tensors": {
            name: {"file": info.file, "dtype": str(info.dtype).removeprefix("torch.")}
            for name, info in weights.tensors.items()
        },
    }
    (side / NOTES).write_text(json.dumps(notes, indent=1))
