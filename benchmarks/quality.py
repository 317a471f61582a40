"""Quality against compression at demo scale: accuracy and step time of every combination, and a plot.

    python -m benchmarks.quality                     # quick: two combinations, 20 steps, to see that it runs
    python -m benchmarks.quality --full              # every combination, 400 steps, 3 seeds; hours on two cores
    python -m benchmarks.quality --full --only pvtc  # those whose name contains the word
    python -m benchmarks.quality --full --report     # no training: times the steps, writes table and plot

{MLP, PVTC} x {LVTC off, k = L/4, L/2, 3L/4} x {RVTC off, edge, area} x 3 seeds, trained by the demo's recipe on
the demo's drawn data, answers counted on its held-out questions. Each finished run is a line of
results/quality.jsonl, with its commit and a digest of its recipe; runs that are there are not repeated, so it can
be stopped and started again. A rule of
RVTC that cuts every image of the data as another one does needs no run of its own: the same tiles and seed are
the same run. Step times are taken at the end, all combinations in turns on the same 16 samples.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import RESULTS, ROOT, Worker, commit, interleaved, table, write
from megatron_internvlx.data.rvtc import tile_count, tile_grid
from megatron_internvlx.model.internvit_config import internvit_preset
from megatron_internvlx.model.presets import preset

LAYERS = 4  # of the preset internvlx_demo
EXPANSIONS: dict[str, int | None] = {
    "off": None,
    "L/4": LAYERS // 4,
    "L/2": LAYERS // 2,
    "3L/4": 3 * LAYERS // 4,
}
RULES = ("off", "edge", "area")
COMBINATIONS = list(itertools.product(("mlp", "pvtc"), EXPANSIONS, RULES))
SEEDS = (1, 2, 3)
TIMED = 16  # images per timed step
RIGHT = re.compile(r"answers right ([\d.]+)%")


def recipe(projector: str, expansion: str, rvtc: str, seed: int, steps: int) -> dict[str, Any]:
    """The demo's recipe with this combination, on one rank."""
    settings = yaml.safe_load((ROOT / "examples" / "demo" / "demo.yaml").read_text())
    return settings | {
        "pipeline_model_parallel_size": 1,
        "projector": projector,
        "expand_layer": EXPANSIONS[expansion],
        "rvtc": rvtc,
        "seed": seed,
        "train_iters": steps,
        "eval_interval": 10 * steps,  # only the one at the end
        "save_interval": None,
    }


def train(data: Path, settings: dict[str, Any]) -> float:
    """One run in a process of its own: answers entirely right, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings))
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
            "pretrain_vlm.py", "--recipe", str(path), "--data", str(data / "meta.json"),
            "--valid-data", str(data / "meta_val.json"), "--tokenizer-model", str(data / "tokenizer"),
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a run failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return float(RIGHT.findall(done.stdout)[-1])


def digest(settings: dict[str, Any]) -> str:
    """Names a recipe's content: a run of another recipe is another run."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def images_of(data: Path) -> list[tuple[int, int]]:
    """Width and height of every record with one image, training records first."""
    lines = [line for name in ("train", "val") for line in (data / f"{name}.jsonl").open()]
    records = [json.loads(line) for line in lines]
    return [(r["width"], r["height"]) for r in records if isinstance(r.get("image"), str)]


def twins(sizes: list[tuple[int, int]], settings: dict[str, Any]) -> dict[str, str]:
    """Each rule of RVTC and the first one that cuts all these images alike."""
    cut = {
        rule: [
            tile_grid(*size, tile_size=224, max_tiles=settings["max_tiles"], policy=rule) for size in sizes
        ]
        for rule in RULES
    }
    return {rule: next(other for other in RULES if cut[other] == cut[rule]) for rule in RULES}


