"""Answers of an export in vLLM: a program for the Python of vLLM's environment, which need not have this package.

    .venv-vllm/bin/python vllm_answers.py JOB.json ANSWERS.json

JOB has `hf`, `dtype`, `max_new_tokens`, `batch_size`, `max_model_len`, `images` (the most of one prompt),
`trust_remote_code`, and `messages`: a list of OpenAI's chat messages for every question, with `data:` URIs. ANSWERS
is as that of local_answers.py.
"""

import json
import os
import re
import sys
import time

# Settings for CPU, which change nothing on a GPU.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


def peak_memory():
    """The most memory in bytes that this process had; None where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="utf-8") as file:  # noqa: PTH123
            match = re.search(r"^VmHWM:\s+(\d+) kB", file.read(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def ask(job):
    """Result for a job, as a dictionary."""
    from vllm import LLM, SamplingParams

    model = LLM(
        job["hf"],
        dtype=job["dtype"],
        max_model_len=job["max_model_len"],
        max_num_seqs=job["batch_size"],
        limit_mm_per_prompt={"image": job["images"]},
        trust_remote_code=job["trust_remote_code"],
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
    )
    sampling = SamplingParams(temperature=0, max_tokens=job["max_new_tokens"])
    start = time.perf_counter()
    outputs = model.chat(job["messages"], sampling, chat_template_content_format="openai", use_tqdm=False)
    seconds = time.perf_counter() - start
    answers = []
    for output in outputs:
        found = output.outputs[0]
        answers.append({"text": found.text.strip(), "tokens": list(found.token_ids)})
    return {
        "answers": answers,
        "answer_tokens": sum(len(answer["tokens"]) for answer in answers),
        "prompt_tokens": [len(output.prompt_token_ids) for output in outputs],
        "seconds": seconds,
        "peak_bytes": peak_memory(),
    }


def main():
    """Answer the questions of a job."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    source, target = sys.argv[1:]
    with open(source, encoding="utf-8") as file:  # noqa: PTH123
        job = json.load(file)
    result = ask(job)
    with open(target, "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump(result, file)


if __name__ == "__main__":
    main()
