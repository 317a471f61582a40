"""On a GPU: MFU and tokens/s of a stack of decoder layers with the vision encoder and projectors, bf16 and FP8.

    python -m benchmarks.gpu_stack                 # 2B and 8B shapes, bf16 and FP8, LVTC on and off
    python -m benchmarks.gpu_stack --loss          # also 200 steps of the 2B stack in each precision: loss curves

Real widths, a quarter of the decoder's layers (the optimizer of all of them does not fit one GPU), the
whole InternViT-300M, packs of 4,096 deep rows with 8 tiles, random data. FP8: tensorwise and blockwise. LVTC on and
off take turns step by step. MFU counts useful work (see docs/performance.md). A stack that cannot run, such as a
precision that the GPU does not have, is a row that says so. Without CUDA it says so and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from datetime import date

from benchmarks.common import RESULTS, ROOT, Worker, ratio, spread, table, write

SHAPES = {"internvlx_2b_released": 24, "internvlx_8b_released": 32}
WARMUP, REPEATS = 3, 10
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


def stacks(preset: str, precision: str, repeats: int) -> list[list[str]]:
    """Two rows: LVTC off and on, in processes of their own that take turns."""
    from megatron_internvlx.planning.metrics import mfu, peak_flops

    peak = peak_flops(device() or "", "fp8" if "fp8" in precision else "bf16")
    tokens = sum(tiles * 256 + text for pack in samples() for tiles, text in pack)
    workers: dict[str, Worker] = {}
    steps: dict[str, list[dict[str, float]]] = {"off": [], "on": []}
    try:
        for lvtc in steps:
            settings = {"kind": "ours", "argv": argv(preset, precision, lvtc == "on")}
            workers[lvtc] = Worker({**settings, "micro_batches": samples()})
        for _ in range(repeats + WARMUP):
            for lvtc, worker in workers.items():
                steps[lvtc].append(worker.step())
    except RuntimeError as error:  # the worker's own message went to stderr
        return [[preset, precision, lvtc, f"did not run: {error}", *[""] * 5] for lvtc in steps]
    finally:
        for worker in workers.values():
            worker.close()
    rows = []
    seconds = {lvtc: [step["seconds"] for step in taken[WARMUP:]] for lvtc, taken in steps.items()}
    for lvtc, taken in steps.items():
        middle, useful = statistics.median(seconds[lvtc]), taken[-1]["useful_flops"]
        share = mfu(useful, middle, 1, peak)
        rows.append(
            [
                preset, precision, lvtc, spread(seconds[lvtc]), f"{ratio(seconds['off'], seconds[lvtc]):.2f}",
                f"{tokens / middle:,.0f}", f"{useful / middle / 1e12:.0f}", f"{share:.1%}" if share else "-",
                f"{taken[-1]['peak_gib']:.1f}",
            ]
        )  # fmt: skip
    return rows


def losses(precision: str, steps: int = 200) -> list[float]:
    """Loss of every step of the 2B stack; [] if it did not run."""
    settings = {"kind": "ours", "argv": argv("internvlx_2b_released", precision, True)}
    worker = None
    try:
        worker = Worker({**settings, "micro_batches": samples()})
        return [worker.step()["loss"] for _ in range(steps)]
    except RuntimeError:
        return []
    finally:
        if worker is not None:
            worker.close()


def loss_lines() -> list[str]:
    """Table of the loss curves beside bf16's; all of their values go to a JSON file beside the results."""
    curves = {precision: losses(precision) for precision in PRECISIONS}
    path = RESULTS / f"gpu_stack-losses-{date.today()}.json"
    path.write_text(json.dumps(curves))
    at = [0, 9, 49, 99, 149, 199]
    rows = [["precision", *(f"step {i + 1}" for i in at), "largest difference from bf16, relative"]]
    for precision, curve in curves.items():
        if not curve:
            rows.append([precision, "did not run", *[""] * len(at)])
            continue
        away = [abs(a - b) / b for a, b in zip(curve, curves["bf16"], strict=True)] if curves["bf16"] else []
        rows.append([precision, *(f"{curve[i]:.4f}" for i in at), f"{max(away):.2%}" if away else "-"])
    return ["", f"Loss of the 2B stack, random data repeated; every step in {path.name}:", "", *table(rows)]


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loss", action="store_true", help="also the loss curves")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    chosen = parser.parse_args()
    name = device()
    if name is None:
        print("gpu_stack: no CUDA device here; nothing measured")
        return
    rows = [["stack", "precision", "LVTC", "ms per step, median (range)", "LVTC off / this", "tokens/s", "TFLOP/s",
             "MFU", "peak GiB"]]  # fmt: skip
    for preset in SHAPES:
        for precision in PRECISIONS:
            rows += stacks(preset, precision, chosen.repeats)
            print(rows[-2:], flush=True)
    command = "python -m benchmarks.gpu_stack" + " --loss" * chosen.loss
    command += f" --repeats {chosen.repeats}" if chosen.repeats != REPEATS else ""
    more = ("transformer-engine", "nvidia-cudnn-cu13", "flash-attn")
    title = "One GPU: layer stacks"
    # The table first: curves that fail must not take it along.
    lines = [f"{chosen.repeats} steps each; {len(samples())} packs per step.", "", *table(rows)]
    write("gpu_stack", title, command, lines, "", more)
    if chosen.loss:
        write("gpu_stack", title, command, [*lines, *loss_lines()], "", more)


if __name__ == "__main__":
    main()
