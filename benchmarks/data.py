"""Speed of the data plane: image paths side by side, packing, resume, and the demo's wait for data.

    python -m benchmarks.data [--images 1000] [--no-demo]     # writes benchmarks/results/data-DATE.md

The three image paths take the same files in turns of 25, in one process on one core, so that whatever else
the machine does slows all of them alike; rates are per second of CPU time, wall time stands beside.
"""

import argparse
import json
import os
import pickle
import platform as machine
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from benchmarks.decoding import gpu_rows
from megatron_internvlx import platform
from megatron_internvlx.data.decode import TileDecoder
from megatron_internvlx.data.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize_tiles
from megatron_internvlx.data.packing import Budget, fill, pack, tile_spread
from megatron_internvlx.data.rvtc import tile_grid
from megatron_internvlx.data.sample import ImageTiles

WIDTH, HEIGHT, TILE, MAX_TILES, TURN = 1200, 900, 448, 6, 25
ROOT = Path(__file__).parents[1]


def write_images(folder: Path, count: int) -> list[Path]:
    """JPEG files of 1200x900, quality 90, 4:2:0: low-frequency colour and Gaussian noise of sigma 6."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 6, (HEIGHT * 2, WIDTH, 3)).astype(np.float32)
    paths = []
    for number in range(count):
        low = Image.fromarray(rng.integers(0, 255, (9, 12, 3)).astype(np.uint8)).resize((WIDTH, HEIGHT))
        start = int(rng.integers(HEIGHT))
        pixels = np.clip(np.asarray(low) + noise[start : start + HEIGHT], 0, 255).astype(np.uint8)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def released(path: Path) -> torch.Tensor:
    """The released recipe: resize the whole image, crop, then to-tensor and normalize tile by tile."""
    transform = transforms.Compose(
        [
            transforms.Lambda(lambda img: img.convert("RGB") if img.mode != "RGB" else img),
            transforms.Resize((TILE, TILE), interpolation=InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        ]
    )
    image = Image.open(path).convert("RGB")
    cols, rows = tile_grid(*image.size, max_tiles=MAX_TILES)
    whole = image.resize((cols * TILE, rows * TILE))
    boxes = [(c * TILE, r * TILE, (c + 1) * TILE, (r + 1) * TILE) for r in range(rows) for c in range(cols)]
    tiles = [whole.crop(box) for box in boxes]
    tiles += [image.resize((TILE, TILE))] if len(tiles) > 1 else []
    return torch.stack([transform(tile) for tile in tiles])


def ours(name: str) -> Callable[[Path], torch.Tensor]:
    """File to normalized tiles with one of our decoders."""
    decoder = TileDecoder(name, tile_size=TILE)
    cols, rows = tile_grid(WIDTH, HEIGHT, max_tiles=MAX_TILES)
    grid = ImageTiles("", WIDTH, HEIGHT, cols, rows, True)
    return lambda path: normalize_tiles(torch.from_numpy(decoder(str(path), grid, None)))


def time_paths(paths: list[Path]) -> Iterator[str]:
    """A row of the table per image path."""
    ways = {"released recipe": released, "ours, Pillow": ours("pillow"), "ours, DALI on CPU": ours("dali")}
    cpu, wall, tiles = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0), 0
    for way in ways.values():
        way(paths[0])
    for first in range(0, len(paths), TURN):
        for name, way in ways.items():
            start = time.process_time(), time.perf_counter()
            for path in paths[first : first + TURN]:
                tiles = len(way(path))
            cpu[name] += time.process_time() - start[0]
            wall[name] += time.perf_counter() - start[1]
    worst = max(float((way(paths[0]) - released(paths[0])).abs().max()) for way in ways.values())
    base = cpu["released recipe"]
    for name in ways:
        rate = len(paths) / cpu[name]
        yield (
            f"| {name} | {rate:.1f} | {rate * tiles:.0f} | {1000 / rate:.1f} | {base / cpu[name]:.2f} | "
            f"{len(paths) / wall[name]:.1f} |"
        )
    yield ""
    yield f"{tiles} tiles per image; largest difference of a normalized value: {worst:.3f} (1/255 is 0.017)."


def long_tailed(count: int, seed: int, budget: Budget) -> np.ndarray:
    """Text lognormal (median 200 tokens, sigma 1, 16 to 4,000); a fifth without image, the others with geometric
    (0.18) tiles, at most 13; 64 and 256 tokens per tile; what is over a budget is cut to it."""
    rng = np.random.default_rng(seed)
    text = np.clip(rng.lognormal(5.3, 1.0, count), 16, 4000).astype(int) + 20
    tiles = np.where(rng.random(count) < 0.2, 0, np.clip(rng.geometric(0.18, count), 1, 13))
    costs = np.stack([text + tiles * 64, text + tiles * 256, tiles, np.zeros_like(tiles)], 1)
    return np.minimum(costs, budget.limits())


def time_packing() -> Iterator[str]:
    """A row per budget and buffer."""
    for budget in (Budget(4096, 8192, 32), Budget(4096, 8192, 24), Budget(3000, 8192, 100)):
        for count in (20_000, 1000):
            costs = long_tailed(count, 1, budget)
            start = time.process_time()
            packs = pack(costs, budget)
            spent = (time.process_time() - start) / count * 1000
            filled = fill(costs, packs, budget)
            spreads = []
            for ranks in (8, 64):
                per_rank = []
                for rank in range(ranks):
                    mine = long_tailed(1000, 100 + rank, budget)
                    per_rank.append([int(mine[rows, 2].sum()) for rows in pack(mine, budget)])
                spreads.append(f"{tile_spread(per_rank):.1%}" if count == 1000 else "")
            limits = f"{budget.shallow}, {budget.deep}, {budget.tiles}"
            yield (
                f"| {limits} | {count} | {filled.packs} | {filled.binding} | {filled.best:.1%} | {spent:.3f} | "
                + " | ".join(spreads)
                + " |"
            )


def time_resume(folder: Path) -> Iterator[str]:
    """How long a resumed loader takes to its first pack, early and late in the data."""
    from transformers import AutoTokenizer

    from megatron_internvlx.data.energon_loader import EnergonBatches, LoaderSettings
    from megatron_internvlx.data.plan import PlanSettings
    from megatron_internvlx.data.prepare import PrepareSettings, prepare
    from megatron_internvlx.data.rejects import RejectLog
    from megatron_internvlx.data.sample import EncoderSettings, SampleEncoder

    prepare(folder / "meta.json", folder / "prepared", PrepareSettings())
    budget = Budget(1024, 2048, 40)
    settings = EncoderSettings(
        tile_size=224, max_tiles=6, tokens_per_tile=64, shallow_tokens_per_tile=16, budget=budget
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def loader(workers: int) -> EnergonBatches:
        return EnergonBatches(
            folder / "prepared",
            SampleEncoder(tokenizer, settings),
            PlanSettings(4, 8),
            LoaderSettings(workers=workers, pack_buffer=500),
            reject_log=RejectLog(None, None),
            decode=TileDecoder("dali", tile_size=224),
        )

    for workers in (0, 2):
        running = loader(workers)
        next(running)
        for taken in (10, 400):
            while running.taken < taken:
                next(running)
            start = time.perf_counter()
            state = pickle.dumps(running.save_state())
            saved = time.perf_counter() - start
            resumed = loader(workers)
            start = time.perf_counter()
            resumed.restore(pickle.loads(state))
            next(resumed)
            spent = time.perf_counter() - start
            resumed.close()
            yield f"| {workers} | {taken} | {len(state) / 1024:.0f} | {saved:.2f} | {spent:.2f} |"
        running.close()


def demo_wait(folder: Path, steps: int) -> Iterator[str]:
    """Share of step time spent waiting for data in the demo, per loader."""
    energon = ["--loader", "energon", "--packing", "--micro-batch-size", "1", "--image-decoder", "dali"]
    energon += ["--seq-length", "512", "--shallow-seq-length", "400", "--max-tiles-per-pack", "24"]
    energon += ["--pack-buffer", "200", "--data", str(folder / "prepared")]
    for name, more in (("simple", ["--data", str(folder / "meta.json")]), ("energon, packed", energon)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["pretrain_vlm.py", "--recipe", "examples/demo/demo.yaml"]
        command += ["--tokenizer-model", str(folder / "tokenizer"), "--log-interval", "10"]
        command += ["--train-iters", str(steps), "--lr-decay-iters", str(steps), *more]
        # Any seed of data: the loader's workers are forked from a process that has the model.
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"the demo failed:\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}")
        lines = [line for line in run.stdout.splitlines() if "data wait" in line]
        waits = [float(re.search(r"data wait ([\d.]+)%", line)[1]) for line in lines[1:]]  # type: ignore[index]
        times = [float(re.search(r"([\d,]+) ms/step", line)[1].replace(",", "")) for line in lines[1:]]  # type: ignore[index]
        yield f"| {name} | {np.mean(times):.0f} | {np.mean(waits):.2f} % | {max(waits):.2f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=60, help="steps of each demo run")
    parser.add_argument("--no-demo", action="store_true", help="leave out the two demo runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    names = ("torch", "torchvision", "pillow", "nvidia-dali-cuda130", "megatron-energon")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    now = datetime.now(UTC)
    out = [
        f"# Data plane, {now:%Y-%m-%d}",
        "",
        f"`python -m benchmarks.data --images {args.images}`, commit {commit.stdout.strip()}; {versions}; "
        f"{os.cpu_count()} CPU cores ({machine.machine()}), load average {os.getloadavg()[0]:.1f} at the start; "
        f"{now:%Y-%m-%d %H:%M} UTC.",
        "",
        f"## File to normalized tiles: {args.images} JPEG files of {WIDTH}x{HEIGHT}, one core, in turns",
        "",
        "| path | images per CPU second | tiles per CPU second | ms of CPU per image | against released | "
        "images per second of wall time |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out += time_paths(write_images(folder, args.images))
        out += [
            "",
            "## Packing: long-tailed samples",
            "",
            (long_tailed.__doc__ or "").replace("\n    ", " "),
            "",
        ]
        out += [
            "| budgets (shallow, deep, tiles) | samples at once | packs | binding | fill | ms per sample | "
        ]
        out[-1] += "tiles waited for, 8 ranks | 64 ranks |"
        out += ["|---|---|---|---|---|---|---|---|", *time_packing()]
        data = folder / "demo"
        command = [sys.executable, "tools/make_demo_data.py", "--out", str(data), "--train", "2400"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        if platform.backend() == "nccl":
            rows = gpu_rows(30)
            out += ["", f"## Cut on a GPU: {platform.device_name()}", "", *(f"    {row}" for row in rows)]
        out += ["", "## Resume: 2,400 records, 500 samples per pack buffer, 256 in the shuffle buffer", ""]
        out += ["| workers | packs taken | state, KiB | s to save | s to the first pack after a restart |"]
        out += ["|---|---|---|---|---|", *time_resume(data)]
        if not args.no_demo:
            out += ["", "## Waiting for data in the demo, two ranks (PP 2), one loader worker", ""]
            out += ["| loader | ms per step | mean wait | longest, of 10 steps |", "|---|---|---|---|"]
            out += demo_wait(data, args.steps)
    result = ROOT / "benchmarks" / "results" / f"data-{now:%Y-%m-%d}.md"
    result.write_text("\n".join(out) + "\n")
    print("\n".join(out))
    print(json.dumps({"written": result.name}))


if __name__ == "__main__":
    main()
