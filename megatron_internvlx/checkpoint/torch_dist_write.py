"""Write Megatron's distributed checkpoints, one tensor at a time; `torch_dist` describes the format."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from megatron_internvlx.checkpoint.torch_dist import COMMON_KEY, RELEASE, TRACKER, location
from megatron_internvlx.data.rvtc import NAMES_VERSION


def checkpoint_keys(full_name: str, has_experts: bool) -> tuple[list[str], int | None]:
    """All keys of a tensor in a checkpoint, and its index along the leading dimension or None.

    In a model with experts the second norm of a decoder layer gets two keys: a dense layer stores it with the following
    linear layer, a layer with experts under its own name, and the tensor's name does not show the kind of layer.
    """
    key, place = location(full_name)
    both = has_experts and place is None and ".pre_mlp_layernorm." in full_name
    return ([key, full_name] if both else [key]), place


def save_tensor(file: Any, tensor: Tensor) -> tuple[int, int]:
    """Append a tensor to a data file; returns (start, length) in bytes."""
    if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    start, sink = file.tell(), _RecordingFile(file)
    try:
        torch.save(tensor, cast(IO[bytes], sink))
    except RuntimeError as error:
        # torch's archive writer hides the cause of a failed write, such as a full disk.
        raise sink.failure or error from error
    return start, file.tell() - start


class _RecordingFile:
    """File object that stores the error of a failed write."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self._file.flush()


@dataclass(frozen=True)
class WrittenTensor:
    """Position of a written tensor, or of a slice of a stacked tensor."""

    keys: tuple[str, ...]
    place: int | None
    """Index along the leading dimension of a stacked tensor."""
    count: int
    """Size of that dimension; 0: not stacked."""
    shape: tuple[int, ...]
    dtype: str
    file: str
    start: int
    length: int


def append_tensor(
    file: Any, name: str, full_name: str, tensor: Tensor, *, experts: int, vision_layers: int
) -> WrittenTensor:
    """Append one of our tensors to a data file, as Megatron stores it; returns its position.

    Args:
        file: the data file, opened for writing.
        name: its name in the checkpoint's folder.
        full_name: of the tensor.
        tensor: the tensor.
        experts: experts of a layer; 0 for a dense model.
        vision_layers: layers of the vision encoder, which are stacked.
    """
    keys, place = checkpoint_keys(full_name, experts > 0)
    start, length = save_tensor(file, tensor if place is None else tensor[None])
    count = 0 if place is None else experts if ".experts." in keys[0] else vision_layers
    dtype = str(tensor.dtype).removeprefix("torch.")
    return WrittenTensor(tuple(keys), place, count, tuple(tensor.shape), dtype, name, start, length)


def common_state(arguments: Mapping[str, Any], family: str, iteration: int = 0) -> dict[str, Any]:
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


def release_folder(directory: Path) -> Path:
    """Make the folder for the data files of a checkpoint without a step; `write_release` completes it."""
    folder = directory / RELEASE
    folder.mkdir(exist_ok=True)
    return folder


def write_release(directory: Path, written: Iterable[WrittenTensor], common: Mapping[str, Any]) -> None:
    """Complete a directory whose `release_folder` has the data files; see `write_metadata`."""
    write_metadata(directory / RELEASE, written, common)
    (directory / TRACKER).write_text(RELEASE)


def write_metadata(folder: Path, written: Iterable[WrittenTensor], common: Mapping[str, Any]) -> None:
    """Complete a checkpoint folder: `.metadata`, `metadata.json`, the common state and empty extra states.

    Args:
        folder: contains the data files.
        written: all tensors in them.
        common: state besides tensors ("args", "iteration", ...).
    """
    # Imported here, because it takes seconds and an export does not need it.
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    modules: set[tuple[str, int | None, int]] = set()
    for item in written:
        info = _StorageInfo(item.file, item.start, item.length)
        for key in item.keys:
            offsets, sizes, size = [0] * len(item.shape), list(item.shape), list(item.shape)
            if item.place is not None:
                offsets, sizes, size = [item.place, *offsets], [1, *sizes], [item.count, *size]
            entry = tensors.setdefault(
                key,
                TensorStorageMetadata(TensorProperties(getattr(torch, item.dtype)), torch.Size(size), []),
            )
            assert isinstance(entry, TensorStorageMetadata)
            entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            storage[MetadataIndex(key, torch.Size(offsets))] = info
            modules.add((key.rpartition(".")[0], item.place, item.count))
    blobs = {COMMON_KEY: [dict(common)], "extra": [None]}
    places = {}
    with (folder / "__common.distcp").open("wb") as file:
        for name, value in blobs.items():
            start = file.tell()
            torch.save(value, file)
            places[name] = _StorageInfo("__common.distcp", start, file.tell() - start)
    objects = {COMMON_KEY: places[COMMON_KEY]}
    for module, place, count in modules:
        for name in _modules_with_state(module):
            shard = "shard_0_1" if place is None else f"shard_{place}_{count}"
            objects[f"{name}._extra_state/{shard}"] = places["extra"]
    for key, info in objects.items():
        tensors[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = info
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, planner_data={}, storage_data=storage)))
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(config))


def _modules_with_state(module: str) -> Iterable[str]:
    """Modules with an (empty) extra state: linear layers, and Transformer Engine's attention and norms.

    Megatron rejects a checkpoint without an extra state that its model expects, and ignores unknown ones.
    """
    yield module
    if module.endswith(".self_attention.linear_qkv"):
        yield module.replace(".linear_qkv", ".core_attention")
