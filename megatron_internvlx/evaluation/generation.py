"""Prompts of conversations and the answers generated to them; shared by evaluation and chat.

Shapes: B prompts of a batch, n tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from megatron_internvlx.data.conversation import get_template, render_prompt
from megatron_internvlx.hf.processing_internvlx import InternVLXProcessor, tile_grid


@dataclass(frozen=True)
class Sampling:
    """Length of an answer and choice of its tokens."""

    max_new_tokens: int
    """Tokens of an answer at most."""
    temperature: float = 0.0
    """Divisor of the logits before a token is drawn; 0: always the most likely token."""
    top_p: float = 1.0
    """Share of the probability from which tokens are drawn, the most likely first; 1: all tokens."""
    seed: int = 1234
    """Seed of the draws of an answer."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of transformers' `generate`."""
        found: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature > 0:
            found |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return found


@dataclass(frozen=True)
class Cut:
    """Tiles of an image: a grid of `cols` x `rows`, and a thumbnail of the whole or not."""

    cols: int
    rows: int
    thumbnail: bool

    @property
    def tiles(self) -> int:
        """Number of tiles, the thumbnail included."""
        return self.cols * self.rows + self.thumbnail


def cut_of(processor: InternVLXProcessor, size: tuple[int, int], images: int) -> Cut:
    """Cut by the processor of an upright image of `size` (width, height), one of `images` in its prompt."""
    cols = rows = 1
    if processor.dynamic_image_size:
        most = max(1, processor.max_tiles // images)
        cols, rows = tile_grid(*size, processor.tile_size, processor.min_tiles, most, processor.rvtc)
    return Cut(cols, rows, bool(processor.use_thumbnail and cols * rows > 1))


def strip_turns(template: str, turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turns as their template has them in training: without surrounding white space, or unchanged."""
    if not get_template(template).strip:
        return [dict(turn) for turn in turns]
    return [{**turn, "value": turn["value"].strip()} for turn in turns]


def answer_prompt(template: str, turns: Sequence[Mapping[str, Any]], key: str = "?") -> str:
    """Prompt for the next answer of a conversation, or for its last one if it ends with an answer.

    Raises BadSample with `key` for unusable turns.
    """
    return render_prompt(template, strip_turns(template, turns), generation_prompt=True, key=key)


class _Tokens(BaseStreamer):
    """Calls a function with each new token id."""

    def __init__(self, call: Callable[[int], None]) -> None:
        self.call = call
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, the first time, or a token."""
        if not self.prompt:
            self.call(int(value.reshape(-1)[0]))
        self.prompt = False

    def end(self) -> None:
        """Nothing is held back."""


class _Stop(StoppingCriteria):
    """Ends all answers when a function returns True."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self.asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked(), dtype=torch.bool, device=input_ids.device)


class Generator:
    """Generates answers to prompts with images.

    Args:
        model: from `load_model`, on its device.
        processor: its processor.
    """

    def __init__(self, model: Any, processor: InternVLXProcessor) -> None:
        self.model, self.processor = model, processor

    def encode(self, prompts: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, torch.Tensor]:
        """Inputs of the model on the host: `input_ids` [B, n] and, with images, `pixel_values`.

        `images`: paths or PIL images of each prompt, in the order of its placeholders.
        """
        return dict(self.processor(images=[list(own) for own in images], text=list(prompts)))

    @torch.no_grad()
    def generate(
        self,
        inputs: Mapping[str, torch.Tensor],
        sampling: Sampling,
        *,
        on_token: Callable[[int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """Token ids [B, n] of the answers, each followed by padding.

        Args:
            inputs: from `encode`.
            sampling: length and choice of tokens.
            on_token: called with each token id; for one prompt only.
            stop: called after each token; True ends the answers.
        """
        moved = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        extra: dict[str, Any] = {}
        if on_token is not None:
            extra["streamer"] = _Tokens(on_token)
        if stop is not None:
            extra["stopping_criteria"] = StoppingCriteriaList([_Stop(stop)])
        if sampling.temperature > 0:
            torch.manual_seed(sampling.seed)
        out = self.model.generate(**moved, **sampling.arguments(), **extra)
        return out[:, moved["input_ids"].shape[1] :]

    def count_tokens(self, new: torch.Tensor) -> int:
        """Number of generated tokens in [B, n], those of the answers' ends included, without padding."""
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [] if ends is None else [ends])
        ended = torch.isin(new.cpu(), ends).cumsum(1)
        # A row counts up to its first end token; the padding behind it may be an end token too.
        return int((ended == 0).sum() + ended.any(1).sum())

    def texts(self, new: torch.Tensor) -> list[str]:
        """Texts of generated tokens [B, n], without special tokens and surrounding white space."""
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


class TextStream:
    """Text of an answer as its tokens arrive.

    A token may hold part of a character, and a word's text may depend on the word before it; therefore two
    texts, with and without the new tokens, are compared, and a part of a character is held back.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], None]) -> None:
        self.decode, self.write = decode, write
        self.ids: list[int] = []
        self._context = self._written = 0

    def add(self, token: int) -> None:
        """Add a token id, and write the text that it completes."""
        self.ids.append(token)
        before = self.decode(self.ids[self._context : self._written])
        now = self.decode(self.ids[self._context :])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            self.write(now[len(before) :])
            self._context, self._written = self._written, len(self.ids)
