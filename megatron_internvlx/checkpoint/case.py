"""Verification case: inputs of the released model and its outputs.

Shapes: B rows, n tokens of a row (right- or left-padded), T tiles.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_internvlx.checkpoint.errors import ConversionError

INPUTS = ("pixel_values", "input_ids", "labels", "attention_mask", "image_flags")


@dataclass(frozen=True)
class Case:
    """Inputs of a case, with defaults for missing ones, and the expected outputs."""

    pixel_values: Tensor
    """[T, 3, S, S], normalised; T may be 0."""
    input_ids: Tensor
    """[B, n]."""
    labels: Tensor
    """[B, n], -100 at unsupervised tokens; not shifted."""
    attention_mask: Tensor
    """[B, n], 1 at tokens, 0 at padding."""
    image_flags: Tensor
    """[T], 1 for tiles that are used in the text."""
    expected: Mapping[str, Tensor]
    """Expected outputs and gradients."""

    @property
    def tiles(self) -> Tensor:
        """[t, 3, S, S] tiles that are used in the text."""
        return self.pixel_values[self.image_flags.bool()]

    def rows(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Pairs (ids, labels) of every row without padding."""
        keep = self.attention_mask.bool()
        return [
            (ids[mask].numpy(), labels[mask].numpy())
            for ids, labels, mask in zip(self.input_ids, self.labels, keep, strict=True)
        ]

    def image_token(self, tokens_per_tile: int, known: int | None) -> int:
        """Id of the image placeholder: `known`, or the only id that occurs once per visual token.

        Raises ConversionError with both counts if the placeholders do not match the tiles.
        """
        wanted = len(self.tiles) * tokens_per_tile
        ids, counts = self.input_ids[self.attention_mask.bool()].unique(return_counts=True)
        if known is not None:
            count = int((self.input_ids[self.attention_mask.bool()] == known).sum())
            if count != wanted:
                raise ConversionError(
                    f"{count} image placeholders (id {known}) for {len(self.tiles)} tiles of {tokens_per_tile} "
                    f"tokens = {wanted}"
                )
            return known
        if not wanted:
            return -1
        fitting = ids[counts == wanted].tolist()
        if len(fitting) != 1:
            raise ConversionError(
                f"{len(fitting)} token ids occur {wanted} times ({len(self.tiles)} tiles of {tokens_per_tile} "
                "tokens), so the image placeholder is unknown: set --image-token-id"
            )
        return fitting[0]


def load_case(path: Path) -> Case:
    """Read a case file; expected values are in the same file, or in `<case>.outputs/grads` next to it.

    Raises ConversionError if files or tensors are missing or inconsistent.
    """
    held = _load_tensors(path)
    expected = {name: tensor for name, tensor in held.items() if name not in INPUTS}
    if path.name.endswith(".inputs.safetensors"):
        for kind in ("outputs", "grads"):
            beside = path.with_name(path.name.replace(".inputs.", f".{kind}."))
            expected |= _load_tensors(beside) if beside.is_file() else {}
    whole = [n for n in INPUTS[1:] if n in held and (held[n].is_floating_point() or held[n].is_complex())]
    if whole:
        raise ConversionError(f"{path}: {', '.join(whole)} must contain whole numbers")
    if "input_ids" not in held or held["input_ids"].dim() != 2 or not held["input_ids"].numel():
        raise ConversionError(
            f"{path}: must contain input_ids [rows, tokens], with at least one row and token"
        )
    ids = held["input_ids"]
    mask = held.get("attention_mask", torch.ones_like(ids))
    labels = held.get("labels", torch.full_like(ids, -100))
    pixels = held.get("pixel_values", torch.zeros(0, 3, 1, 1))
    flags = held.get("image_flags", torch.ones(len(pixels), dtype=torch.int64)).reshape(-1)
    if mask.shape != ids.shape or labels.shape != ids.shape or len(flags) != len(pixels):
        raise ConversionError(
            f"{path}: input_ids {list(ids.shape)}, attention_mask {list(mask.shape)}, labels "
            f"{list(labels.shape)}, pixel_values {list(pixels.shape)}, image_flags {list(flags.shape)} do not match"
        )
    edges = mask.bool().int().diff(dim=1).abs().sum(dim=1)
    one_sided = (edges == 0) | ((edges == 1) & (mask.bool()[:, 0] ^ mask.bool()[:, -1]))
    if not bool((one_sided & mask.bool().any(dim=1)).all()):
        raise ConversionError(
            f"{path}: attention_mask has gaps inside a row, or an empty row; padding must be on one side"
        )
    return Case(pixels, ids, labels, mask, flags, expected)


def check_case(case: Case, arguments: Mapping[str, Any]) -> None:
    """Check the inputs against the model before any rank is started. Raises ConversionError."""
    side, vocabulary = arguments.get("image_size", 448), arguments["vocab_size"]
    wanted = (3, side, side)
    if len(case.pixel_values) and tuple(case.pixel_values.shape[1:]) != wanted:
        raise ConversionError(
            f"pixel_values are {list(case.pixel_values.shape)}, must be [tiles, {', '.join(map(str, wanted))}]"
        )
    keep = case.attention_mask.bool()
    supervised = case.labels[keep & (case.labels != -100)]
    for name, ids in (("input_ids", case.input_ids[keep]), ("labels", supervised)):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ConversionError(
                f"{name} range from {int(ids.min())} to {int(ids.max())}, but the vocabulary has {vocabulary} tokens"
            )
    longest, most = int(keep.sum(dim=1).max()), arguments["max_position_embeddings"]
    if longest > most:
        raise ConversionError(f"a row has {longest} tokens, but max_position_embeddings is {most}")


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path}: not a readable safetensors file: {error}") from error


@dataclass(frozen=True)
class Difference:
    """Difference between a computed and an expected tensor."""

    name: str
    worst: float
    """Largest absolute difference; infinite for a wrong shape or a NaN."""
    largest: float
    """Largest expected value."""


def compare(case: Case, found: Mapping[str, Tensor], no_gradient: Collection[str] = ()) -> list[Difference]:
    """Compare every expected tensor that was computed; logits only where the attention mask is 1.

    Weights in `no_gradient` have no computed gradient; they match only an expected gradient of zeros, which
    some optimizers leave.
    """
    differences = []
    found = {**found, **{n: torch.zeros_like(case.expected[n]) for n in no_gradient if n in case.expected}}
    for name, wanted in case.expected.items():
        if name not in found:
            continue
        got, wanted = found[name].float(), wanted.float()
        if name == "logits" and got.shape == wanted.shape:
            keep = case.attention_mask.bool()
            got, wanted = got[keep], wanted[keep]
        if got.numel() != wanted.numel():
            differences.append(Difference(name, float("inf"), 0.0))
            continue
        delta = (got.reshape(-1) - wanted.reshape(-1)).abs()
        worst = float(delta.max()) if delta.numel() else 0.0
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        differences.append(Difference(name, worst if worst == worst else float("inf"), largest))
    return differences
