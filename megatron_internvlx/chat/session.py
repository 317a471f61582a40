"""A loaded model that answers: prompt, generation with a stream of text, and the figures of an answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from megatron_internvlx.chat.conversation import Conversation, Turn, check_question
from megatron_internvlx.chat.pictures import ChatError
from megatron_internvlx.data.conversation import IMAGE, get_template
from megatron_internvlx.evaluation.generation import (
    Cut,
    Generator,
    Sampling,
    TextStream,
    answer_prompt,
    cut_of,
)
from megatron_internvlx.hf.processing_internvlx import InternVLXProcessor

_SHORTER = "start a new conversation, take a question back, or cut pictures into fewer tiles (--max-tiles)"


@dataclass(frozen=True)
class Figures:
    """Sizes and times of an answer."""

    tiles: int
    """Tiles of all pictures of the conversation."""
    shallow_tokens: int
    """Visual tokens before the expansion layer."""
    deep_tokens: int
    """Visual tokens from the expansion layer on; those of the prompt."""
    prompt_tokens: int
    """Tokens before the answer, visual ones included."""
    answer_tokens: int
    """Tokens of the answer, the end token included."""
    first_seconds: float
    """Seconds from the question to the first token of the answer."""
    seconds: float
    """Seconds from the question to the end of the answer."""
    ended: str
    """`end`: by the model; `length`: at the limit of tokens; `stopped`: by the user."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second after the first one; of all tokens if there is only one."""
        if self.answer_tokens > 1 and self.seconds > self.first_seconds:
            return (self.answer_tokens - 1) / (self.seconds - self.first_seconds)
        return self.answer_tokens / self.seconds if self.seconds > 0 else 0.0

    def row(self) -> dict[str, Any]:
        """Figures for JSON."""
        found = asdict(self)
        for name in ("first_seconds", "seconds"):
            found[name] = round(found[name], 3)
        return found | {"tokens_per_second": round(self.tokens_per_second, 1)}

    def line(self) -> str:
        """Figures in words."""
        parts = []
        if self.tiles:
            tokens = f"{self.deep_tokens:,}"
            if self.shallow_tokens != self.deep_tokens:
                tokens = f"{self.shallow_tokens:,} -> {tokens}"
            parts.append(f"{self.tiles} tile{'s' * (self.tiles > 1)}, {tokens} visual tokens")
        parts.append(f"{self.prompt_tokens:,} prompt + {self.answer_tokens:,} answer tokens")
        parts.append(f"{self.seconds:.1f} s, {self.tokens_per_second:.1f} tokens/s")
        if self.ended != "end":
            parts.append("stopped" if self.ended == "stopped" else "cut at the limit of tokens")
        return " | ".join(parts)


@dataclass(frozen=True)
class About:
    """Facts about a loaded model."""

    name: str
    source: str
    """The directory, and the iteration of a checkpoint."""
    template: str
    """Name of the chat template."""
    system: str
    """System text of the chat template."""
    parameters: int
    dtype: str
    device: str
    layers: int
    """Layers of the decoder."""
    expand_layer: int | None
    """First layer with all visual tokens; None: all layers."""
    shallow_per_tile: int
    deep_per_tile: int
    tile_size: int
    """Side of a tile, in pixels."""
    max_tiles: int
    """Tiles of a prompt's pictures together, without thumbnails; 1 if pictures are not cut."""
    rvtc: str
    max_tokens: int
    """Tokens of prompt and answer together, at most."""
    seconds: float
    """Time to load the model, with the conversion of a checkpoint."""

    def short(self) -> str:
        """Facts in one short line, for the page."""
        tokens = f"{self.deep_per_tile}"
        if self.expand_layer:
            tokens = f"{self.shallow_per_tile} → {tokens}"
        tiles = f"at most {self.max_tiles} tiles" if self.max_tiles > 1 else "one tile per picture"
        return (
            f"{count_words(self.parameters)} parameters · {tokens} visual tokens per tile · {tiles} · "
            f"{self.dtype} on {self.device}"
        )

    def lines(self) -> list[str]:
        """Facts in words, for the start of a chat."""
        tokens = f"{self.deep_per_tile} visual tokens per tile"
        if self.expand_layer:
            tokens = (
                f"{self.shallow_per_tile} visual tokens per tile in layers 0-{self.expand_layer - 1}, "
                f"{self.deep_per_tile} in layers {self.expand_layer}-{self.layers - 1}"
            )
        tiles = f"at most {self.max_tiles} tiles" if self.max_tiles > 1 else "one tile per picture"
        return [
            f"{self.name} from {self.source}, loaded in {self.seconds:.1f} s",
            f"{count_words(self.parameters)} parameters, {self.dtype} on {self.device}",
            f"{tokens}; tiles of {self.tile_size} pixels, {tiles} (RVTC {self.rvtc})",
        ]


