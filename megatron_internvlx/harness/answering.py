"""Answers of an export to a harness's messages, with the tiles, template and end token of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_internvlx import platform
from megatron_internvlx.checkpoint.checks import check_model_directory
from megatron_internvlx.evaluation.generation import Generator, Sampling, answer_prompt
from megatron_internvlx.evaluation.hf_model import load_model
from megatron_internvlx.harness.messages import Message, training_turns

DTYPES = ("float32", "bfloat16", "float16")
MAX_NEW_TOKENS = 1024
"""Length limit of an answer where a task sets none, in tokens."""


@dataclass(frozen=True)
class Answer:
    """Generated answer."""

    text: str
    tokens: int
    """Tokens generated, the end token included."""


def sampling_of(settings: Mapping[str, Any], max_new_tokens: int = MAX_NEW_TOKENS) -> Sampling:
    """Choice of tokens for a task's generation settings; other keys than these are ignored.

    Args:
        settings: `max_new_tokens`, `do_sample`, `temperature`, `top_p`, `num_beams`, each optional or None.
        max_new_tokens: length limit where the task sets none.

    Raises ValueError for beam search.
    """
    if (settings.get("num_beams") or 1) > 1:
        raise ValueError(
            f"num_beams {settings['num_beams']} must be 1: answers are generated without beam search"
        )
    temperature = settings.get("temperature") or 0.0
    if settings.get("do_sample") is False:
        temperature = 0.0
    elif settings.get("do_sample") and not temperature:
        temperature = 1.0
    return Sampling(
        int(settings.get("max_new_tokens") or max_new_tokens),
        temperature=float(temperature),
        top_p=float(settings.get("top_p") or 1.0),
    )


class ExportAnswerer:
    """Answers messages with the model of an exported or released directory.

    Args:
        directory: of the model.
        dtype: type of the weights, one of `DTYPES`.
        max_tiles: tiles of an image at most; None: as in training.
        device: of the model; None: this process's GPU, or the CPU.

    Raises ValueError (ConversionError) for a directory or a setting that cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        dtype: str = "bfloat16",
        max_tiles: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} must be one of {', '.join(DTYPES)}")
        check_model_directory("model", directory)
        model, processor, self.template = load_model(directory, getattr(torch, dtype))
        if max_tiles is not None:
            if max_tiles < processor.min_tiles:
                raise ValueError(
                    f"max_tiles {max_tiles} must be at least the model's min_tiles {processor.min_tiles}"
                )
            processor.max_tiles = max_tiles
        self.generator = Generator(model.to(device or platform.device()), processor)

    def answer(self, batch: Sequence[Sequence[Message]], sampling: Sampling) -> list[Answer]:
        """Answer conversations together; each ends with a user's message."""
        prompts, images = [], []
        for messages in batch:
            turns, own = training_turns(messages)
            prompts.append(answer_prompt(self.template, turns))
            images.append(own)
        new = self.generator.generate(self.generator.encode(prompts, images), sampling)
        tokens = [self.generator.count_tokens(row[None]) for row in new]
        return [Answer(text, count) for text, count in zip(self.generator.texts(new), tokens, strict=True)]
