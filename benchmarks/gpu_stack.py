"""On a GPU: MFU and tokens/s of a stack of decoder layers with the vision encoder and projectors, bf16 and FP8.

    python -m benchmarks.gpu_stack                 # 2B and 8B shapes, bf16 and fp8_tensorwise, LVTC on and off
    python -m benchmarks.gpu_stack --loss          # also 200 steps of the 2B stack in each precision: loss curves

Real widths, a quarter of the decoder's layers (the optimizer of all of them does not fit one GPU), the
whole InternViT-300M, packs of 4,096 deep rows with 8 tiles, random data. MFU counts useful work (see
docs/performance.md). Without CUDA it says so and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from benchmarks.common import ROOT, Worker, table, write

SHAPES = {"internvlx_2b_released": 24, "internvlx_8b_released": 32}
PRECISIONS = ("bf16", "fp8_tensorwise", "fp8_blockwise")
TILES, ROWS, SHALLOW = 8, 4096, 4096 - 8 * (256 - 64)
TOKENIZER = ROOT / "tests" / "golden" / "data" / "tokenizers" / "qwen2_fast"


def argv(preset: str, precision: str, lvtc: bool) -> list[str]:
    """Arguments of one stack: static budgets, so that rows fit FP8."""
    layers = SHAPES[preset] // 4
    words = f"""
    --model-preset {preset} --precision {precision} --transformer-impl transformer_engine
    --num-layers {layers} --seq-length {ROWS} --boundary static --max-tiles-per-pack {TILES} --max-tiles 7
    --shallow-seq-length {SHALLOW if lvtc else ROWS} --micro-batch-size 1 --global-batch-size 4
    --vocab-size 92553 --tokenizer-model {TOKENIZER} --data none --lr 1e-4 --min-lr 1e-4
    --lr-decay-style constant --clip-grad 1.0 --train-iters 1000 --projector-drop-path 0
    """.split()
    return words + (["--expand-layer", str(layers // 3)] if lvtc else [])


def samples() -> list[list[tuple[int, int]]]:
    """Four packs of two samples that fill the rows but for a few."""
    return [[(5, 900), (3, 1100)], [(4, 1000), (4, 1000)], [(6, 700), (2, 1300)], [(8, 1900), (0, 100)]]


def device() -> str | None:
    """The GPU's name; None without one. Asked in a process of its own, which frees the GPU again."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def stack(preset: str, precision: str, lvtc: bool, repeats: int) -> list[str]:
    """One row: a model in a process of its own, measured alone."""
    from megatron_internvlx.training.metrics import mfu, peak_flops

    worker = Worker({"kind": "ours", "argv": argv(preset, precision, lvtc), "micro_batches": samples()})
    try:
        steps = [worker.step() for _ in range(repeats + 3)][3:]
    finally:
        worker.close()
    seconds = statistics.median(step["seconds"] for step in steps)
    name = device() or ""
    share = mfu(
        steps[0]["useful_flops"], seconds, 1, peak_flops(name, "fp8" if "fp8" in precision else "bf16")
    )
    tokens = sum(tiles * 256 + text for pack in samples() for tiles, text in pack)
    return [
        preset, precision, "on" if lvtc else "off", f"{seconds * 1e3:.1f}", f"{tokens / seconds:,.0f}",
        f"{steps[0]['useful_flops'] / seconds / 1e12:.0f}", f"{share:.1%}" if share else "-",
        f"{steps[-1]['peak_gib']:.1f}",
    ]  # fmt: skip


def losses(precision: str, steps: int = 200) -> list[float]:
    """Loss of every step of the 2B stack."""
    worker = Worker({"kind": "ours", "argv": argv("internvlx_2b_released", precision, True),
                     "micro_batches": samples()})  # fmt: skip
    try:
        return [worker.step()["loss"] for _ in range(steps)]
    finally:
        worker.close()


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loss", action="store_true", help="also the loss curves")
    parser.add_argument("--repeats", type=int, default=10)
    chosen = parser.parse_args()
    name = device()
    if name is None:
        print("gpu_stack: no CUDA device here; nothing measured")
        return
    head = ["stack", "precision", "LVTC", "ms per step", "tokens/s", "TFLOP/s", "MFU", "peak GiB"]
    rows = [head]
    for preset in SHAPES:
        for precision in PRECISIONS:
            rows += [stack(preset, precision, lvtc, chosen.repeats) for lvtc in (False, True)]
    lines = [f"GPU: {name}.", "", *table(rows)]
    if chosen.loss:
        curves = {precision: losses(precision) for precision in PRECISIONS}
        at = [0, 9, 49, 99, 149, 199]
        lines += ["", "Loss of the 2B stack, random data repeated:", ""]
        curve_rows = [["precision", *(f"step {i + 1}" for i in at)]]
        curve_rows += [[p, *(f"{curve[i]:.4f}" for i in at)] for p, curve in curves.items()]
        lines += table(curve_rows)
    write("gpu_stack", "One GPU: layer stacks", "python -m benchmarks.gpu_stack", lines)


if __name__ == "__main__":
    main()
