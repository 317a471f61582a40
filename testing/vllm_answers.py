"""Answers of exported directories in vLLM, one directory after another in one process.

Runs in the environment of `tools/vllm_env.sh`, where neither Megatron nor pytest need be:

    .venv-vllm/bin/python -m testing.vllm_answers JOBS.json ANSWERS.json

JOBS is a list of objects: `directory`; `engine`, arguments of vLLM's LLM; `tokens`, new tokens per answer; `batches`, a
list of lists of prompts, each with `text` and `images` (paths); `chat`, whether `messages` are asked instead of `text`;
`stop`, whether the model's stop tokens end an answer; `never`, token ids that no answer has; `repeat` (in all or none):
the engines are made together, and take so many turns, in seconds of the processor, which others do not disturb.
ANSWERS has an object for each: `answers`, token ids in the order of the prompts; `prompts`, theirs; `seconds` of each
batch, or of the first batch at each turn, then with `first`, those of its first tokens; `blocks`, the most blocks of
each prompt per cache group; `bytes_per_block`; `block_size`, in rows; or `refused`, the message of a ValueError.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_internvlx.evaluation import vllm_answers

ENVIRONMENT = vllm_answers.ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "ERROR"}
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "seed": 0,
    "disable_log_stats": True,
}


def watch_blocks(engine: Any) -> tuple[dict[str, list[int]], int, int]:
    """Record the blocks of each request per cache group, from now on: (record, bytes of a block, rows of a block)."""
    scheduler = engine.engine_core.engine_core.scheduler
    manager, record = scheduler.kv_cache_manager, {}
    allocate = manager.allocate_slots

    def recorded(request: Any, *args: Any, **kwargs: Any) -> Any:
        found = allocate(request, *args, **kwargs)
        if found is not None:
            record[request.request_id] = [
                len(group) for group in manager.get_blocks(request.request_id).blocks
            ]
        return found

    manager.allocate_slots = recorded
    config = scheduler.kv_cache_config
    size = config.kv_cache_tensors[0].size // config.num_blocks
    return record, size, config.kv_cache_groups[0].kv_cache_spec.block_size


def as_prompt(prompt: dict[str, Any]) -> dict[str, Any]:
    """A prompt for `LLM.generate`."""
    from PIL import Image

    images = [Image.open(path) for path in prompt["images"]]
    return {"prompt": prompt["text"]} | ({"multi_modal_data": {"image": images}} if images else {})


def as_messages(prompt: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages for `LLM.chat`, in which the images are data URIs."""
    paths = iter(prompt["images"])

    def part(content: dict[str, str]) -> dict[str, Any]:
        if content["type"] != "image":
            return content
        data = base64.b64encode(Path(next(paths)).read_bytes()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

    return [
        {"role": turn["role"], "content": turn["content"] if isinstance(turn["content"], str)
         else [part(content) for content in turn["content"]]}
        for turn in prompt["messages"]
    ]  # fmt: skip


class Engine:
    """An engine for a job. Raises ValueError if vLLM or the plugin refuses it."""

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM

        self.job = job
        self.model = LLM(job["directory"], **(ENGINE | job.get("engine", {})))
        self.record, self.size, self.rows = watch_blocks(self.model.llm_engine)

    def ask(self, batch: list[dict[str, Any]], tokens: int) -> tuple[list[Any], float]:
        """vLLM's outputs for the prompts, of so many tokens each, and seconds."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=not self.job.get("stop"), detokenize=False,
            logit_bias=dict.fromkeys(self.job.get("never", []), -100.0),
        )  # fmt: skip
        chat = self.job.get("chat")
        inputs = [as_messages(prompt) if chat else as_prompt(prompt) for prompt in batch]
        self.record.clear()
        clock = time.process_time if "repeat" in self.job else time.perf_counter
        start = clock()
        outputs = (self.model.chat if chat else self.model.generate)(inputs, sampling, use_tqdm=False)
        return outputs, clock() - start

    def answers(self) -> dict[str, Any]:
        """Answers to all batches."""
        found: dict[str, Any] = {"answers": [], "prompts": [], "seconds": [], "blocks": []}
        for batch in self.job["batches"]:
            outputs, seconds = self.ask(batch, self.job["tokens"])
            found["seconds"].append(seconds)
            found["answers"] += [list(output.outputs[0].token_ids) for output in outputs]
            found["prompts"] += [list(output.prompt_token_ids) for output in outputs]
            numbered = sorted(self.record, key=lambda name: int(name.split("-")[0]))
            found["blocks"] += [self.record[name] for name in numbered]
        return found | {"bytes_per_block": self.size, "block_size": self.rows}


def one_after_another(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers of each job, by an engine that is gone before the next is made."""
    found = []
    for job in jobs:
        try:
            found.append(Engine(job).answers())
        except ValueError as error:
            found.append({"refused": str(error)})
        gc.collect()
    return found


def in_turns(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers of engines that are all there, then times of the first batch, of which each engine has its turn."""
    engines = [Engine(job) for job in jobs]
    found = [engine.answers() | {"seconds": [], "first": []} for engine in engines]
    for _ in range(jobs[0]["repeat"]):
        for engine, answers in zip(engines, found, strict=True):
            batch, tokens = engine.job["batches"][0], engine.job["tokens"]
            answers["first"].append(engine.ask(batch, 1)[1])
            answers["seconds"].append(engine.ask(batch, tokens)[1])
    return found


def main() -> None:
    """Run the jobs of a file."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    source, target = map(Path, sys.argv[1:])
    jobs = json.loads(source.read_text())
    target.write_text(json.dumps(in_turns(jobs) if "repeat" in jobs[0] else one_after_another(jobs)))


if __name__ == "__main__":
    main()
