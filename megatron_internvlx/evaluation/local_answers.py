"""Answers of an export in a process of its own, through our evaluation or through transformers' `generate`.

    python -m megatron_internvlx.evaluation.local_answers JOB.json ANSWERS.json

JOB has `way` (evaluate or generate), `hf`, `dtype`, `max_new_tokens`, `batch_size` and `questions`: objects with
`prompt` and `images` (paths). ANSWERS has `answers` (objects with `text` and `tokens`, ids with the end token),
`answer_tokens` (number of all, ends included), `prompt_tokens` of each question, `seconds` without loading, and
`peak_bytes`, the most memory that the process had.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_internvlx import platform
from megatron_internvlx.evaluation.served_answers import peak_memory


def answers_of_evaluate(job: dict[str, Any]) -> Iterator[tuple[str, list[int], int]]:
    """(text, token ids, tokens of the prompt) of each question, in batches, as `ivlx evaluate` generates them.

    The first item comes when the model is loaded, and stands for nothing.
    """
    from megatron_internvlx.evaluation.generation import Generator, Sampling
    from megatron_internvlx.evaluation.hf_model import load_model

    model, processor, _ = load_model(Path(job["hf"]), getattr(torch, job["dtype"]))
    generator, sampling = Generator(model.to(platform.device()), processor), Sampling(job["max_new_tokens"])
    stops = set(model.generation_config.eos_token_id)
    yield "", [], 0  # loaded
    for start in range(0, len(job["questions"]), job["batch_size"]):
        batch = job["questions"][start : start + job["batch_size"]]
        inputs = generator.encode([one["prompt"] for one in batch], [one["images"] for one in batch])
        new = generator.generate(inputs, sampling)
        lengths = inputs["attention_mask"].sum(1).tolist()
        for text, row, length in zip(generator.texts(new), new.tolist(), lengths, strict=True):
            yield text, with_end(row, stops), length


def answers_of_generate(job: dict[str, Any]) -> Iterator[tuple[str, list[int], int]]:
    """The same, one at a time, by the directory's own code with the arguments that evaluation harnesses give."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options: dict[str, Any] = {"trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(job["hf"], **options)
    model: Any = AutoModelForImageTextToText.from_pretrained(
        job["hf"], dtype=getattr(torch, job["dtype"]), **options
    )
    model.to(platform.device()).eval()
    tokenizer = processor.tokenizer
    yield "", [], 0
    for question in job["questions"]:
        inputs = dict(
            processor(text=question["prompt"], images=question["images"] or None, return_tensors="pt")
        )
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        length = inputs["input_ids"].shape[1]
        out = model.generate(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()},
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=job["max_new_tokens"],
            do_sample=False,
        )
        row = out[0, length:].tolist()
        text = processor.decode(row, skip_special_tokens=True).strip()
        yield text, with_end(row, {tokenizer.eos_token_id}), length


def with_end(row: Sequence[int], stops: set[int]) -> list[int]:
    """Token ids up to the first that ends an answer, which is included."""
    return list(row[: next((at + 1 for at, token in enumerate(row) if token in stops), len(row))])


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the questions of a job; returns the exit code."""
    source, target = map(Path, sys.argv[1:] if argv is None else argv)
    job = json.loads(source.read_text(encoding="utf-8"))
    found = {"evaluate": answers_of_evaluate, "generate": answers_of_generate}[job["way"]](job)
    next(found)
    start = time.perf_counter()
    rows = list(found)
    result = {
        "answers": [{"text": text, "tokens": tokens} for text, tokens, _ in rows],
        "answer_tokens": sum(len(tokens) for _, tokens, _ in rows),
        "prompt_tokens": [length for _, _, length in rows],
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_memory(os.getpid()),
    }
    target.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