def compression(
    sizes: list[tuple[int, int]], combination: tuple[str, str, str], settings: dict[str, Any]
) -> tuple[float, float]:
    """Tiles per image, thumbnails included, and visual tokens per image in the mean over the decoder's layers."""
    rule = {"tile_size": 224, "max_tiles": settings["max_tiles"], "policy": combination[2]}
    tiles = statistics.mean(tile_count(*tile_grid(*size, **rule), thumbnail=True) for size in sizes)
    model = preset(settings["model_preset"])
    vision = internvit_preset(model["vision_preset"])
    side = vision.image_size // vision.patch_size
    expand = EXPANSIONS[combination[1]] or 0
    per_tile = (expand * (side // 4) ** 2 + (LAYERS - expand) * (side // 2) ** 2) / LAYERS
    return tiles, tiles * per_tile


def step_times(
    data: Path, wanted: list[tuple[str, str, str]], repeats: int
) -> dict[tuple[str, str, str], float]:
    """Median milliseconds of a step of the same 16 samples; the combinations take turns."""
    workers = {}
    for combination in wanted:
        settings = recipe(*combination, SEEDS[0], 1000) | {"global_batch_size": TIMED}
        rule = {"tile_size": 224, "max_tiles": settings["max_tiles"], "policy": combination[2]}
        grids = [tile_grid(*image, **rule) for image in images_of(data)[:TIMED]]
        samples = [(tile_count(*grid, thumbnail=True), 32) for grid in grids]
        size = settings["micro_batch_size"]
        micro_batches = [samples[i : i + size] for i in range(0, len(samples), size)]
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


def read(path: Path) -> list[dict[str, Any]]:
    """Finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summary(
    runs: list[dict[str, Any]],
    ms: dict[tuple[str, str, str], float],
    sizes: list[tuple[int, int]],
    settings: dict[str, Any],
) -> list[list[str]]:
    """Rows per combination: compression, mean and range of accuracy over the seeds, step time."""
    rows = [
        [
            "projector",
            "LVTC k",
            "RVTC",
            "tiles per image",
            "visual tokens per image, mean of layers",
            "seeds",
            "answers right %, mean (range)",
            "ms per step",
            "of the first",
        ]
    ]
    for key in COMBINATIONS:
        right = [run["accuracy"] for run in runs if of(run) == key]
        if right:
            shown = f"{statistics.mean(right):.1f} ({min(right):.1f}-{max(right):.1f})"
            base = next(iter(ms.values()))
            tiles, tokens = compression(sizes, key, settings)
            rows.append(
                [
                    *key,
                    f"{tiles:.2f}",
                    f"{tokens:.1f}",
                    str(len(right)),
                    shown,
                    f"{ms[key]:.0f}",
                    f"{ms[key] / base:.2f}",
                ]
            )
    return rows


def of(run: dict[str, Any]) -> tuple[str, str, str]:
    """The combination of a run."""
    return run["projector"], run["expansion"], run["rvtc"]


def plot(
    runs: list[dict[str, Any]], ms: dict[tuple[str, str, str], float], same: dict[str, str], path: Path
) -> None:
    """Accuracy over step time; colour: projector, marker: LVTC, filled: RVTC; rules that cut alike are one point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5))
    markers = dict(zip(EXPANSIONS, "os^D", strict=True))
    sizes = {"off": 5, "edge": 13, "area": 9}
    for projector, expansion, rvtc in COMBINATIONS:
        mine = [run["accuracy"] for run in runs if of(run) == (projector, expansion, rvtc)]
        if not mine or same[rvtc] != rvtc:
            continue
        axis.errorbar(
            ms[projector, expansion, rvtc],
            statistics.mean(mine),
            yerr=statistics.pstdev(mine),
            fmt=markers[expansion],
            markersize=sizes[rvtc],
            fillstyle="none" if rvtc == "off" else "full",
            color={"mlp": "tab:gray", "pvtc": "tab:blue"}[projector],
            label=f"{projector}, k {expansion}" if rvtc == "edge" else None,
        )
    alike = {rule: [twin for twin in RULES if same[twin] == rule] for rule in same.values()}
    axis.set_xlabel("ms per step")
    axis.set_ylabel("held-out answers right, %")
    filled = ", ".join(" = ".join(group) for rule, group in alike.items() if rule != "off")
    axis.set_title(f"small and open: RVTC off; full: RVTC {filled}; bars: deviation over seeds", fontsize=9)
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Run what is missing, then write table and plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="every combination, 400 steps")
    parser.add_argument("--only", default="", help="combinations whose name contains this")
    parser.add_argument("--report", action="store_true", help="train nothing")
    chosen = parser.parse_args()
    name = "quality" if chosen.full else "quality-quick"
    steps, seeds = (400, SEEDS) if chosen.full else (20, SEEDS[:1])
    wanted = COMBINATIONS if chosen.full else [COMBINATIONS[0], COMBINATIONS[-2]]
    log = RESULTS / f"{name}.jsonl"
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        command = [sys.executable, "tools/make_demo_data.py", "--out", folder]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        sizes, settings = images_of(data), recipe(*wanted[0], SEEDS[0], steps)
        same = twins(sizes, settings)
        distinct = list(dict.fromkeys((p, k, same[rule]) for p, k, rule in wanted))
        # Seed by seed, so that an unfinished study covers all combinations.
        for seed, combination in itertools.product(seeds, distinct):
            key = (*combination, seed)
            if chosen.report or chosen.only not in " ".join(combination):
                continue
            # Read anew each time: a second process may work on another part of the study.
            settings = recipe(*combination, seed, steps)
            if key in {(*of(run), run["seed"]) for run in read(log) if run["recipe"] == digest(settings)}:
                continue
            line = dict(zip(("projector", "expansion", "rvtc", "seed"), key, strict=True))
            line |= {"accuracy": train(data, settings), "recipe": digest(settings), "commit": commit()}
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
        runs = [run for run in read(log) if run["recipe"] == digest(recipe(*of(run), run["seed"], steps))]
        missing = {(*key, seed) for key in distinct for seed in seeds} - {(*of(r), r["seed"]) for r in runs}
        if missing and not chosen.report:
            print(f"{len(missing)} runs are still to do; --report shows those that are there")
            return
        present = [key for key in distinct if any(of(run) == key for run in runs)]
        ms = step_times(data, present, 7 if chosen.full else 2)
    runs += [
        run | {"rvtc": rule}
        for rule in RULES
        for run in runs
        if same[rule] != rule and run["rvtc"] == same[rule] and (*of(run)[:2], rule) in wanted
    ]
    ms |= {(p, k, rule): ms[p, k, same[rule]] for p, k, rule in wanted if (p, k, same[rule]) in ms}
    ms = {key: ms[key] for key in wanted if key in ms}
    plot(runs, ms, same, RESULTS / f"{name}.png")
    alike = [f"`{rule}` cuts every image as `{other}` does" for rule, other in same.items() if rule != other]
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    lines = [
        f"{steps} steps of 8 samples per run, one rank; L = {LAYERS} layers. The runs are of the commits {commits}. "
        + "".join(f"{text}: the same tiles, so the same runs. " for text in alike)
        + f"![plot]({name}.png)",
        "",
        *table(summary(runs, ms, sizes, settings)),
    ]
    write(
        name,
        "Quality against compression",
        "python -m benchmarks.quality" + " --full" * chosen.full + " --report" * chosen.report,
        lines,
    )


if __name__ == "__main__":
    main()
