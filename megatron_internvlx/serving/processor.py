"""Prompts and images for vLLM by the exported processor: its tiles, its tokens.

How many tiles an image gets depends on how many images its prompt has. vLLM keeps processed images and encoder outputs
by a hash of the image and of the processor's settings; so the limit of the prompt is one of these settings here.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)

from megatron_internvlx.hf.processing_internvlx import CONTEXT, END, IMAGE, START, InternVLXProcessor, upright
from megatron_internvlx.serving.settings import with_start

LIMIT = "tile_limit"
"""Setting of one prompt: tiles that each of its images may get, the thumbnail not counted."""


def as_trained(item: Any) -> Any:
    """An image as training decodes it: upright, alpha dropped, where vLLM would blend it with white."""
    if isinstance(item, MediaWithBytes):
        image = upright(Image.open(io.BytesIO(item.original_bytes))).convert("RGB")
        return MediaWithBytes(image, item.original_bytes, item.io_config)
    return upright(item).convert("RGB") if isinstance(item, Image.Image) else item


class Parser(MultiModalDataParser):
    """vLLM's parser of inputs, with images as in training."""

    def _parse_image_data(self, data: Any) -> Any:
        if isinstance(data, Image.Image | MediaWithBytes):
            data = [data]
        if isinstance(data, list | tuple):
            data = [as_trained(item) for item in data]
        return super()._parse_image_data(data)


class ProcessingInfo(BaseProcessingInfo):
    """Settings of the exported processor."""

    @cached_property
    def exported(self) -> InternVLXProcessor:
        """The processor, by this package's class: the one of the directory is a copy of it."""
        return self.ctx.get_hf_processor(InternVLXProcessor)

    def get_hf_processor(self, **_kwargs: object) -> InternVLXProcessor:
        """The exported processor, without changes."""
        return self.exported

    def get_data_parser(self) -> MultiModalDataParser:
        """The parser of images."""
        return Parser(expected_hidden_size=self._get_expected_hidden_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Images, as many as fit."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Placeholders of the image with the most tiles, with the marks around them."""
        return {"image": self.most_tiles() * self.exported.tokens_per_tile + 2}

    def most_tiles(self) -> int:
        """Tiles that an image has at most."""
        tiles = self.exported.max_tiles if self.exported.dynamic_image_size else 1
        return tiles + (self.exported.use_thumbnail and tiles > 1)


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
    """The largest inputs, with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Marks of so many images."""
        return IMAGE * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any
    ) -> dict[str, Any]:
        """So many images of the most tiles: as wide as these side by side."""
        processor = self.info.exported
        side = processor.tile_size
        image = Image.new("RGB", (side * processor.max_tiles, side))
        return {"image": [image] * mm_counts.get("image", 0)}


class Processor(BaseMultiModalProcessor[ProcessingInfo]):
    """Prompts with `<image>`, or `<IMG_CONTEXT>`, once per image, as the exported processor takes them."""

    def __init__(self, info: ProcessingInfo, *args: Any, **kwargs: Any) -> None:
        super().__init__(info, *args, **kwargs)
        tokenizer = info.get_tokenizer()
        tokenizer.chat_template = with_start(tokenizer, tokenizer.chat_template)

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process one prompt.

        Raises:
            ValueError: settings of the processor are given, which are those of training.
        """
        if inputs.hf_processor_mm_kwargs:
            raise ValueError(
                f"mm_processor_kwargs {sorted(inputs.hf_processor_mm_kwargs)}: tiles are cut as in training, by "
                "processor_config.json of the model's directory; leave mm_processor_kwargs out"
            )
        images = inputs.mm_data_items.get_all_counts().get("image", 0)
        limit = max(1, self.info.exported.max_tiles // max(1, images))
        return super().apply(replace(inputs, hf_processor_mm_kwargs={LIMIT: limit}), timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        tiles = [self.info.exported.tiles(image, hf_kwargs[LIMIT]) for image in hf_data["images"]]
        return BatchFeature(
            {"pixel_values": torch.cat(tiles), "tiles": torch.tensor([len(t) for t in tiles])}
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        counts = hf_inputs.get("tiles", torch.empty(0, dtype=torch.int64))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", counts),
            "tiles": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self, mm_items: MultiModalDataItems, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        tokenizer = self.info.get_tokenizer()
        start, context, end = tokenizer.convert_tokens_to_ids([START, CONTEXT, END])

        def tokens(index: int) -> PromptUpdateDetails:
            count = int(out_mm_kwargs["image"][index]["tiles"].data) * self.info.exported.tokens_per_tile
            return PromptUpdateDetails.select_token_id([start, *[context] * count, end], context)

        return [PromptReplacement(modality="image", target=[context], replacement=tokens)]

    def _apply_prompt_updates(self, token_ids: list[int], mm_prompt_updates: Any) -> Any:
        """Put the placeholders into the text and tokenize it whole, as the exported processor does.

        Tokens around a mark may differ from those around placeholders.
        """
        tokenizer = self.info.get_tokenizer()
        text = tokenizer.decode(token_ids)
        mark = IMAGE if IMAGE in text or START in text else CONTEXT
        before, *rest = text.split(mark)
        updates = mm_prompt_updates.get("image", [])
        if len(rest) != len(updates):
            raise ValueError(
                f"{len(rest)} {mark} placeholders in a prompt, but {len(updates)} images are given"
            )
        for (update,), after in zip(updates, rest, strict=True):
            before += START + CONTEXT * (len(update.content.full) - 2) + END + after
        tokens = tokenizer.encode(before, add_special_tokens=False)
        return tokens, self._find_mm_placeholders(tokens, mm_prompt_updates)
