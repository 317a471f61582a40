"""RVTC: tiles, tokens and step time by the rule that cuts images into tiles.

    python -m benchmarks.rvtc            # counts, and step time at a small size
    python -m benchmarks.rvtc --full     # step time at a size where matrix products weigh more
    python -m benchmarks.rvtc --counts   # counts only, in seconds

Images: 2,000 sizes drawn once (seed 0): 40 % photographs (width 500-1600, aspect 4:3 or 3:4), 30 % web
pictures (200-900, any aspect from 1:3 to 3:1), 20 % documents (700-1300 wide, 1.3-1.5 as high), 10 % wide
screenshots (1000-1920, 16:9). At most 12 tiles of 448 pixels, and a thumbnail. Step time is that of
consecutive images, two per micro-batch, each with 64 text tokens; tiles are 112 pixels there (the same
number of them), so the times compare with each other only.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmarks.common import ROOT, Worker, interleaved, ratio, spread, table, write
from benchmarks.step_time import QUICK, argv
from megatron_internvlx.data.rvtc import POLICIES as RULES
from megatron_internvlx.data.rvtc import tile_count, tile_grid

TIMED = 16
"""Images of a timed step."""
FULL = {**QUICK, "vision_hidden": 128, "vision_ffn": 512, "hidden": 384, "ffn": 1024}
TOKENIZER = ROOT / "tests" / "golden" / "data" / "tokenizers" / "qwen2_fast"


def sizes(count: int = 2000) -> list[tuple[int, int]]:
    """Widths and heights of the stated distribution."""
    rng = np.random.default_rng(0)
    found = []
    for kind in rng.choice(4, count, p=[0.4, 0.3, 0.2, 0.1]):
        if kind == 0:
            width, aspect = rng.integers(500, 1601), rng.choice([4 / 3, 3 / 4])
        elif kind == 1:
            width, aspect = rng.integers(200, 901), np.exp(rng.uniform(-np.log(3), np.log(3)))
        elif kind == 2:
            width, aspect = rng.integers(700, 1301), 1 / rng.uniform(1.3, 1.5)
        else:
            width, aspect = rng.integers(1000, 1921), 16 / 9
        found.append((int(width), max(int(width / aspect), 28)))
    return found


def tiles(size: tuple[int, int], rule: str) -> int:
    """Tiles of an image, thumbnail included."""
    return tile_count(*tile_grid(*size, policy=rule), thumbnail=True)


def main() -> None:
    """Count, time and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="a larger model, more repetitions")
    parser.add_argument("--counts", action="store_true", help="no step times")
    chosen = parser.parse_args()
    counts = {rule: np.array([tiles(size, rule) for size in sizes()]) for rule in RULES}
    seconds = {} if chosen.counts else step_times(counts, full=chosen.full)
    rows = [["RVTC", "tiles per image", "deep visual tokens", "shallow"]]
    rows[0] += ["ms per step (16 images)", "of off"] if seconds else ["images of one tile", "of 13 tiles"]
    for rule in RULES:
        mean = counts[rule].mean()
        cells = [f"{mean:.2f}", f"{mean * 256:.0f}", f"{mean * 64:.0f}"]
        if seconds:
            cells += [spread(seconds[rule]), f"{ratio(seconds[rule], seconds['off']):.2f}"]
        else:
            cells += [f"{(counts[rule] == number).mean():.0%}" for number in (1, 13)]
        rows.append([rule, *cells])
    about_images, about_steps = __doc__.split("\n\n")[2].replace("\n", " ").split(" Step time ")
    lines = [about_images + (f" Step time {about_steps}" if seconds else ""), "", *table(rows)]
    if seconds:
        timed = ", ".join(f"{rule} {counts[rule][:TIMED].mean():.2f}" for rule in RULES)
        lines += ["", f"Tiles of the timed images: {timed} per image."]
    variant = "full" if chosen.full else "counts" if chosen.counts else ""
    write(
        "rvtc" if variant == "full" else f"rvtc-{variant or 'quick'}",
        "RVTC",
        "python -m benchmarks.rvtc" + (f" --{variant}" if variant else ""),
        lines,
        "bf16, " if torch.cuda.is_available() else "fp32, ",
    )


def step_times(counts: dict[str, np.ndarray], *, full: bool) -> dict[str, list[float]]:
    """Seconds of the steps by rule, the rules in turns, with the tiles of the first images."""
    workers = {}
    for rule in RULES:
        chosen = [int(n) for n in counts[rule][:TIMED]]
        batches = [[(a, 64), (b, 64)] for a, b in zip(chosen[::2], chosen[1::2], strict=True)]
        arguments = [*argv(FULL if full else QUICK, "pvtc", 2, TOKENIZER), "--global-batch-size", str(TIMED)]
        workers[rule] = Worker({"kind": "ours", "argv": arguments, "micro_batches": batches})
    try:
        return interleaved(workers, 5 if full else 2)
    finally:
        for worker in workers.values():
            worker.close()


if __name__ == "__main__":
    main()
