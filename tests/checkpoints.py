"""What is inside a distributed checkpoint, without a model."""

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor in full shape: weights and optimizer state."""
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    _load_state_dict(wanted, FileSystemReader(checkpoint), no_dist=True)
    return wanted


def differing(first: Path, second: Path) -> list[str]:
    """Names of tensors that are not bit for bit the same in two checkpoints."""
    one, two = tensors(first), tensors(second)
    assert one and one.keys() == two.keys()
    return [name for name in one if not torch.equal(one[name], two[name])]
