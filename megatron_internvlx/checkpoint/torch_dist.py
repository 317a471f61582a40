"""Read Megatron's distributed checkpoints (`torch_dist`), one tensor at a time; `torch_dist_write` writes them.

The format is PyTorch's distributed checkpoint: data files, and `.metadata`, which maps parts of tensors to
bytes of files. Megatron adds `metadata.json` with the name of the format. Reading and writing need no process
groups and no model.

Keys differ from full names in three ways, as in Megatron's `sharded_state_dict`: norms that Transformer Engine
fuses into the following linear layer have that layer's name; the experts of a layer, and the vision encoder's
layers, are one tensor with a leading dimension; a tied output layer is not stored.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from megatron_internvlx import platform
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.files import FileWindow

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
COMMON_KEY = "common_state/shard_0_1"

_EXPERT = re.compile(r"\.mlp\.experts\.local_experts\.(\d+)\.")
_VISION_LAYER = re.compile(r"^vision_model\.encoder\.layers\.(\d+)\.")


def location(full_name: str) -> tuple[str, int | None]:
    """Convert a full name to (key in a checkpoint, index along the leading dimension or None)."""
    if match := _EXPERT.search(full_name):
        return _EXPERT.sub(".mlp.experts.experts.", full_name), int(match[1])
    if match := _VISION_LAYER.search(full_name):
        return _VISION_LAYER.sub("vision_model.encoder.layers.", full_name), int(match[1])
    if full_name.startswith("language_model.decoder.layers."):
        name = full_name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
        # In a layer with experts the second norm precedes a router and keeps its name: see `checkpoint_keys`.
        return name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"), None
    return full_name, None


@dataclass(frozen=True)
class Piece:
    """Part of a tensor, and the position of its bytes."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """Shape, type and pieces of a tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


def checkpoint_folder(path: Path) -> Path:
    """Folder of one iteration: `path` itself, or the latest iteration in it. Raises ConversionError."""
    if (path / ".metadata").is_file():
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        raise ConversionError(f"{path}: no checkpoint ({TRACKER} and .metadata are both missing)")
    latest = tracker.read_text(errors="replace").strip()
    if latest != RELEASE and not (latest.isdecimal() and len(latest) < 19):
        raise ConversionError(f"{tracker}: {latest[:40]!r} must be an iteration or '{RELEASE}'")
    folder = path / (latest if latest == RELEASE else f"iter_{int(latest):07d}")
    if not (folder / ".metadata").is_file():
        raise ConversionError(f"{folder}: not a torch_dist checkpoint (no .metadata)")
    return folder


class CheckpointReader:
    """Reader of one checkpoint folder. Raises ConversionError if it is not a complete checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors, self._common = _load_metadata(folder / ".metadata")
        names = {piece.file for stored in self.tensors.values() for piece in stored.pieces}
        if self._common is not None:
            names.add(self._common.file)
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise ConversionError(f"{folder}: data files are missing: {', '.join(missing[:10])}")

    def common(self) -> dict[str, Any]:
        """Read the state besides tensors: Megatron's arguments, the iteration. Raises ConversionError."""
        legacy = self.folder / "common.pt"
        if legacy.is_file():
            return _load_common(legacy, legacy.read_bytes())
        if self._common is None:
            raise ConversionError(f"{self.folder}: neither common.pt nor a common state in .metadata")
        path = self.folder / self._common.file
        with path.open("rb") as file:
            file.seek(self._common.start)
            return _load_common(path, file.read(self._common.length))[0]

    def read(self, full_name: str) -> Tensor:
        """Read a complete tensor by its full name."""
        key, place = self.find(full_name)
        return read_stored(self.folder, self.tensors[key], place)

    def holds(self, full_name: str) -> bool:
        """Whether a tensor is in the checkpoint."""
        return location(full_name)[0] in self.tensors or full_name in self.tensors

    def find(self, full_name: str) -> tuple[str, int | None]:
        """Find (key, index along the leading dimension or None) of a tensor. Raises ConversionError."""
        key, place = location(full_name)
        for candidate in (key, full_name):
            if candidate in self.tensors:
                return candidate, place
        raise ConversionError(f"{self.folder}: the checkpoint has no {key}")


