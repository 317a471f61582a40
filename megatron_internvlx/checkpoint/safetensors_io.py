"""Read and write Hugging Face weight files, one tensor at a time.

Reading uses the safetensors library. It can only write a file whose tensors are all in memory, so files
are written here: the length of the header in 8 bytes, the header as JSON, then the tensors.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_internvlx.checkpoint.checks import read_object
from megatron_internvlx.checkpoint.errors import ConversionError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """File, shape and type of a tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class WeightFiles:
    """Weights of a Hugging Face directory.

    Args:
        directory: contains config.json and the weights.
        allow_pickle: read `pytorch_model*.bin` too, with torch's restricted loader; unpickling could
            otherwise run code of its author.

    Raises:
        ConversionError: no weights, a listed file is missing or broken, or pickles without `allow_pickle`.
    """

    def __init__(self, directory: Path, *, allow_pickle: bool = False) -> None:
        if not directory.is_dir():
            raise ConversionError(f"{directory}: no such directory")
        self.directory = directory
        self.index: dict[str, Any] | None = None
        self.pickled = False
        files = self._files(allow_pickle)
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in (
                self._pickle_infos(file) if self.pickled else tensor_infos(directory, file)
            ).items():
                if name in self.tensors:
                    raise ConversionError(
                        f"{directory}: {name} is both in {self.tensors[name].file} and {file}"
                    )
                self.tensors[name] = info
        self._check_index()

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self.tensors)

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same bits."""
        a, b = self.tensors[first], self.tensors[second]
        return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(self.read(first), self.read(second))

    def read(self, name: str) -> Tensor:
        """Read one tensor; opens and closes its file."""
        return read_tensor(self.directory, self.tensors[name].file, name, self.pickled)

    def _files(self, allow_pickle: bool) -> list[str]:
        if (self.directory / INDEX).is_file():
            self.index = read_object(self.directory / INDEX)
            return _indexed_files(self.directory / INDEX, self.index, ".safetensors")
        if (self.directory / SINGLE).is_file():
            return [SINGLE]
        pickles = sorted(p.name for p in self.directory.glob("pytorch_model*.bin"))
        if not pickles:
            raise ConversionError(f"{self.directory}: no weights ({INDEX} or {SINGLE})")
        if not allow_pickle:
            raise ConversionError(
                f"{self.directory}: only pickled weights ({', '.join(pickles[:3])}), which can run code when "
                "read; convert them to safetensors, or use --allow-pickle if you trust their author"
            )
        self.pickled = True
        index = self.directory / PICKLES[1]
        return _indexed_files(index, read_object(index), ".bin") if index.is_file() else pickles

    def _pickle_infos(self, file: str) -> dict[str, TensorInfo]:
        tensors = _load_pickle(self.directory / file, "meta")
        return {name: TensorInfo(file, tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def _check_index(self) -> None:
        if self.index is None:
            return
        absent = sorted(set(self.index["weight_map"]) - self.names)
        if absent:
            raise ConversionError(
                f"{self.directory / INDEX} lists {len(absent)} tensors that are not in its files: "
                f"{', '.join(absent[:10])}"
            )


def tensor_infos(directory: Path, file: str) -> dict[str, TensorInfo]:
    """Tensors of a safetensors file by name. Raises ConversionError for a broken file and for unknown types."""
    with _open_safetensors(directory / file) as handle:
        infos = {}
        for name in handle.keys():  # noqa: SIM118 (not a mapping)
            view = handle.get_slice(name)
            dtype = _TYPES.get(view.get_dtype())
            if dtype is None:
                raise ConversionError(
                    f"{directory / file}: {name} has type {view.get_dtype()}; only {', '.join(_TYPES)} can be converted"
                )
            infos[name] = TensorInfo(file, tuple(view.get_shape()), dtype)
        return infos


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path}: not a complete safetensors file ({path.stat().st_size} bytes): {error}"
        ) from error


def read_tensor(directory: Path, file: str, name: str, pickled: bool = False) -> Tensor:
    """Read one tensor of one file. Raises ConversionError for a broken file."""
    if pickled:
        return _load_pickle(directory / file, "cpu")[name]
    with _open_safetensors(directory / file) as handle:
        return handle.get_tensor(name)


def _indexed_files(path: Path, index: Mapping[str, Any], suffix: str) -> list[str]:
    """Files of a weight index. Raises ConversionError if one is missing."""
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ConversionError(f"{path}: not a weight index: it has no weight_map from tensors to files")
    for name, file in files.items():
        # An export writes files with these names: they must not point outside their directory.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(suffix):
            raise ConversionError(f"{path}: {name} is in {file!r}, which must be the name of a {suffix} file")
    listed = sorted(set(files.values()))
    missing = [name for name in listed if not (path.parent / name).is_file()]
    if missing:
        raise ConversionError(
            f"{path.parent}: {len(missing)} of {len(listed)} weight files are missing: {', '.join(missing)}"
        )
    return listed


def _load_pickle(path: Path, device: str) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location=device, mmap=True, weights_only=True)
    except Exception as error:  # a broken or malicious pickle raises nearly anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "it must contain only tensors"
        elif "mmap" in reason:
            reason = "not the zip format that torch.save writes since version 1.6; save it again"
        raise ConversionError(
            f"{path}: not a complete file of tensors ({path.stat().st_size} bytes): {reason}"
        ) from error
    others = [k for k, v in tensors.items() if not isinstance(v, Tensor)] if isinstance(tensors, dict) else []
    if others or not isinstance(tensors, dict):
        held = f"{len(others)} entries are not tensors ({', '.join(map(str, others[:5]))})"
        raise ConversionError(
            f"{path}: not a dictionary of tensors: {held if others else type(tensors).__name__}; save the "
            "model's state_dict as safetensors"
        )
    return tensors


@dataclass(frozen=True)
class ShardPlan:
    """Layout of a file to be written: its header and the position of each tensor."""

    file: str
    header: bytes
    offsets: Mapping[str, int]
    """Position of each tensor in the file, in bytes."""
    size: int
    """Size of the file in bytes."""


def plan_shard(file: str, tensors: Mapping[str, TensorInfo]) -> ShardPlan:
    """Plan a file's layout like the safetensors library: wide types first, then by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin, begins = 0, {}
    for name in order:
        info = tensors[name]
        begins[name] = begin
        entries[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [begin, begin + info.nbytes],
        }
        begin += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return ShardPlan(
        file, header, {name: at + len(header) for name, at in begins.items()}, begin + len(header)
    )


