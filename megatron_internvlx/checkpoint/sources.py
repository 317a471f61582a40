"""Weights of a model as they are stored: in one checkpoint, or in a checkpoint of adapters and its base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_internvlx.checkpoint.adapters import AdaptedWeight, adapted_weights
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.mapping import Entry
from megatron_internvlx.checkpoint.ops import our_shape
from megatron_internvlx.checkpoint.torch_dist import (
    CheckpointReader,
    StoredTensor,
    checkpoint_folder,
    read_stored,
)
from megatron_internvlx.config import settings_from
from megatron_internvlx.data.rvtc import stored_policy
from megatron_internvlx.lifecycle.base import base_checkpoint_of, base_fingerprint
from megatron_internvlx.lora_settings import LoraSettings
from megatron_internvlx.model.sizes import ModelSizes

BASE, BASE_FINGERPRINT, BASE_STEP = "lora_base", "lora_base_fingerprint", "lora_base_step"
"""Arguments of a checkpoint of adapters: path of its base as it was given, what identifies it, and its step."""


@dataclass(frozen=True)
class Location:
    """Place of a tensor in a checkpoint's folder."""

    folder: str
    key: str
    tensor: StoredTensor
    place: int | None
    """Index along the leading dimension of a stacked tensor, or None."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor, or of its slice."""
        return self.tensor.shape if self.place is None else self.tensor.shape[1:]

    def read(self) -> Tensor:
        """Read the tensor. Raises ConversionError if it is incomplete."""
        return read_stored(Path(self.folder), self.tensor, self.place)


@dataclass(frozen=True)
class StoredAdapter:
    """Adapter of one weight, as it is stored."""

    weight: AdaptedWeight
    lora_a: Location
    lora_b: Location
    scale: float

    def read(self) -> tuple[Tensor, Tensor]:
        """Read (lora_a, lora_b)."""
        return self.lora_a.read(), self.lora_b.read()

    def change(self) -> Tensor:
        """Change of the weight by the adapter, in fp32."""
        return self.weight.change(*self.read(), self.scale)


