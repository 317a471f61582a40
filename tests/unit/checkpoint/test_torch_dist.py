"""Tensors of a checkpoint: in pieces, stacked, with gaps; their bytes copied where they are in order."""

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from megatron_internvlx.checkpoint import torch_dist
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.safetensors_io import copy_bytes
from megatron_internvlx.checkpoint.torch_dist import Piece, StoredTensor, byte_ranges, read_stored
from megatron_internvlx.checkpoint.torch_dist_write import checkpoint_keys, save_tensor

WHOLE = torch.arange(6 * 5 * 4, dtype=torch.float32).view(6, 5, 4)


def stored(folder: Path, *slices: tuple[slice, ...]) -> StoredTensor:
    """WHOLE in a file, one piece per slice, after some bytes of something else."""
    pieces = []
    with (folder / "data").open("wb") as file:
        file.write(b"other")
        for chosen in slices:
            part = WHOLE[chosen]
            start, length = save_tensor(file, part)
            offsets = [s.start or 0 for s in chosen] + [0] * (3 - len(chosen))
            pieces.append(Piece(tuple(offsets), tuple(part.shape), "data", start, length))
    return StoredTensor(tuple(WHOLE.shape), WHOLE.dtype, tuple(pieces))


def copied(folder: Path, tensor: StoredTensor, place: int | None = None) -> torch.Tensor:
    """What copying the runs gives."""
    runs = byte_ranges(folder, tensor, place)
    assert runs is not None
    target = folder / "target"
    target.touch()
    descriptor = os.open(target, os.O_RDWR)
    for run in runs:
        copy_bytes(run.path, run.start, run.length, descriptor, run.at)
    os.close(descriptor)
    return torch.frombuffer(bytearray(target.read_bytes()), dtype=torch.float32)


WAYS = {
    "one": [(slice(0, 6),)],
    "rows": [(slice(4, 6),), (slice(0, 4),)],
    "items": [(slice(i, i + 1),) for i in range(6)],
    "rows of items": [(slice(i, i + 3), slice(j, j + 2 + j // 2)) for i in (0, 3) for j in (0, 2)],
    "columns": [(slice(0, 6), slice(0, 5), slice(j, j + 2)) for j in (0, 2)],
}


@pytest.mark.parametrize("way", WAYS)
def test_pieces_make_the_tensor(tmp_path: Path, way: str) -> None:
    tensor = stored(tmp_path, *WAYS[way])
    assert torch.equal(read_stored(tmp_path, tensor), WHOLE)
    for place in range(6):
        assert torch.equal(read_stored(tmp_path, tensor, place), WHOLE[place])


@pytest.mark.parametrize("way", ["one", "rows", "items"])
@pytest.mark.parametrize("kernel", [True, False])
def test_whole_rows_are_copied(tmp_path: Path, monkeypatch, way: str, kernel: bool) -> None:
    if not kernel:  # a file system that cannot

        def refuse(*_: object) -> int:
            raise OSError(errno.EXDEV, "no")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    tensor = stored(tmp_path, *WAYS[way])
    assert torch.equal(copied(tmp_path, tensor), WHOLE.flatten())
    (tmp_path / "target").unlink()
    assert torch.equal(copied(tmp_path, tensor, 3), WHOLE[3].flatten())


def test_rows_of_stacked_tensors_are_copied(tmp_path: Path) -> None:
    tensor = stored(tmp_path, *WAYS["rows of items"])
    # They are no rows of the whole, but of each slice along its leading dimension.
    assert byte_ranges(tmp_path, tensor) is None
    assert torch.equal(copied(tmp_path, tensor, 4), WHOLE[4].flatten())


def test_what_is_not_in_order_is_not_copied(tmp_path: Path) -> None:
    assert byte_ranges(tmp_path, stored(tmp_path, *WAYS["columns"])) is None
    with (tmp_path / "data").open("wb") as file:
        torch.save(WHOLE.transpose(0, 1), file)  # torch keeps the strides
        length = file.tell()
    turned = StoredTensor((5, 6, 4), WHOLE.dtype, (Piece((0, 0, 0), (5, 6, 4), "data", 0, length),))
    assert byte_ranges(tmp_path, turned) is None
    assert torch.equal(read_stored(tmp_path, turned), WHOLE.transpose(0, 1))


def test_a_view_in_a_larger_storage_is_copied_from_its_place(tmp_path: Path) -> None:
    with (tmp_path / "data").open("wb") as file:
        torch.save(WHOLE[2:], file)
        length = file.tell()
    part = StoredTensor((4, 5, 4), WHOLE.dtype, (Piece((0, 0, 0), (4, 5, 4), "data", 0, length),))
    assert torch.equal(copied(tmp_path, part), WHOLE[2:].flatten())


def test_gaps_are_refused(tmp_path: Path) -> None:
    tensor = stored(tmp_path, (slice(0, 4),))
    for read in (read_stored, byte_ranges):
        with pytest.raises(ConversionError, match=r"only 80 values of a tensor \[6, 5, 4\]"):
            read(tmp_path, tensor)
        with pytest.raises(ConversionError, match=r"only 0 values of a tensor \[5, 4\]"):
            read(tmp_path, tensor, 5)


def test_a_copy_of_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"12345")
    descriptor = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    with pytest.raises(ConversionError, match="ends at byte 5, 3 more expected"):
        copy_bytes(tmp_path / "data", 2, 6, descriptor, 0)
    os.close(descriptor)


class Call:
    """A pickle that calls a function of an allowed module when it is read."""

    def __reduce__(self):
        return eval, ("1",)


def test_an_index_of_torch_is_read_without_torchs_classes(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"a": WHOLE, "b": torch.ones(3, dtype=torch.bfloat16)}, checkpoint_id=tmp_path, no_dist=True)
    tensors, common = torch_dist._load_metadata(tmp_path / ".metadata")
    assert common is None
    assert torch.equal(read_stored(tmp_path, tensors["a"]), WHOLE)
    assert tensors["b"].dtype == torch.bfloat16 and tensors["b"].shape == (3,)
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": Call()}))
    with pytest.raises(ConversionError, match="is not allowed in it"):
        torch_dist._load_metadata(tmp_path / ".metadata")


def test_only_decoder_layers_store_their_second_norm_under_two_keys() -> None:
    """Of a vision layer the second key would be a stacked tensor with one layer of many."""
    norm = "language_model.decoder.layers.3.pre_mlp_layernorm.weight"
    fused = "language_model.decoder.layers.3.mlp.linear_fc1.layer_norm_weight"
    assert checkpoint_keys(norm, has_experts=True) == ([fused, norm], None)
    assert checkpoint_keys(norm, has_experts=False) == ([fused], None)
    vision = "vision_model.encoder.layers.{}pre_mlp_layernorm.weight"
    assert checkpoint_keys(vision.format("1."), has_experts=True) == ([vision.format("")], 1)