def write_header(directory: Path, shard: ShardPlan) -> None:
    """Create the file in full size with its header; tensors that are already in it are kept."""
    descriptor = os.open(directory / shard.file, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        write_at(descriptor, memoryview(shard.header), 0)
        os.ftruncate(descriptor, shard.size)
    finally:
        os.close(descriptor)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """View of a host tensor's bytes, without a copy if it is contiguous."""
    flat = tensor.contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, with several system calls if needed."""
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


# Errors of file systems between which the kernel cannot copy.
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_COPY_BYTES = 16 << 20


def copy_bytes(source: Path, start: int, length: int, descriptor: int, offset: int) -> None:
    """Copy a part of a file to `offset` of an open one. Raises ConversionError if the source is too short.

    If the file system supports it, the kernel copies the data without a buffer in this process, like `cp`.
    """
    with source.open("rb", buffering=0) as file:
        while length:
            got = _copy_chunk(file.fileno(), start, length, descriptor, offset)
            if got == 0:
                raise ConversionError(f"{source}: ends at byte {start}, {length} more expected")
            start, offset, length = start + got, offset + got, length - got


def _copy_chunk(source: int, start: int, length: int, target: int, offset: int) -> int:
    """Copy some bytes; returns their number, 0 only at the end of the source."""
    try:
        if got := os.copy_file_range(source, target, length, start, offset):
            return got
    except OSError as error:
        if error.errno not in _NO_COPY:
            raise
    data = os.pread(source, min(length, _COPY_BYTES), start)
    write_at(target, memoryview(data), offset)
    return len(data)