class _Record:
    """Object of a `.metadata` with its fields, for any pickled class.

    Importing torch's own classes takes as long as converting 2 GB.
    """

    def __init__(self, *_: Any) -> None:
        """Ignore the arguments, such as the value of an enumeration member, which is not used."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__ |= state if isinstance(state, dict) else {"state": state}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler that allows only the classes of a `.metadata`, so that a pickle cannot run other code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_GLOBALS:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith(_METADATA_MODULES) and name.isidentifier():
            return type(name, (_Record,), {})
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")


_METADATA_GLOBALS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
}
# A checkpoint contains the path of its folder, as text or as a pathlib object.
_METADATA_MODULES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.", "pathlib")


def _load_metadata(path: Path) -> tuple[dict[str, StoredTensor], Piece | None]:
    """Read (tensors by key, position of the common state or None) from a `.metadata`."""
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if type(metadata).__name__ != "Metadata":
            raise pickle.UnpicklingError(f"expected Metadata, found {type(metadata).__name__}")
        places = {
            (index.fqn, getattr(index, "offset", None)): info for index, info in metadata.storage_data.items()
        }
        tensors = {
            key: _stored_tensor(key, entry, places)
            for key, entry in metadata.state_dict_metadata.items()
            if type(entry).__name__ == "TensorStorageMetadata"
        }
        common = places.get((COMMON_KEY, None))
        return tensors, _piece((), (), common) if common is not None else None
    except Exception as error:  # a broken pickle raises nearly anything
        raise ConversionError(f"{path}: unreadable: {error}") from error


def _stored_tensor(key: str, entry: Any, places: Mapping[tuple[str, Any], Any]) -> StoredTensor:
    pieces = [_piece(chunk.offsets, chunk.sizes, places[key, chunk.offsets]) for chunk in entry.chunks]
    # TensorProperties are pickled as a tuple: type, layout and three other fields.
    return StoredTensor(tuple(entry.size), entry.properties.state[0], tuple(pieces))


def _piece(offsets: Iterable[int], sizes: Iterable[int], info: Any) -> Piece:
    return Piece(tuple(offsets), tuple(sizes), info.relative_path, info.offset, info.length)


def _load_common(path: Path, data: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # a training run's arguments, or broken data
        # When imported, Megatron registers the types of its arguments as safe.
        platform.setup()
        import megatron.training.checkpointing  # noqa: F401
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a broken archive raises many types
        raise ConversionError(
            f"{path}: the arguments of the checkpoint cannot be read ({type(error).__name__}): the file is "
            "broken, or written by another version of Megatron"
        ) from error


@dataclass(frozen=True)
class ByteRange:
    """Range of bytes in a file that are consecutive bytes of a tensor, starting at its byte `at`."""

    path: Path
    start: int
    length: int
    at: int


def byte_ranges(folder: Path, stored: StoredTensor, place: int | None = None) -> list[ByteRange] | None:
    """Byte ranges of a tensor whose pieces are whole rows; None for others, which only `read_stored` can read."""
    shape = stored.shape if place is None else stored.shape[1:]
    runs = []
    for piece in _pieces(folder, stored, place):
        offsets, sizes = piece.offsets, piece.shape
        if place is not None:
            offsets, sizes = offsets[1:], sizes[1:]
        if sizes[1:] != shape[1:]:
            return None
        head = _load_piece(folder, piece, "meta")
        if head.dtype != stored.dtype or not head.is_contiguous():
            return None
        # On the meta device torch stores the position of a storage's bytes instead of reading them.
        skipped: int = head.untyped_storage()._checkpoint_offset  # type: ignore[assignment]
        start = piece.start + skipped + int(head.storage_offset()) * head.itemsize
        length = math.prod(sizes) * head.itemsize
        start += 0 if place is None else (place - piece.offsets[0]) * length
        at = offsets[0] * math.prod(sizes[1:]) * head.itemsize if sizes else 0
        runs.append(ByteRange(folder / piece.file, start, length, at))
    return runs


def _pieces(folder: Path, stored: StoredTensor, place: int | None) -> list[Piece]:
    """Pieces of a tensor, or of its slice at `place`. Raises ConversionError if they are incomplete."""
    pieces = [
        piece
        for piece in stored.pieces
        if place is None or piece.offsets[0] <= place < piece.offsets[0] + piece.shape[0]
    ]
    first = 0 if place is None else 1
    held = sum(math.prod(piece.shape[first:]) for piece in pieces)
    if held != math.prod(stored.shape[first:]):
        raise ConversionError(
            f"{folder}: only {held} values of a tensor {list(stored.shape[first:])} are stored; the checkpoint is "
            "incomplete"
        )
    return pieces


def read_stored(folder: Path, stored: StoredTensor, place: int | None = None) -> Tensor:
    """Read a tensor from its pieces; of a stacked tensor [n, ...] the slice at `place`. Raises ConversionError."""
    shape = stored.shape if place is None else stored.shape[1:]
    whole: Tensor | None = None
    for piece in _pieces(folder, stored, place):
        part = _load_piece(folder, piece)
        offsets, sizes = piece.offsets, piece.shape
        if place is not None:
            part = part.reshape(piece.shape)[place - offsets[0]]
            offsets, sizes = offsets[1:], sizes[1:]
        if tuple(sizes) == tuple(shape):
            return part
        if whole is None:
            whole = torch.empty(shape, dtype=stored.dtype)
        whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] = part
    assert whole is not None
    return whole


def _load_piece(folder: Path, piece: Piece, device: str = "cpu") -> Tensor:
    with (folder / piece.file).open("rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        if end < piece.start + piece.length:
            raise ConversionError(
                f"{folder / piece.file}: ends after {end} bytes, {piece.start + piece.length} expected"
            )
        try:
            window = cast(IO[bytes], FileWindow(file, piece.start, piece.length))
            return torch.load(window, map_location=device, weights_only=True)
        except Exception as error:  # a broken archive raises many types
            raise ConversionError(
                f"{folder / piece.file}: broken data at byte {piece.start}: {error}"
            ) from error
