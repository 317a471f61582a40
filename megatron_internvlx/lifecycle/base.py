"""Base of LoRA adapters: its fingerprint, checks against the checkpoint of adapters, and loading both in order.

A checkpoint of adapters holds the trained parameters only. Every start loads the base's weights first, from
--pretrained-checkpoint, and then the adapters, from --load or from --save with --auto-resume.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_internvlx import files
from megatron_internvlx.config import TrainSettings, frozen_parts, settings_from
from megatron_internvlx.lifecycle.origin import made_with, resumed_checkpoint
from megatron_internvlx.lora_settings import LoraSettings
from megatron_internvlx.megatron_settings import CheckpointFiles
from megatron_internvlx.paths import is_url

WEIGHTS = ("language_model.", "projector.", "vision_model.")
"""Beginnings of the keys of weights in a checkpoint; the optimizer's state has others."""
_PLACES, _BYTES = 16, 4096  # parts of a tensor that go into a fingerprint, both ends included, and their size


def base_fingerprint(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights, in hex: names, shapes, types, and 4 KiB from 16 places of each tensor.

    It depends on neither the layout in which the checkpoint was saved nor its optimizer state, but on the padding of
    the vocabulary. A change of a few rows in the middle of a large tensor may not be seen.

    Args:
        folder: a checkpoint, or a directory of checkpoints, of which the newest is read.

    Raises:
        ValueError: if a file cannot be read.
    """
    from torch.distributed.checkpoint import FileSystemReader

    checkpoint = folder if (folder / ".metadata").is_file() else files.newest_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"{folder}: no checkpoint is in it (no {files.TRACKER})")
    digest = hashlib.sha256()
    try:
        metadata: Any = FileSystemReader(checkpoint).read_metadata()
        for key, entry in sorted(metadata.state_dict_metadata.items()):
            if not key.startswith(WEIGHTS) or not hasattr(entry, "chunks"):
                continue
            digest.update(f"{key} {tuple(entry.size)} {entry.properties.dtype}\n".encode())
            count = math.prod(entry.size)
            size = min(_BYTES // entry.properties.dtype.itemsize, count)
            for first in np.unique(np.linspace(0, count - size, _PLACES).astype(int)):
                wanted = np.arange(first, first + size)
                digest.update(_read_elements(checkpoint, key, entry, metadata.storage_data, wanted))
    except Exception as error:  # a torn file raises nearly anything
        raise ValueError(f"{checkpoint}: its weights cannot be read: {error!r}") from error
    return digest.hexdigest()


def _read_elements(checkpoint: Path, key: str, entry: Any, storage: Any, wanted: np.ndarray) -> bytes:
    """Bytes of some elements of a stored tensor, given by their positions in the whole tensor in row-major order."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    width = entry.properties.dtype.itemsize
    shape = tuple(entry.size) or (1,)
    places = np.stack(np.unravel_index(wanted, shape))
    found = np.zeros((len(wanted), width), np.uint8)
    missing = np.ones(len(wanted), bool)
    for chunk in entry.chunks:
        sizes = np.array(tuple(chunk.sizes) or (1,))[:, None]
        local = places - np.array(tuple(chunk.offsets) or (0,))[:, None]
        inside = ((local >= 0) & (local < sizes)).all(axis=0)
        if not inside.any():
            continue
        at = np.ravel_multi_index(tuple(local[:, inside]), tuple(sizes[:, 0]))
        info = storage[MetadataIndex(key, chunk.offsets)]
        content = _read_range(checkpoint, info, int(at.min()), int(at.max()) + 1, width)
        found[inside] = content[at - at.min()]
        missing &= ~inside
    if missing.any():
        raise ValueError(f"{key} is incomplete")
    return found.tobytes()


def _read_range(checkpoint: Path, info: Any, first: int, end: int, width: int) -> np.ndarray:
    """Elements `first` to `end` of a stored part, without reading the rest: bytes [end - first, width]."""
    with (checkpoint / info.relative_path).open("rb", buffering=0) as file:
        window: Any = files.FileWindow(file, info.offset, info.length)
        head = torch.load(window, map_location="meta", weights_only=True)
        if not head.is_contiguous():
            raise ValueError(
                f"{info.relative_path}: the part at byte {info.offset} is not in row-major order"
            )
        # On the meta device torch stores the position of a storage's bytes instead of reading them.
        skipped = head.untyped_storage()._checkpoint_offset + head.storage_offset() * width
        window.seek(skipped + first * width)
        content = window.read((end - first) * width)
    return np.frombuffer(content, np.uint8).reshape(end - first, width)


@dataclass(frozen=True)
class AdapterBase:
    """Base of a run's adapters, as stored in the arguments of their checkpoints."""

    lora_base: str | None = None
    """Directory, as it was given; None for a run without adapters."""
    lora_base_fingerprint: str | None = None
    lora_base_step: int | None = None
    """Its step, if it is a run's; None for an import. The base may have trained on since."""


def base_checkpoint_of(base: Path, step: int | None) -> Path | None:
    """Checkpoint in a base's directory: of the step on which adapters were trained if it is there, else the newest."""
    if step is not None and (kept := files.checkpoint_directory(base, step)).is_dir():
        return kept
    return files.newest_checkpoint(base)


def check_base(args: argparse.Namespace) -> None:
    """Check weights and adapters that a run loads, and note name and fingerprint of the base in its arguments.

    Called on the first rank; `share_base` brings the note to the others. Megatron stores it with every checkpoint.

    Raises:
        ValueError: for adapters without a base, on another base, or with other settings than they were trained
            with; for a checkpoint of adapters where weights are expected, and the reverse.
    """
    lora, checkpoints = settings_from(args, LoraSettings), settings_from(args, CheckpointFiles)
    source = resumed_checkpoint(args) or _folder(checkpoints.load, checkpoints.ckpt_step)
    made = _arguments_in(source)
    if lora.lora_rank is None:
        _refuse_adapters(checkpoints, source, made)
        return
    base = checkpoints.pretrained_checkpoint
    if not base:
        trained_on = _base_of(made).lora_base
        remedy = f"theirs is {trained_on}" if trained_on else "an import, or the --save of an earlier run"
        raise ValueError(
            f"--lora-rank {lora.lora_rank} needs --pretrained-checkpoint at every start, also to resume: the base's "
            f"weights are not saved with the adapters, and adapters of random weights learn nothing ({remedy})"
        )
    if is_url(base):
        raise ValueError(
            f"--pretrained-checkpoint {base}: the base of adapters must be a directory, not a URL"
        )
    if checkpoints.save and Path(base).resolve() == Path(checkpoints.save).resolve():
        raise ValueError(
            f"--save {checkpoints.save} is the base of the adapters, whose checkpoints would take its place: give "
            "another --save"
        )
    if (other := _base_of(_arguments_in(_folder(base))).lora_base) is not None:
        raise ValueError(
            f"--pretrained-checkpoint {base} holds adapters of {other} and not weights: merge them into a checkpoint "
            f"first, or give --pretrained-checkpoint {other} and load the adapters with --load {base}"
        )
    checkpoint = base_checkpoint_of(Path(base), _base_of(made).lora_base_step)
    now = AdapterBase(base, base_fingerprint(checkpoint or Path(base)), files.step_of(checkpoint))
    vars(args).update(asdict(now))
    if made is not None:
        assert source is not None
        _check_fingerprint(source, _base_of(made), now)
        _check_settings(source, made, args)


def _refuse_adapters(
    checkpoints: CheckpointFiles, source: Path | None, made: argparse.Namespace | None
) -> None:
    """Raise ValueError if a run without LoRA is to load a checkpoint of adapters."""
    pretrained = _folder(checkpoints.pretrained_checkpoint)
    for folder, found in ((source, made), (pretrained, _arguments_in(pretrained))):
        if (base := _base_of(found).lora_base) is not None:
            assert found is not None
            rank = settings_from(found, LoraSettings).lora_rank
            raise ValueError(
                f"{folder} holds adapters of {base} and not weights: continue with --lora-rank {rank} "
                f"--pretrained-checkpoint {base}, or merge them into a checkpoint first"
            )


def _check_fingerprint(source: Path, then: AdapterBase, now: AdapterBase) -> None:
    """Raise ValueError if the checkpoint `source` has no adapters, or adapters of another base."""
    if then.lora_base_fingerprint is None:
        raise ValueError(
            f"{source} holds whole weights and no adapters: give --pretrained-checkpoint {source.parent} instead, "
            "and another --save"
        )
    if then.lora_base_fingerprint != now.lora_base_fingerprint:
        raise ValueError(
            f"{source} holds adapters of another base: of {then.lora_base} with the fingerprint "
            f"{then.lora_base_fingerprint}, and --pretrained-checkpoint {now.lora_base} has "
            f"{now.lora_base_fingerprint}; give the directory that they were trained on, wherever it is now"
            + (f", with its step {then.lora_base_step}" if then.lora_base_step is not None else "")
        )


def _check_settings(source: Path, made: argparse.Namespace, args: argparse.Namespace) -> None:
    """Raise ValueError if the adapters in the checkpoint `source` were trained with other settings."""
    then, lora = settings_from(made, LoraSettings), settings_from(args, LoraSettings)
    differing = [
        f"--{name.replace('_', '-')} {old} -> {new}"
        for name, old, new in (
            ("lora_rank", then.lora_rank, lora.lora_rank),
            ("lora_alpha", then.alpha, lora.alpha),
            ("lora_rslora", then.lora_rslora, lora.lora_rslora),
            ("lora_targets", " ".join(then.targets), " ".join(lora.targets)),
        )
        if old != new
    ]
    frozen_then = frozen_parts(settings_from(made, TrainSettings), then)
    frozen_now = frozen_parts(settings_from(args, TrainSettings), lora)
    if frozen_then != frozen_now:
        differing.append(f"frozen parts {' '.join(sorted(frozen_then))} -> {' '.join(sorted(frozen_now))}")
    if differing:
        raise ValueError(
            f"{source} does not fit this run, checkpoint -> arguments: {', '.join(differing)}: give what its adapters "
            "were trained with"
        )


def _base_of(made: argparse.Namespace | None) -> AdapterBase:
    """Base noted in a checkpoint's arguments."""
    return AdapterBase() if made is None else settings_from(made, AdapterBase)


def _folder(path: str | None, step: int | None = None) -> Path | None:
    """Checkpoint of a step, or the newest, in a directory that a flag names; None for none, and for a URL."""
    if not path or is_url(path):
        return None
    return files.checkpoint_directory(Path(path), step) if step else files.newest_checkpoint(Path(path))


def _arguments_in(checkpoint: Path | None) -> argparse.Namespace | None:
    """Arguments stored in a checkpoint; None without one, or if they cannot be read, which others report."""
    if checkpoint is None:
        return None
    try:
        return made_with(checkpoint)
    except Exception:  # a torn file raises nearly anything
        return None


def share_base(args: argparse.Namespace) -> None:
    """Give every rank rank 0's note about the base, and have Megatron load the base before the adapters."""
    if settings_from(args, LoraSettings).lora_rank is None:
        return
    noted = [asdict(settings_from(args, AdapterBase))]
    dist.broadcast_object_list(noted, src=0)
    vars(args).update(noted[0])
    load_base_first(args)


def load_base_first(args: argparse.Namespace) -> None:
    """Have Megatron's `setup_model_and_optimizer` load the base, and then the adapters if there are any yet."""
    import megatron.training.training as training

    training.load_checkpoint = partial(_load_both, args)


def _load_both(
    args: argparse.Namespace, model: list[torch.nn.Module], *parts: Any, **options: Any
) -> tuple[int, int]:
    """Megatron's `load_checkpoint` for a model with adapters; returns (iteration, operations so far)."""
    from megatron.core.utils import unwrap_model
    from megatron.training.checkpointing import checkpoint_exists, load_checkpoint

    from megatron_internvlx.model.lora import base_checkpoint

    given = settings_from(args, CheckpointFiles)
    assert given.pretrained_checkpoint, "the base of the adapters is not named"
    has_adapters = given.load is not None and (bool(given.ckpt_step) or checkpoint_exists(given.load))
    # Each of the two has a part of the parameters. Without --load Megatron takes weights from --pretrained-checkpoint,
    # and nothing else.
    step = settings_from(args, AdapterBase).lora_base_step
    with _changed(args, load=None, ckpt_step=step), base_checkpoint(unwrap_model(model)):
        begun = load_checkpoint(model, *parts, strict=False, **options)
    if not has_adapters:
        return begun
    vars(args).update(finetune=given.finetune)  # which Megatron has set
    with _changed(args, pretrained_checkpoint=None):
        return load_checkpoint(model, *parts, strict=False, **options)


@contextmanager
def _changed(args: argparse.Namespace, **values: Any) -> Iterator[None]:
    """Arguments of Megatron with other values inside the block."""
    kept = {name: vars(args)[name] for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(kept)
