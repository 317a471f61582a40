"""Cache memory and speed of vLLM with LVTC on and off, on CPU, and what the cache of a large model would take.

The two models have the same sizes and random weights; they differ in the rows of their shallow layers. Both are asked
in one process, in turns:

    python -m benchmarks.serving --tokenizer runs/demo/data/tokenizer [--vllm-python .venv-vllm/bin/python]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import ROOT, table, write
from megatron_internvlx.serving.phases import layer_parts, part_sizes, shallow_length, vllm_groups

LAYERS, SHALLOW, HEADS, WIDTH = 12, 4, 4, 64
LOW, HIGH = 64, 256
ROWS = 32  # of a block
TOKENS = 64
REQUESTS = 4


def make_model(folder: Path, tokenizer: Path, expand_layer: int | None) -> str:
    """Write a model with random weights as an export has it; return the folder's name."""
    import torch

    from megatron_internvlx.hf.configuration_internvlx import InternVLXConfig
    from megatron_internvlx.hf.modeling_internvlx import InternVLXForConditionalGeneration

    shutil.copytree(tokenizer, folder)
    vision = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
        "patch_size": 14, "image_size": 448, "initializer_factor": 0.1,
    }  # fmt: skip
    decoder = {
        "family": "qwen2", "vocab_size": 512, "hidden_size": HEADS * 2 * WIDTH, "intermediate_size": 1536,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2 * HEADS, "num_key_value_heads": HEADS,
    }  # fmt: skip
    compression = {"projector": "pvtc", "expand_layer": expand_layer, "upsample": "bilinear"}
    config = InternVLXConfig(vision, decoder, compression, image_token_id=5)
    torch.manual_seed(0)
    model = InternVLXForConditionalGeneration(config)
    config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    settings = {
        "processor_class": "InternVLXProcessor",
        "tile_size": 448,
        "tokens_per_tile": HIGH,
        "max_tiles": 4,
    }
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return str(folder)


def prompts(folder: Path) -> list[dict[str, Any]]:
    """One image of four tiles and a thumbnail each, and a question."""
    found = []
    for number in range(REQUESTS):
        path = folder / f"{number}.png"
        cells = np.random.default_rng(number).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(cells).resize((896, 896)).save(path)
        found.append({"text": "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n", "images": [str(path)]})
    return found


def measure(python: Path, tokenizer: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Answers of `testing.vllm_answers` by "on" and "off"; the first batch warms up."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = prompts(folder)
        jobs = [
            {
                "directory": make_model(folder / kind, tokenizer, layer), "tokens": TOKENS, "repeat": rounds,
                "engine": {"block_size": ROWS, "max_model_len": 4096}, "batches": [asked], "never": [5],
            }
            for kind, layer in (("on", SHALLOW), ("off", None))
        ]  # fmt: skip
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command = [
            str(python),
            "-m",
            "testing.vllm_answers",
            str(folder / "jobs.json"),
            str(folder / "out.json"),
        ]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)
        return dict(zip(("on", "off"), json.loads((folder / "out.json").read_text()), strict=True))


def cache_bytes(
    layers: int, shallow: int, tiles: int, text: int, row_bytes: int, rows: int
) -> tuple[int, int, int]:
    """Bytes of a request's cache (used by rows, taken in blocks, taken with LVTC off); a row of a layer has so many."""
    deep = text + tiles * HIGH
    kept = shallow_length(deep, [(0, tiles * HIGH)], LOW, HIGH)
    parts = layer_parts(shallow, layers - shallow)
    assert parts is not None
    sizes = part_sizes(shallow, layers - shallow, parts)
    width, _ = vllm_groups(sizes)
    groups = [sum(-(-size // width) for size in part) for part in (sizes[: parts[0]], sizes[parts[0] :])]
    blocks = groups[0] * -(-kept // rows) + groups[1] * -(-deep // rows)
    used = row_bytes * (shallow * kept + (layers - shallow) * deep)
    return used, blocks * width * rows * row_bytes, layers * -(-deep // rows) * rows * row_bytes


def large_models() -> list[str]:
    """The cache of one request of larger models in bf16, computed: no weights are needed for it."""
    rows: list[list[Any]] = [
        ["decoder", "shallow layers", "request", "LVTC off, MB", "on, MB", "on, unused in it", "ratio"]
    ]
    for name, layers, shallow, heads in (("InternLM2.5-7B", 32, 10, 8), ("InternLM2-1.8B", 24, 8, 8)):
        for tiles, text in ((1, 64), (7, 128), (13, 256), (39, 512)):
            used, taken, off = cache_bytes(layers, shallow, tiles, text, heads * 128 * 2 * 2, 16)
            rows.append([
                f"{name}, {layers} layers", shallow, f"{tiles} tiles, {text} of text", f"{off / 1e6:.0f}",
                f"{taken / 1e6:.0f}", f"{100 * (taken - used) / taken:.1f} %", f"{taken / off:.3f}",
            ])  # fmt: skip
    return table(rows)


def main() -> None:
    """Measure, and write the tables."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--tokenizer", type=Path, required=True, help="folder of the demo's tokenizer")
    options.add_argument("--vllm-python", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python")
    options.add_argument("--rounds", type=int, default=5)
    given = options.parse_args()
    found = measure(given.vllm_python.absolute(), given.tokenizer, given.rounds)
    rows: list[list[Any]] = [["", "LVTC on", "LVTC off", "ratio"]]
    length = len(found["on"]["prompts"][0]) + TOKENS - 1
    memory = {k: sum(v["blocks"][0]) * v["bytes_per_block"] for k, v in found.items()}
    first = {k: median(v["first"]) for k, v in found.items()}
    rest = {k: median(v["seconds"]) - first[k] for k, v in found.items()}
    total = {k: median(v["seconds"]) for k, v in found.items()}
    rows.append(
        [
            f"cache of a request of {length} rows, MB",
            *(f"{memory[k] / 1e6:.2f}" for k in found),
            _ratio(memory),
        ]
    )
    rows.append(["cache per row, kB", *(f"{memory[k] / 1e3 / length:.2f}" for k in found), _ratio(memory)])
    rows.append(["blocks per cache group", *(found[k]["blocks"][0] for k in found), ""])
    rows.append(
        [f"first tokens of {REQUESTS} requests, s", *(f"{first[k]:.2f}" for k in found), _ratio(first)]
    )
    speed = {k: REQUESTS * (TOKENS - 1) / rest[k] for k in found}
    rows.append(["tokens/s after the first", *(f"{speed[k]:.0f}" for k in found), _ratio(speed)])
    speed = {k: REQUESTS * TOKENS / total[k] for k in found}
    rows.append([f"tokens/s of answers of {TOKENS}", *(f"{speed[k]:.0f}" for k in found), _ratio(speed)])
    write(
        "serving", "vLLM with LVTC on and off", "python -m benchmarks.serving --tokenizer runs/demo/data/tokenizer",
        [f"Random weights: {LAYERS} layers, {SHALLOW} of them shallow, width {2 * HEADS * WIDTH}; {REQUESTS} requests "
         f"at once, one image of 5 tiles each; blocks of {ROWS} rows. vLLM 0.32.0 in its own environment; medians.", "",
         *table(rows), "", "Computed, in bf16, blocks of 16 rows:", "", *large_models()],
    )  # fmt: skip


def _ratio(values: dict[str, float]) -> str:
    return f"{values['on'] / values['off']:.2f}"


if __name__ == "__main__":
    main()
