"""Answers of exported directories in vLLM, one directory after another in one process.

Runs in the environment of `tools/vllm_env.sh`, where neither Megatron nor pytest need be:

    .venv-vllm/bin/python -m testing.vllm_answers JOBS.json ANSWERS.json

JOBS is a list of objects: `directory`; `engine`, arguments of vLLM's LLM; `tokens`, new tokens per answer; `batches`, a
list of lists of prompts, each with `text` and `images` (paths); `stop`, whether the model's stop tokens end an
answer; `never`, token ids that no answer has.
ANSWERS has an object for each: `answers`, token ids in the order of the prompts; `prompts`, their numbers of tokens;
`seconds` of each batch; `blocks`, the most cache blocks of each prompt per cache group; `bytes_per_block`,
`block_size`; or `refused`, the message of a ValueError.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
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


def ask(job: dict[str, Any]) -> dict[str, Any]:
    """Answers of one directory."""
    from PIL import Image
    from vllm import LLM, SamplingParams

    try:
        model = LLM(job["directory"], **(ENGINE | job.get("engine", {})))
    except ValueError as error:
        return {"refused": str(error)}
    record, size, rows = watch_blocks(model.llm_engine)
    sampling = SamplingParams(
        temperature=0, max_tokens=job["tokens"], ignore_eos=not job.get("stop"), detokenize=False,
        logit_bias=dict.fromkeys(job.get("never", []), -100.0),
    )  # fmt: skip
    answers, prompts, seconds, blocks = [], [], [], []
    for batch in job["batches"]:
        inputs = []
        for prompt in batch:
            images = [Image.open(path).convert("RGB") for path in prompt["images"]]
            inputs.append(
                {"prompt": prompt["text"]} | ({"multi_modal_data": {"image": images}} if images else {})
            )
        record.clear()
        start = time.perf_counter()
        outputs = model.generate(inputs, sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        answers += [list(output.outputs[0].token_ids) for output in outputs]
        prompts += [len(output.prompt_token_ids) for output in outputs]
        numbered = sorted(record, key=lambda name: int(name.split("-")[0]))
        blocks += [record[name] for name in numbered]
    return {
        "answers": answers, "prompts": prompts, "seconds": seconds, "blocks": blocks, "bytes_per_block": size,
        "block_size": rows,
    }  # fmt: skip


def main() -> None:
    """Run the jobs of a file."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    source, target = map(Path, sys.argv[1:])
    found = []
    for job in json.loads(source.read_text()):
        found.append(ask(job))
        gc.collect()
    target.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
