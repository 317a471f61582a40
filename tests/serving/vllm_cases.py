"""Exported directories with random weights, prompts for them, and transformers' greedy answers."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_internvlx.checkpoint.exporter import export_checkpoint
from megatron_internvlx.checkpoint.importer import import_checkpoint
from megatron_internvlx.checkpoint.remote_code import chat_template
from megatron_internvlx.data.conversation import TEMPLATES
from megatron_internvlx.evaluation.hf_model import load_model
from tests.converting import LLAMA3_ROPE, MOE, TOKENIZER, internvl, make_directory, with_lvtc

TOKENS = 24  # of an answer
BATCH = 4
# vLLM's attention on the CPU has heads of 32 and more, so the tests' usual decoder is too narrow. Tiles of 8 x 8
# patches have 16 placeholders, 4 of them in the shallow layers.
SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 6,
    "max_position_embeddings": 2048,
}  # fmt: skip
QUESTIONS = ("What is this?", "How many?", "Colour of the left one?", "Why, and since when?", "Read it.")


@dataclass(frozen=True)
class Case:
    """A directory to export."""

    family: str
    architecture: str
    compression: dict[str, Any] | None = None
    """Of `with_lvtc`; None: released names, MLP, one phase."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Of the decoder."""
    prompts: int = 20

    def config(self) -> dict[str, Any]:
        """config.json of the directory to import."""
        extra = {"bias": False} if self.family == "internlm2" else {}
        vision = {"image_size": 32}
        found = internvl(self.architecture, self.family, vision=vision, **(SIZES | extra | self.extra))
        found["force_image_size"] = 32
        return found if self.compression is None else with_lvtc(found, **self.compression)


OFF = {"expand_layer": None, "inject_layers": None}
SECOND = {"expand_layer": 2, "inject_layers": [3]}
QWEN2, INTERNLM2 = ("qwen2", "Qwen2ForCausalLM"), ("internlm2", "InternLM2ForCausalLM")
LONG_ROPE = {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}
CASES = {
    "qwen2_pvtc": Case(*QWEN2, SECOND),
    "qwen2_mlp": Case(*QWEN2, {"projector": "mlp", "expand_layer": 3, "inject_layers": [4]}),
    "internlm2_pvtc": Case(*INTERNLM2, {"expand_layer": 4, "inject_layers": None, "upsample": "nearest"}),
    "internlm2_mlp": Case(*INTERNLM2, {"projector": "mlp", "expand_layer": 1, "inject_layers": [2, 4]}),
    "qwen2_pvtc_off": Case(*QWEN2, OFF),
    "internlm2_pvtc_off": Case(*INTERNLM2, OFF),
    "qwen2_mlp_off": Case(*QWEN2, {"projector": "mlp", **OFF}),
    "internlm2_mlp_off": Case(*INTERNLM2, {"projector": "mlp", **OFF}),
    "qwen2_tied": Case(*QWEN2, SECOND, {"tie_word_embeddings": True}, prompts=8),
    "llama3": Case("llama", "LlamaForCausalLM", SECOND, LONG_ROPE, prompts=8),
    "qwen3_moe": Case("qwen3_moe", "Qwen3MoeForCausalLM", SECOND, MOE, prompts=8),
    # One shallow layer of 14 would make 14 cache groups of one layer, so all share one.
    "qwen2_one_group": Case(
        *QWEN2, {"expand_layer": 1, "inject_layers": None}, {"num_hidden_layers": 14}, prompts=8
    ),
}


def export(root: Path, name: str) -> Path:
    """Write the directory of a case under `root`."""
    config = CASES[name].config()
    source = make_directory(root / f"{name}.source", config, tokenizer=True, scale=2.0)
    if CASES[name].family == "internlm2":  # whose prompts begin with <s>
        shutil.copytree(TOKENIZER.parent / "internlm2_fast", source, dirs_exist_ok=True)
    import_checkpoint(source, root / f"{name}.ck", processes=1, quiet=True)
    remote_code = CASES[name].compression is not None
    export_checkpoint(root / f"{name}.ck", root / name, remote_code=remote_code, processes=1, quiet=True)
    return root / name


def draw_pictures(folder: Path, count: int = 8) -> list[str]:
    """Write images of different sizes, of 1 to 7 tiles; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = []
    for index in range(count):
        height, width = (int(side) for side in rng.integers(20, 110, 2))
        cells = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
        path = folder / f"{index}.png"
        image = Image.fromarray(cells).resize((width, height))
        if index % 2:  # alpha is dropped in training, and not blended with white
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(path)
        paths.append(str(path))
    return paths


def batches(template: str, pictures: list[str], count: int) -> list[list[dict[str, Any]]]:
    """`count` prompts in batches of four: 0 to 3 images, one to three rounds, images in any of them."""
    rng = random.Random(1)
    prompts = []
    for index in range(count):
        images = rng.sample(pictures, index % 4)
        rounds = 1 + index // 4 % 3
        asked: list[list[dict[str, str]]] = [[] for _ in range(rounds)]
        for number in range(len(images)):
            asked[number % rounds].append({"type": "image"})
        talk = []
        for content in asked:
            talk.append(
                {"role": "user", "content": [*content, {"type": "text", "text": rng.choice(QUESTIONS)}]}
            )
            talk.append({"role": "assistant", "content": "A cat, or two."})
        (text,), _ = render_jinja_template([talk[:-1]], chat_template=template, add_generation_prompt=True)
        prompts.append({"text": text, "messages": talk[:-1], "images": images})
    return [prompts[start : start + BATCH] for start in range(0, count, BATCH)]


def job(directory: Path, pictures: list[str], count: int, **engine: Any) -> dict[str, Any]:
    """What `testing.vllm_answers` is asked."""
    model, _, template = load_model(directory, torch.float32)
    return {
        "directory": str(directory), "engine": engine, "tokens": TOKENS, "never": [model.config.image_token_id],
        "batches": batches(chat_template(TEMPLATES[template]), pictures, count),
    }  # fmt: skip


def expected(asked: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts, and of the greedy answers of transformers' `generate`, without an end."""
    model, processor, _ = load_model(Path(asked["directory"]), torch.float32)
    prompts: list[list[int]] = []
    answers: list[list[int]] = []
    for batch in asked["batches"]:
        images = [[Image.open(path) for path in prompt["images"]] for prompt in batch]
        inputs = processor(images=images, text=[prompt["text"] for prompt in batch])
        with torch.no_grad():
            found = model.generate(
                **inputs, max_new_tokens=asked["tokens"], do_sample=False, eos_token_id=None, pad_token_id=0,
                suppress_tokens=asked["never"],
            )  # fmt: skip
        length = inputs["input_ids"].shape[1]
        answers += found[:, length:].tolist()
        prompts += [
            row[mask.bool()].tolist()
            for row, mask in zip(found[:, :length], inputs["attention_mask"], strict=True)
        ]
    return prompts, answers
