"""What is inside a distributed checkpoint, without a model."""

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

# Megatron starts each parameter of a bucket at a multiple of so many elements. What is between is saved as it comes
# from memory, in chunks of its own.
_BUCKET_ALIGNMENT = 64


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor in full shape: weights and optimizer state. Padding of optimizer buckets is zero."""
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    entries = {name: entry for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
    wanted = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    _load_state_dict(wanted, FileSystemReader(checkpoint), no_dist=True)
    for name, entry in entries.items():
        for chunk in entry.chunks if "bucket_idx" in name else ():
            if chunk.sizes[0] < _BUCKET_ALIGNMENT:
                wanted[name][chunk.offsets[0] : chunk.offsets[0] + chunk.sizes[0]] = 0
    return wanted


def differing(first: Path, second: Path) -> list[str]:
    """Names of tensors that are not bit for bit the same in two checkpoints."""
    one, two = tensors(first), tensors(second)
    assert one and one.keys() == two.keys()
    return [name for name in one if not torch.equal(one[name], two[name])]
