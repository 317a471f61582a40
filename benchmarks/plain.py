"""What a user would write without this project: a Hugging Face model, AdamW, one padded batch per step.

`internvl` is transformers' own InternVL with Qwen2; `internvlx` is the InternVL-X model that our export
ships as remote code, for which there is no class in transformers.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

from benchmarks.trainer import Sample, tokens_of
from megatron_internvlx import platform
from megatron_internvlx.hf.configuration_internvlx import InternVLXConfig
from megatron_internvlx.hf.modeling_internvlx import InternVLXForConditionalGeneration

IMAGE_TOKEN = 0


def build(kind: str, size: dict[str, Any]) -> torch.nn.Module:
    """The model; `size` as in benchmarks/step_time.py."""
    if kind == "internvl":
        vision = InternVLVisionConfig(
            hidden_size=size["vision_hidden"],
            num_hidden_layers=size["vision_layers"],
            num_attention_heads=size["vision_heads"],
            intermediate_size=size["vision_ffn"],
            image_size=[size["image"]] * 2,
            patch_size=[size["patch"]] * 2,
            use_qk_norm=False,
            attention_bias=True,
            hidden_dropout_prob=0.0,
            attention_dropout=0.0,
        )
        text = Qwen2Config(
            hidden_size=size["hidden"],
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            num_key_value_heads=size["kv_heads"],
            intermediate_size=size["ffn"],
            vocab_size=size["vocab"],
            tie_word_embeddings=False,
        )
        config = InternVLConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, tie_word_embeddings=False
        )
        return InternVLForConditionalGeneration(config)
    config = InternVLXConfig(
        vision_config={
            "hidden_size": size["vision_hidden"],
            "num_hidden_layers": size["vision_layers"],
            "num_attention_heads": size["vision_heads"],
            "intermediate_size": size["vision_ffn"],
            "image_size": size["image"],
            "patch_size": size["patch"],
        },
        llm_config={
            "family": "qwen2",
            "hidden_size": size["hidden"],
            "num_hidden_layers": size["layers"],
            "num_attention_heads": size["heads"],
            "num_key_value_heads": size["kv_heads"],
            "intermediate_size": size["ffn"],
            "vocab_size": size["vocab"],
        },
        compression=size["compression"],
        image_token_id=IMAGE_TOKEN,
    )
    return InternVLXForConditionalGeneration(config)


class PlainTrainer:
    """Model, AdamW, gradient clipping; every micro-batch is padded to its longest sample.

    fp32 on CPU. On a GPU bf16 by autocast with fp32 weights, which is the arithmetic of this trainer's bf16.
    """

    def __init__(self, kind: str, size: dict[str, Any], micro_batches: list[list[Sample]]) -> None:
        torch.manual_seed(1)
        self.device = platform.device()
        self.model = build(kind, size).train().to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batches = [self._collate(samples, size) for samples in micro_batches]

    @staticmethod
    def _collate(samples: list[Sample], size: dict[str, Any]) -> dict[str, torch.Tensor]:
        per_tile = (size["image"] // size["patch"] // 2) ** 2
        ids, labels, _ = tokens_of(samples, per_tile, size["vocab"])
        longest = max(map(len, ids))

        def padded(rows: list[np.ndarray], value: int) -> torch.Tensor:
            return torch.tensor(
                np.stack([np.pad(x, (0, longest - len(x)), constant_values=value) for x in rows])
            )

        return {
            "input_ids": padded(ids, 1),
            "labels": padded(labels, -100),
            "attention_mask": padded([np.ones(len(x), int) for x in ids], 0),
            "pixel_values": torch.rand(sum(t for t, _ in samples), 3, size["image"], size["image"]),
        }

    def step(self) -> dict[str, float]:
        """One training step."""
        platform.synchronize()
        start = time.perf_counter()
        for batch in self.batches:
            rows = {name: tensor.to(self.device) for name, tensor in batch.items()}
            with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
                loss = self.model(**rows).loss
            (loss / len(self.batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        platform.synchronize()
        return {"seconds": time.perf_counter() - start}
