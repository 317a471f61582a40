"""Step time of InternVL-X and of plain InternVL, here and as a plain Hugging Face + PyTorch loop.

    python -m benchmarks.step_time           # quick: a small size, to see that everything runs
    python -m benchmarks.step_time --full    # the size where matrix products dominate

a: PVTC + LVTC against the MLP projector at the same deep resolution, in this trainer; the speed-up
against the ratio of counted FLOPs. b: both against the plain loop, same samples, same sizes: equal
lengths, and mixed lengths, which we pack and the plain loop pads. Where there is a GPU all of them run there in
bf16, and `--full` takes the widths of the 2B model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, Worker, interleaved, ratio, spread, table, write

QUICK = {
    "image": 112, "patch": 14, "vision_hidden": 64, "vision_layers": 2, "vision_heads": 4, "vision_ffn": 256,
    "hidden": 128, "layers": 8, "heads": 4, "kv_heads": 4, "ffn": 352, "vocab": 512, "expand": 4,
}  # fmt: skip
# The decoder is deep and the vision encoder small, as in the released models: the decoder's share of
# the FLOPs of a tile is three quarters. The vocabulary has a tenth of the decoder's parameters, as there.
FULL = {
    "image": 448, "patch": 14, "vision_hidden": 256, "vision_layers": 4, "vision_heads": 4, "vision_ffn": 1024,
    "hidden": 512, "layers": 24, "heads": 8, "kv_heads": 8, "ffn": 1408, "vocab": 16384, "expand": 12,
}  # fmt: skip
# On a GPU: InternViT-300M and a quarter of the 2B model's layers.
GPU = {
    "image": 448, "patch": 14, "vision_hidden": 1024, "vision_layers": 24, "vision_heads": 16, "vision_ffn": 4096,
    "hidden": 2048, "layers": 6, "heads": 16, "kv_heads": 8, "ffn": 8192, "vocab": 92553, "expand": 2,
}  # fmt: skip
EQUAL = [[(1, 64), (1, 64)]]
MIXED = [[(2, 32), (1, 32), (1, 96), (0, 160)]]


def argv(size: dict[str, Any], projector: str, samples: int, tokenizer: Path) -> list[str]:
    """Arguments of this trainer for a size."""
    words = f"""
    --num-layers {size["layers"]} --hidden-size {size["hidden"]} --ffn-hidden-size {size["ffn"]}
    --num-attention-heads {size["heads"]} --group-query-attention --num-query-groups {size["kv_heads"]}
    --normalization RMSNorm --swiglu --disable-bias-linear --add-qkv-bias --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --vision-preset internvit_tiny --image-size {size["image"]} --patch-size {size["patch"]}
    --projector {projector} --vocab-size {size["vocab"]} --make-vocab-size-divisible-by 1
    --tokenizer-model {tokenizer} --data none --seq-length 4096 --max-position-embeddings 4096
    --micro-batch-size {samples} --global-batch-size {samples} --lr 1e-4 --min-lr 1e-4
    --lr-decay-style constant --clip-grad 1.0 --train-iters 1000
    """.split()
    overrides = {
        "hidden_size": size["vision_hidden"],
        "num_layers": size["vision_layers"],
        "num_heads": size["vision_heads"],
        "ffn_hidden_size": size["vision_ffn"],
    }
    words += ["--vision-overrides", json.dumps(overrides)]
    words += ["--precision", "bf16"] if torch.cuda.is_available() else []
    return words + (["--expand-layer", str(size["expand"])] if projector == "pvtc" else [])


def workers(size: dict[str, Any], micro_batches: list[list[tuple[int, int]]]) -> dict[str, Worker]:
    """The four contestants."""
    tokenizer = ROOT / "tests" / "golden" / "data" / "tokenizers" / "qwen2_fast"
    samples = len(micro_batches[0])
    common = {"micro_batches": micro_batches}
    compression = {
        "projector": "pvtc", "expand_layer": size["expand"], "inject_layers": [], "low_ratio": 0.25,
        "high_ratio": 0.5, "upsample": "bilinear", "drop_path": 0.1, "pixel_shuffle_version": "v2",
    }  # fmt: skip
    plain = {**common, "size": {**size, "compression": compression}}
    return {
        "InternVL, here": Worker({**common, "kind": "ours", "argv": argv(size, "mlp", samples, tokenizer)}),
        "InternVL-X, here": Worker(
            {**common, "kind": "ours", "argv": argv(size, "pvtc", samples, tokenizer)}
        ),
        "InternVL, plain loop": Worker({**plain, "kind": "internvl"}),
        "InternVL-X, plain loop": Worker({**plain, "kind": "internvlx"}),
    }


def compare(
    size: dict[str, Any], name: str, micro_batches: list[list[tuple[int, int]]], repeats: int
) -> list[str]:
    """One table: four contestants on the same samples."""
    contestants = workers(size, micro_batches)
    try:
        flops = {n: w.step()["flops"] for n, w in contestants.items() if "here" in n}
        seconds = interleaved(contestants, repeats)
    finally:
        for worker in contestants.values():
            worker.close()
    ours, theirs = "InternVL-X, here", "InternVL, here"
    predicted, measured = flops[theirs] / flops[ours], ratio(seconds[theirs], seconds[ours])
    rows: list[list[str]] = [
        ["", "parameters", "GFLOP per step", "ms per step, median (range)", "plain loop / here"]
    ]
    for contestant, worker in contestants.items():
        here = contestant.replace("plain loop", "here")
        plain = contestant.replace("here", "plain loop")
        rows.append(
            [
                contestant,
                f"{worker.about['parameters'] / 1e6:.1f} M",
                f"{flops[contestant] / 1e9:.1f}" if contestant in flops else "",
                spread(seconds[contestant]),
                f"{ratio(seconds[plain], seconds[here]):.2f}" if contestant == here else "",
            ]
        )
    return [
        f"## {name}: (tiles, text tokens) per sample {micro_batches[0]}",
        "",
        *table(rows),
        "",
        f"Speed-up of InternVL-X here: FLOPs predict {predicted:.3f}, measured {measured:.3f}, "
        f"which is {measured / predicted:.1%} of the prediction.",
        "",
    ]


def main() -> None:
    """Run both comparisons and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the size where matrix products dominate")
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    size = (GPU if on_gpu else FULL) if chosen.full else QUICK
    lines = [
        "Sizes: " + ", ".join(f"{key} {value}" for key, value in size.items()) + ".",
        f"{2 * chosen.repeats} interleaved repetitions of equal lengths, {chosen.repeats} of mixed ones, whose steps "
        "are twice as long; a ratio is the median of the ratios within a round. "
        "A step is forward, backward, clipping and AdamW.",
        "",
    ]
    lines += compare(size, "Equal lengths", EQUAL, 2 * chosen.repeats)
    lines += compare(size, "Mixed lengths", MIXED, chosen.repeats)
    flags = " --full" if chosen.full else ""
    write(
        f"step_time{'' if chosen.full else '-quick'}",
        "Step time",
        f"python -m benchmarks.step_time{flags}",
        lines,
        "bf16, " if on_gpu else "fp32, ",
    )


if __name__ == "__main__":
    main()