class ModelWeights:
    """Weights of a checkpoint; of one of adapters, with those of its base.

    Args:
        load: checkpoint directory (the latest iteration is used) or the folder of one iteration.
        base: checkpoint of the base of adapters; None: the path in the checkpoint of adapters.

    Raises:
        ConversionError: no checkpoint, or a base that is not the one on which the adapters were trained.
    """

    def __init__(self, load: Path, base: Path | None = None) -> None:
        self.folder = checkpoint_folder(load)
        self.reader = CheckpointReader(self.folder)
        self.arguments, self.family, self.iteration = read_arguments(self.reader)
        self.lora = settings_from(self.arguments, LoraSettings)
        self.base: CheckpointReader | None = None
        self.base_path: Path | None = None
        if self.lora.lora_rank is None:
            if base is not None:
                raise ConversionError(
                    f"--base {base}: {self.folder} has no adapters, and so no base; leave it out"
                )
            return
        self.base_path = base or self._named_base()
        kept = base_checkpoint_of(self.base_path, self.arguments.get(BASE_STEP))
        self.base = CheckpointReader(checkpoint_folder(kept or self.base_path))
        check_base(self.folder, self.base.folder, self.arguments)
        self.family = self.family or read_arguments(self.base)[1]

    def _named_base(self) -> Path:
        name = self.arguments.get(BASE)
        if not name:
            raise ConversionError(
                f"{self.folder}: it holds adapters and does not name their base; use --base"
            )
        if not Path(name).is_dir():
            raise ConversionError(
                f"{self.folder}: the base of its adapters, {name}, is not there; ivlx export takes its place with "
                "--base, and a merged export or checkpoint needs none"
            )
        return Path(name)

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Arguments of the model without adapters."""
        return without_lora(self.arguments)

    def stamps(self) -> list[tuple[str, int]]:
        """Folders and times of writing of the checkpoints, for the mark of a conversion."""
        readers = [self.reader] if self.base is None else [self.reader, self.base]
        return [(str(r.folder), (r.folder / ".metadata").stat().st_mtime_ns) for r in readers]

    def find(self, full_name: str) -> Location:
        """Find a tensor: in the checkpoint, else in the base. Raises ConversionError."""
        reader = self.reader
        if self.base is not None and not reader.holds(full_name):
            reader = self.base
        key, place = reader.find(full_name)
        return Location(str(reader.folder), key, reader.tensors[key], place)

    def adapters(self, sizes: ModelSizes, entries: Iterable[Entry]) -> dict[str, StoredAdapter]:
        """Adapters of the weights in a table, by our name of the weight.

        Raises ConversionError if one is missing, or has another shape than the rank and the weight give.
        """
        if self.lora.lora_rank is None:
            return {}
        found = {}
        for weight in adapted_weights(sizes, entries, self.lora.targets):
            places: list[Location] = []
            for name, shape in zip(weight.names, weight.shapes(self.lora.lora_rank), strict=True):
                key, place = self.reader.find(name)
                at = Location(str(self.folder), key, self.reader.tensors[key], place)
                if at.shape != shape:
                    raise ConversionError(f"{self.folder}: {key} is {list(at.shape)}, expected {list(shape)}")
                places.append(at)
            found[weight.entry.ours] = StoredAdapter(weight, places[0], places[1], self.lora.scale)
        return found

    def check_shape(self, entry: Entry) -> None:
        """Check the shape of a stored tensor. Raises ConversionError."""
        stored, wanted = self.find(entry.ours), our_shape(entry.shapes)
        vocabulary = entry.ours.endswith(("word_embeddings.weight", "output_layer.weight"))
        # The vocabulary may be padded for the layout of training.
        fits = vocabulary and stored.shape[0] >= wanted[0] and stored.shape[1:] == wanted[1:]
        if stored.shape != wanted and not fits:
            raise ConversionError(
                f"{stored.folder}: {stored.key} is {list(stored.shape)}, expected {list(wanted)} from its arguments"
            )


def check_base(adapters: Path, base: Path, arguments: Mapping[str, Any]) -> None:
    """Check that a base is the one on which adapters were trained. Raises ConversionError with both fingerprints."""
    try:
        wanted, found = arguments.get(BASE_FINGERPRINT), base_fingerprint(base)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    if wanted != found:
        raise ConversionError(
            f"{base} (fingerprint {found}) is not the base of the adapters in {adapters}, which is "
            f"{arguments.get(BASE)} (fingerprint {wanted}); name that one with --base"
        )


def without_lora(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without those of adapters."""
    names = {field.name for field in fields(LoraSettings)} | {BASE, BASE_FINGERPRINT, BASE_STEP}
    return {name: value for name, value in arguments.items() if name not in names}


def read_arguments(reader: CheckpointReader) -> tuple[dict[str, Any], str, int]:
    """Read (arguments, family or "", iteration) of a checkpoint. Raises ConversionError."""
    common = reader.common()
    imported = common.get("internvlx")
    if imported:
        arguments = with_present_rule(imported["arguments"], imported.get("rvtc_version"))
        return arguments, imported["family"], imported.get("iteration", 0)
    if common.get("args") is None:
        raise ConversionError(f"{reader.folder}: it has no arguments, so its model is unknown")
    arguments = dict(vars(common["args"]))
    if "expand_layer" not in arguments:
        raise ConversionError(f"{reader.folder}: not a checkpoint of this project (no InternVL-X settings)")
    arguments = with_present_rule(arguments, arguments.get("rvtc_version"))
    return arguments, "", int(common.get("iteration", 0))


def with_present_rule(arguments: Mapping[str, Any], version: int | None) -> dict[str, Any]:
    """Arguments with the present name of their RVTC rule; `version` is that of the names they were stored with."""
    if "rvtc" not in arguments:
        return dict(arguments)
    return {**arguments, "rvtc": stored_policy(arguments["rvtc"], version)}