def count_words(count: int) -> str:
    """Number with a unit, such as 2.2 B or 1.3 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


@dataclass(frozen=True)
class Answer:
    """Text of an answer, the cut of each picture of the conversation, and the figures."""

    text: str
    cuts: tuple[Cut, ...]
    figures: Figures


class Chat:
    """Answers questions of conversations, one at a time.

    Args:
        model: from `load_model`, on its device.
        processor: its processor.
        about: facts about the model.
    """

    def __init__(self, model: Any, processor: InternVLXProcessor, about: About) -> None:
        self.generator, self.processor, self.about = Generator(model, processor), processor, about
        self.template = get_template(about.template)

    def cuts(self, conversation: Conversation) -> list[Cut]:
        """Cut of each picture of a conversation, waiting ones included; they share the tiles of a prompt."""
        pictures = conversation.pictures()
        return [cut_of(self.processor, picture.size, len(pictures)) for picture in pictures]

    def ask(
        self,
        conversation: Conversation,
        question: str,
        sampling: Sampling,
        *,
        write: Callable[[str], None] = lambda text: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Answer a question about the conversation and its waiting pictures, which then are part of it.

        Args:
            conversation: changed only when the answer is complete or stopped.
            question: text of the question.
            sampling: length of the answer and choice of its tokens.
            write: called with each new piece of the answer's text.
            stop: called after each token; True ends the answer.

        Raises ChatError; the conversation then is as before.
        """
        start = time.perf_counter()
        turn = Turn(question, tuple(conversation.waiting), "")
        check_question(turn, self.template)
        cuts = tuple(self.cuts(conversation))
        prompt = answer_prompt(self.about.template, conversation.messages(turn))
        inputs = self.generator.encode([prompt], [[picture.open() for picture in conversation.pictures()]])
        prompt_tokens = inputs["input_ids"].shape[1]
        tiles = sum(cut.tiles for cut in cuts)
        room = self._room(prompt_tokens, tiles)
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        times: list[float] = []

        def decode(ids: list[int]) -> str:
            return self.processor.tokenizer.decode(ids, skip_special_tokens=True)

        stream = TextStream(decode, write)

        def on_token(token: int) -> None:
            times.append(time.perf_counter())
            stream.add(token)

        try:
            new = self.generator.generate(inputs, sampling, on_token=on_token, stop=stop)
        except torch.OutOfMemoryError as error:
            raise ChatError(
                f"no memory left on {self.about.device} for {prompt_tokens:,} tokens and {tiles} tiles; {_SHORTER}"
            ) from error
        # A mark in the answer would count as a picture when the conversation continues.
        turn.answer = self.generator.texts(new)[0].replace(IMAGE, "")
        conversation.turns.append(turn)
        # Not all: one that came meanwhile waits for the next question.
        del conversation.waiting[: len(turn.pictures)]
        figures = Figures(
            tiles,
            tiles * self.about.shallow_per_tile,
            tiles * self.about.deep_per_tile,
            prompt_tokens,
            new.shape[1],
            times[0] - start,
            times[-1] - start,
            self._ended(new, stop()),
        )
        return Answer(turn.answer, cuts, figures)

    def _room(self, prompt_tokens: int, tiles: int) -> int:
        """Tokens left for an answer. Raises ChatError if there are none."""
        room = self.about.max_tokens - prompt_tokens
        if room < 1:
            visual = tiles * self.about.deep_per_tile
            raise ChatError(
                f"too long for the model: {prompt_tokens:,} tokens ({visual:,} of pictures), and it has "
                f"{self.about.max_tokens:,} for question and answer; {_SHORTER}"
            )
        return room

    def _ended(self, new: torch.Tensor, stopped: bool) -> str:
        ends = self.generator.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        if int(new[0, -1]) in ends:
            return "end"
        return "stopped" if stopped else "length"
