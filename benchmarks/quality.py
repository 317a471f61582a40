"""Quality against compression at demo scale: accuracy of every kind of question and step time, and a plot.

    python -m benchmarks.quality                     # quick: two combinations, 20 steps, to see that it runs
    python -m benchmarks.quality --full              # every combination, 3 seeds
    python -m benchmarks.quality --full --only pvtc  # those whose name contains the word
    python -m benchmarks.quality --full --report     # no training: times the steps, writes table and plot

{MLP, PVTC} x {LVTC off, k = L/4, L/2, 3L/4} x {RVTC off, edge, area} x 3 seeds on the demo's drawn data. As in the
paper, all start from one trained vision encoder and decoder with new projectors, and train on, here for 80 steps of
the demo's recipe. What they start from is the demo's model, trained on without any compression (1,440 steps by two
ranks, about 15 minutes of two cores, kept in runs/quality). Answers are counted on the held-out questions, kind by
kind: digits, words and counts need detail that colours do not. A run takes one core and about a minute and a half of
it; two processes with different `--only` use two cores, once the trained model is there. Each finished run is a line
of results/quality_kinds.jsonl, with its commit and a digest of its recipes; runs that are there are not repeated, so
it can be stopped and started again. A rule of RVTC that cuts every image of the data as another one does needs no run
of its own: the same tiles and seed are the same run. Step times are taken at the end, all combinations in turns on 64
images, whose mean tiles are those of the data under every rule; --report can be repeated for them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.common import RESULTS, ROOT, Worker, commit, interleaved, write
from benchmarks.quality_report import EXPANSIONS, RULES, Combination, Run, of, plot, report_lines
from benchmarks.quality_runs import (
    COMBINATIONS,
    DEMO,
    UNCOMPRESSED,
    Stage,
    base_recipes,
    demo_recipe,
    digest,
    recipe,
    start_of,
    train,
    trained_base,
)
from megatron_internvlx.data.rvtc import tile_count, tile_grid
from megatron_internvlx.model.internvit_config import internvit_preset
from megatron_internvlx.model.presets import preset

SEEDS = (1, 2, 3)
BASE_STAGES = (Stage(DEMO, 400), Stage(UNCOMPRESSED, 1440))
QUICK_STAGES = (Stage(DEMO, 20), Stage(UNCOMPRESSED, 20))
STEPS = 80
WORK = ROOT / "runs" / "quality"
TIMED = 64  # images per timed step


class Picture(NamedTuple):
    """What the study needs to know of a record with one image."""

    width: int
    height: int
    questions: int
    """Held-out questions about it; 0 for training records."""


def pictures_of(data: Path) -> list[Picture]:
    """Every record with one image, training records first."""
    found = []
    for name in ("train", "val"):
        for line in (data / f"{name}.jsonl").open():
            record = json.loads(line)
            if isinstance(record.get("image"), str):
                asked = sum(turn["from"] == "human" for turn in record["conversations"])
                found.append(Picture(record["width"], record["height"], asked if name == "val" else 0))
    return found


def timed_sizes(sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sizes of `TIMED` images at equal distances in the order of their tiles, so that the means are those of all."""

    def tiles(size: tuple[int, int]) -> list[float]:
        return [mean_tiles([size], rule) for rule in RULES]

    sizes = sorted(sizes, key=tiles)
    return [sizes[(2 * number + 1) * len(sizes) // (2 * TIMED)] for number in range(TIMED)]


def mean_tiles(sizes: Sequence[tuple[int, int]], rule: str) -> float:
    """Tiles per image under a rule of RVTC, thumbnails included."""
    return statistics.mean(tile_count(*cut(size, rule), thumbnail=True) for size in sizes)


def about_pictures(pictures: list[Picture]) -> str:
    """What the rules cut otherwise, and the tiles of what is timed."""
    other = [picture for picture in pictures if cut(picture[:2], "edge") != cut(picture[:2], "area")]
    held_out = [picture for picture in other if picture.questions]
    sizes = timed_sizes([(picture.width, picture.height) for picture in pictures])
    timed = ", ".join(f"{mean_tiles(sizes, rule):.2f} {rule}" for rule in RULES)
    return (
        f"`area` cuts {len(other)} of {len(pictures):,} pictures otherwise than `edge`, {len(held_out)} of the "
        f"{sum(bool(picture.questions) for picture in pictures)} held-out ones, with "
        f"{sum(picture.questions for picture in held_out)} questions. A timed step has {TIMED} pictures, with "
        f"{timed} tiles each. Questions without a picture are not counted. "
    )


def tile_rule(rule: str) -> dict[str, Any]:
    """Arguments of `tile_grid` under a rule of RVTC."""
    settings = demo_recipe()
    size = preset(settings["model_preset"])["image_size"]
    return {"tile_size": size, "max_tiles": settings["max_tiles"], "policy": rule}


@functools.cache
def cut(size: tuple[int, int], rule: str) -> tuple[int, int]:
    """Columns and rows of an image under a rule of RVTC."""
    return tile_grid(*size, **tile_rule(rule))


def twins(sizes: list[tuple[int, int]]) -> dict[str, str]:
    """Each rule of RVTC and the first one that cuts all these images alike."""
    grids = {rule: [cut(size, rule) for size in sizes] for rule in RULES}
    return {rule: next(other for other in RULES if grids[other] == grids[rule]) for rule in RULES}


def compression(sizes: list[tuple[int, int]], combination: Combination) -> tuple[float, float]:
    """Tiles per image, thumbnails included, and visual tokens per image in the mean over the decoder's layers."""
    tiles = mean_tiles(sizes, combination[2])
    model = preset(demo_recipe()["model_preset"])
    side = internvit_preset(model["vision_preset"]).patches_per_side
    low, high = ((round(side * model.get(name, default))) ** 2 for name, default in RATIOS)
    shallow = (EXPANSIONS[combination[1]] or 0) / 4
    return tiles, tiles * (shallow * low + (1 - shallow) * high)


RATIOS = (("low_ratio", 0.25), ("high_ratio", 0.5))


def step_times(
    data: Path, sizes: list[tuple[int, int]], wanted: list[Combination], repeats: int
) -> dict[Combination, float]:
    """Median milliseconds of a step of the same images; the combinations take turns."""
    workers = {}
    for combination in wanted:
        settings = recipe(combination, SEEDS[0], 1000) | {"global_batch_size": TIMED}
        grids = [cut(size, combination[2]) for size in sizes]
        samples = [(tile_count(*grid, thumbnail=True), 48) for grid in grids]
        count = settings["micro_batch_size"]
        micro_batches = [samples[i : i + count] for i in range(0, len(samples), count)]
        # A file, not flags: only there can `expand_layer: null` overrule the preset.
        path = data / f"{'-'.join(combination).replace('/', '_')}.yaml"
        path.write_text(
            yaml.safe_dump(settings | {"data": "none", "tokenizer_model": str(data / "tokenizer")})
        )
        workers["/".join(combination)] = Worker(
            {"kind": "ours", "argv": ["--recipe", str(path)], "micro_batches": micro_batches, "threads": 1}
        )
    try:
        seconds = interleaved(workers, repeats)
    finally:
        for worker in workers.values():
            worker.close()
    return {key: statistics.median(seconds["/".join(key)]) * 1e3 for key in wanted}


def read(path: Path) -> list[Run]:
    """Finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_digest(combination: Combination, seed: int, stages: Sequence[Stage], steps: int) -> str:
    """Names the recipes of a run: its own and that of what it starts from."""
    return digest(*base_recipes(stages), recipe(combination, seed, steps))


def run_missing(
    data: Path,
    log: Path,
    wanted: list[Combination],
    seeds: tuple[int, ...],
    stages: Sequence[Stage],
    steps: int,
) -> None:
    """Train what is not in the log yet, seed by seed, so that an unfinished study covers all combinations."""
    base = trained_base(data, WORK, stages)
    for seed, combination in itertools.product(seeds, wanted):
        name = run_digest(combination, seed, stages, steps)
        # Read anew each time: a second process may work on another part of the study.
        if any(run["recipe"] == name for run in read(log)):
            continue
        start = start_of(base, combination, seed)
        line: Run = dict(zip(("projector", "expansion", "rvtc"), combination, strict=True)) | {"seed": seed}
        flags = ("--pretrained-checkpoint", str(start))
        line |= {"kinds": train(data, recipe(combination, seed, steps), *flags)}
        line |= {"recipe": name, "commit": commit()}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


def main() -> None:
    """Run what is missing, then write table and plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="every combination, 3 seeds")
    parser.add_argument("--only", default="", help="combinations whose name contains this")
    parser.add_argument("--report", action="store_true", help="train nothing")
    chosen = parser.parse_args()
    name = "quality_kinds" if chosen.full else "quality_kinds-quick"
    stages, steps, seeds = (BASE_STAGES, STEPS, SEEDS) if chosen.full else (QUICK_STAGES, 20, SEEDS[:1])
    wanted = COMBINATIONS if chosen.full else [COMBINATIONS[0], COMBINATIONS[-2]]
    log = RESULTS / f"{name}.jsonl"
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        command = [sys.executable, "tools/make_demo_data.py", "--out", folder]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        pictures = pictures_of(data)
        sizes = [(picture.width, picture.height) for picture in pictures]
        same = twins(sizes)
        distinct = list(dict.fromkeys((p, k, same[rule]) for p, k, rule in wanted))
        if not chosen.report:
            todo = [key for key in distinct if chosen.only in " ".join(key)]
            run_missing(data, log, todo, seeds, stages, steps)
        done = {(*of(run), run["seed"]): run for run in read(log)}
        runs = [
            run for key, run in done.items() if run["recipe"] == run_digest(key[:3], key[3], stages, steps)
        ]
        missing = {(*key, seed) for key in distinct for seed in seeds} - {(*of(r), r["seed"]) for r in runs}
        if missing and not chosen.report:
            print(f"{len(missing)} runs are still to do; --report shows those that are there")
            return
        present = [key for key in distinct if any(of(run) == key for run in runs)]
        ms = step_times(data, timed_sizes(sizes), present, 7 if chosen.full else 2)
    runs += [
        run | {"rvtc": rule}
        for rule in RULES
        for run in runs
        if same[rule] != rule and run["rvtc"] == same[rule] and (*of(run)[:2], rule) in wanted
    ]
    ms |= {(p, k, rule): ms[p, k, same[rule]] for p, k, rule in wanted if (p, k, same[rule]) in ms}
    ms = {key: ms[key] for key in wanted if key in ms}
    tokens = {key: compression(sizes, key) for key in ms}
    plot(runs, ms, tokens, same, RESULTS / f"{name}.png")
    times = {"commit": commit(), "images": TIMED, "ms": {"/".join(key): round(ms[key], 1) for key in ms}}
    (RESULTS / f"{name}-ms.json").write_text(json.dumps(times, indent=1) + "\n")
    lines = report_lines(runs, ms, tokens, same)
    size = demo_recipe()["global_batch_size"]
    before = " and ".join(f"{count} steps of {'/'.join(combination)}" for combination, count in stages)
    runs_text = f"{steps} steps of {size} samples per run, one rank, from a model of {before}"
    lines[0] = f"{runs_text} with new projectors; {lines[0]}{about_pictures(pictures)}![plot]({name}.png)"
    command_line = "python -m benchmarks.quality" + " --full" * chosen.full + " --report" * chosen.report
    write(name, "Quality against compression, by kind of question", command_line, lines)


if __name__ == "__main__":
    main()
