"""Exports in vLLM give the tokens of transformers' `generate`, in fp32.

One process of vLLM's environment (tools/vllm_env.sh) runs all engines: a minute or two. The random models never give
the same token twice in a row, so that a wrong row, position or cache block changes an answer: with deep positions in
the shallow layers 0 of 15 answers about images were the same, with the blocks of another cache group 0 of 20.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_internvlx.serving.phases import layer_parts, part_sizes, vllm_groups
from tests.serving.vllm_cases import CASES, TOKENS, draw_pictures, expected, export, job

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("VLLM_ENV", ROOT / ".venv-vllm")) / "bin" / "python"
DEMO = ROOT / "runs" / "demo" / "hf"
LOW, HIGH = 4, 16  # placeholders of a tile in the two phases
ROWS = 32  # of a cache block

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: tools/vllm_env.sh makes it")


def together(asked: dict[str, Any], **engine: Any) -> dict[str, Any]:
    """The same prompts all at once, in an engine with other settings."""
    return asked | {
        "batches": [[prompt for batch in asked["batches"] for prompt in batch]],
        "engine": asked["engine"] | engine,
    }


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What vLLM is asked, by name."""
    root = tmp_path_factory.mktemp("vllm")
    pictures = draw_pictures(root / "pictures")
    found = {
        name: job(export(root, name), pictures, case.prompts, block_size=ROWS) for name, case in CASES.items()
    }
    if DEMO.is_dir():
        found["demo"] = job(DEMO, pictures, 20)
    first = found["qwen2_pvtc"]
    return found | {
        "chat": found["internlm2_mlp"] | {"chat": True},
        # An image has up to 114 rows with its marks, and prefill stops before one that does not fit.
        "chunks": together(first, max_num_batched_tokens=160, max_num_seqs=6),
        # One request takes up to 36 of 45 blocks, so that requests lose theirs and start again.
        "few_blocks": together(first, num_gpu_blocks_override=46, max_model_len=384),
        "lora": first | {"engine": {"enable_lora": True}},
    }


@pytest.fixture(scope="module")
def answers(jobs: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM answers, by name."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    command = [str(PYTHON), "-m", "testing.vllm_answers", "jobs.json", "answers.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(jobs, json.loads((folder / "answers.json").read_text()), strict=True))


@pytest.mark.parametrize("name", [*CASES, "demo", "chat", "chunks", "few_blocks"])
def test_tokens_of_generate(name: str, jobs: dict[str, Any], answers: dict[str, Any]) -> None:
    if name == "demo" and name not in jobs:
        pytest.skip(f"no {DEMO}: make demo makes it")
    prompts, tokens = expected(jobs[name])
    assert answers[name]["prompts"] == prompts
    assert answers[name]["answers"] == tokens
    if name != "demo":
        assert min(len(set(answer)) for answer in tokens) >= TOKENS // 2, (
            "answers must vary to prove anything"
        )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.compression])
def test_blocks_hold_the_rows_of_their_phase(
    name: str, jobs: dict[str, Any], answers: dict[str, Any]
) -> None:
    """Shallow layers take blocks for 4 rows of a tile; a block of theirs is not larger than others."""
    compression, asked = CASES[name].compression, jobs[name]
    assert compression is not None
    config = json.loads((Path(asked["directory"]) / "config.json").read_text())["llm_config"]
    layers, shallow = config["num_hidden_layers"], compression["expand_layer"] or 0
    parts = layer_parts(shallow, layers - shallow) if shallow else None
    width, groups, few = layers, 1, 0  # layers of a group, groups, and those of shallow layers
    if parts is not None:
        sizes = part_sizes(shallow, layers - shallow, parts)
        width, groups = vllm_groups(sizes)
        few = sum(-(-size // width) for size in sizes[: parts[0]])
    for prompt, blocks in zip(answers[name]["prompts"], answers[name]["blocks"], strict=True):
        deep = len(prompt) + TOKENS - 1  # the last token is not run
        kept = deep - prompt.count(asked["never"][0]) // HIGH * (HIGH - LOW)
        assert blocks == [-(-kept // ROWS)] * few + [-(-deep // ROWS)] * (groups - few)
    numbers = width * ROWS * 2 * 2 * 32  # layers, rows, keys and values, heads and their width
    assert answers[name]["bytes_per_block"] == 4 * numbers


def test_refused_by_name(answers: dict[str, Any]) -> None:
    assert "InternVL-X in vLLM does not run with\n  enable_lora: " in answers["lora"]["refused"]
