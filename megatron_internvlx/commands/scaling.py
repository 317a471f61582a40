"""`ivlx scaling`: a grid of models, visual tokens, expand layers, token budgets and layouts.

The grid file:

    name: demo                     # of the MLflow experiment
    out: runs/scaling/demo         # recipes, checkpoints, report
    ranks: 2                       # local runs; or  slurm: {nodes: 2, parallel: 3, options: [--time=60]}
    base: {recipe: examples/demo/demo.yaml, data: meta.json, tokenizer_model: tokenizer/, train_iters: 100}
    axes:                          # every combination of one entry per axis is a point
      model: {small: {hidden_size: 64}, large: {hidden_size: 128}}
      tokens: {64: {high_ratio: 1.0, low_ratio: 0.5}, 16: {}, 4: {high_ratio: 0.25, low_ratio: 0.125}}

`token_budget` in a point or in the base, instead of train_iters, sets the number of steps by the number of
tokens. Jobs resume where they stopped, so `submit` may be repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_internvlx.commands import scaling_report
from megatron_internvlx.commands.help import CommandParser
from megatron_internvlx.commands.programs import training_program
from megatron_internvlx.exit_codes import DONE, FAILED, MISTAKE
from megatron_internvlx.lifecycle import resume
from megatron_internvlx.reporting.mlflow_sink import mark_failed
from megatron_internvlx.yaml_files import load_yaml

BUDGET = "token_budget"


@dataclass(frozen=True)
class Point:
    """One combination of axis entries of the grid."""

    labels: dict[str, str]
    """Label of the entry on every axis."""
    settings: dict[str, Any]
    """Settings of the run's recipe, without those added by this tool."""
    folder: Path

    @property
    def name(self) -> str:
        """Name of the point, such as model=small,tokens=16."""
        return ",".join(f"{axis}={label}" for axis, label in self.labels.items())

    @property
    def recipe(self) -> Path:
        """Path of the recipe file."""
        return self.folder / "recipe.yaml"

    @property
    def save(self) -> Path:
        """Directory of the checkpoints; its name is the name of the MLflow run."""
        return self.folder / self.name

    def figures(self) -> dict[str, Any] | None:
        """Results of the dry run; None if it failed."""
        path = self.folder / "dry_run.json"
        return json.loads(path.read_text()) if path.exists() else None


@dataclass(frozen=True)
class Grid:
    """Content of a grid file."""

    name: str
    out: Path
    points: list[Point]
    ranks: int
    slurm: dict[str, Any] | None

    @property
    def store(self) -> str:
        """MLflow tracking URI of all runs."""
        local = f"sqlite:///{self.out.absolute()}/mlflow.db"
        return os.environ.get("MLFLOW_TRACKING_URI") or local


def read_grid(path: Path) -> Grid:
    """Read a grid file. Raises ValueError with the reason if it is invalid."""
    content = _read_mapping(path)
    missing = [key for key in ("name", "axes", "base") if key not in content]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} is missing")
    out = Path(content.get("out") or f"runs/scaling/{content['name']}")
    for key in ("axes", "base", "slurm"):
        if not isinstance(content.get(key) or {}, dict):
            raise ValueError(f"{path}: {key} must be a mapping")
    base = dict(content["base"] or {})
    if recipe := base.pop("recipe", None):
        base = _read_mapping(Path(str(recipe))) | base
    slurm = content.get("slurm")
    for where, key in ((content, "ranks"), (slurm or {}, "nodes"), (slurm or {}, "parallel")):
        value = where.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1_000_000:
            raise ValueError(f"{path}: {key} is {value!r}, must be a whole number of at least 1")
    axes = {axis: _parse_axis(axis, entries) for axis, entries in (content["axes"] or {}).items()}
    points = []
    for labels in itertools.product(*axes.values()):
        settings = dict(base)
        for axis, label in zip(axes, labels, strict=True):
            settings |= axes[axis][label]
        named = dict(zip(axes, labels, strict=True))
        folder = out / "_".join(f"{axis}-{label}" for axis, label in named.items())
        points.append(Point(named, settings, folder))
    return Grid(str(content["name"]), out, points, content.get("ranks", 1), slurm)


def _read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that contains a mapping. Raises ValueError for others, also an empty file."""
    try:
        content = load_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a mapping of names to values")
    return content


def _parse_axis(axis: str, entries: Any) -> dict[str, dict[str, Any]]:
    """Convert an axis to {label: settings}; a list of values means {value: {axis: value}}."""
    if isinstance(entries, list):
        return {str(value): {axis: value} for value in entries}
    if not isinstance(entries, dict):
        raise ValueError(f"axis {axis}: must be a list of values, or a mapping of labels to settings")
    for label, settings in entries.items():
        if not isinstance(settings or {}, dict):
            raise ValueError(f"axis {axis}: {label} is {settings!r}, must be a mapping of settings")
    return {str(label): dict(settings or {}) for label, settings in entries.items()}


def plan(grid: Grid) -> int:
    """Write the recipe of every point and dry-run it; returns the number of points that cannot run."""
    failed = 0
    rows = [["point", "parameters", "GPUs", "layout", "tokens/step", "steps", "PFLOP", "GiB/GPU"]]
    for point in grid.points:
        reason = _plan_point(grid, point)
        found = point.figures()
        if reason is not None or found is None:
            failed += 1
            print(f"{point.name}: cannot run: {reason}", file=sys.stderr)
            continue
        steps = yaml.safe_load(point.recipe.read_text())["train_iters"]
        work = found["flop_per_step"] * steps / 1e15
        numbers = [f"{found['parameters']:,}", str(found["world_size"]), found["layout"]]
        numbers += [f"{found['tokens_per_step']:,}", str(steps), f"{work:,.4g}"]
        rows.append([point.name, *numbers, f"{found['memory_per_gpu'] / (1 << 30):.2f}"])
    print(scaling_report.table(rows))
    return failed


def _plan_point(grid: Grid, point: Point) -> str | None:
    """Dry-run one point; returns the reason if it cannot run."""
    settings = dict(point.settings)
    budget = settings.pop(BUDGET, None)
    if budget is not None and not _is_count(budget):
        return f"{BUDGET} is {budget!r}, must be a number of tokens"
    # Converting a budget to steps needs the tokens of a step, from a first dry run.
    for _ in range(1 if budget is None else 2):
        if budget is not None:
            found = point.figures()
            settings["train_iters"] = math.ceil(float(budget) / found["tokens_per_step"]) if found else 1
        settings.setdefault("train_iters", 100)
        settings |= {"mlflow_experiment": grid.name}
        point.folder.mkdir(parents=True, exist_ok=True)
        point.recipe.write_text(yaml.safe_dump(settings, sort_keys=False))
        (point.folder / "dry_run.json").unlink(missing_ok=True)
        # Local runs use the grid's ranks instead of the recipe's.
        ranks = grid.ranks if grid.slurm is None else settings.get("dry_run_world_size") or grid.ranks
        command = [sys.executable, training_program(), "--recipe", str(point.recipe.absolute()), "--dry-run"]
        command += ["--dry-run-world-size", str(ranks)]
        command += ["--dry-run-json", str((point.folder / "dry_run.json").absolute())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return (done.stderr or done.stdout).strip().split("\n")[-1]
    return None


def _is_count(value: Any) -> bool:
    try:
        return 1 <= float(value) < math.inf
    except (TypeError, ValueError):
        return False


def submit(grid: Grid) -> int:
    """Run every planned point that is not finished; returns the number of failed points (0 under SLURM)."""
    ready = [point for point in grid.points if point.figures() is not None]
    if not ready:
        raise ValueError("no point is planned: run `ivlx scaling plan` first")
    pending = [point for point in ready if resume.RunState.read(point.save).status != "finished"]
    if grid.slurm is None:
        return sum(_train_locally(grid, point) != 0 for point in pending)
    chains: list[str | None] = [None] * int(grid.slurm.get("parallel", 1))
    for number, point in enumerate(pending):
        chain = number % len(chains)
        chains[chain] = _submit_job(grid, point, chains[chain])
        print(f"{chains[chain]}: {point.name}")
    return 0


def _train_locally(grid: Grid, point: Point) -> int:
    """Train one point on this machine, with restarts after faults; returns the exit code."""
    point.save.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(grid.ranks), "--max-restarts", "2", training_program()]
    command += ["--recipe", str(point.recipe), "--save", str(point.save), "--auto-resume"]
    command += ["--exit-signal-handler"]
    threads = str(max(1, (os.cpu_count() or 1) // grid.ranks))
    environment = {"OMP_NUM_THREADS": threads} | os.environ | {"MLFLOW_TRACKING_URI": grid.store}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # train.sbatch explains the reason
    print(f"{point.name}: training", flush=True)
    with (point.folder / "train.log").open("a") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:  # killed ranks could not report it themselves
        mark_failed(point.save)
    print(f"{point.name}: {'done' if code == 0 else f'failed, see {point.folder}/train.log'}", flush=True)
    return code


def _job_script() -> Path:
    """Path of the batch script, which is in a checkout of the project. Raises ValueError if it is not there."""
    path = Path(training_program()).with_name("examples") / "slurm" / "train.sbatch"
    if not path.is_file():
        raise ValueError(f"{path}: no such file: jobs are submitted from a checkout of the project")
    return path


def _submit_job(grid: Grid, point: Point, after: str | None) -> str:
    """Submit one point to SLURM, to run after the job `after`; returns the job id."""
    assert grid.slurm is not None
    script = _job_script()
    settings = yaml.safe_load(point.recipe.read_text())
    command = ["sbatch", "--parsable", "--nodes", str(grid.slurm.get("nodes", 1))]
    command += ["--job-name", f"{grid.name}-{point.name}", "--output", str(point.folder / "train.log")]
    command += [str(option) for option in grid.slurm.get("options", [])]
    if after is not None:
        command += ["--dependency", f"afterany:{after}"]
    command += [str(script)]
    environment = (
        {"INTERNVLX_HOME": str(script.parents[2])}
        | os.environ
        | {
            "RECIPE": str(point.recipe.absolute()),
            "SAVE": str(point.save.absolute()),
            "DATA": str(settings.get("data", "")),
            "TOKENIZER": str(settings.get("tokenizer_model", "")),
            "MLFLOW_TRACKING_URI": grid.store,
            "MLFLOW_EXPERIMENT_NAME": grid.name,
        }
    )
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"sbatch rejected {point.name}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def report(grid: Grid) -> int:
    """Write report.md and its pictures; returns the number of points without a run."""
    measured = scaling_report.read_runs(grid.store, grid.name)
    rows = []
    for point in grid.points:
        series = measured.get(point.save.name)
        figures = point.figures()
        if series and figures:
            rows.append(scaling_report.Result(point.name, point.labels, figures, series))
    path = scaling_report.write_report(grid.out, grid.name, rows)
    print(path.read_text())
    return len(grid.points) - len(rows)


def parser() -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    it = CommandParser(
        "scaling",
        "Run scaling experiments: a grid of models, visual tokens, expand layers, token budgets and layouts.",
        about="`plan` writes a recipe of every point and dry-runs it. `submit` trains: sbatch jobs, or local runs one "
        "after another; it may be repeated, since runs resume where they stopped. `report` writes a table and "
        "curves from MLflow.\n\nA grid file has name, out, base (a recipe and settings), axes (lists of values, "
        "or labels with settings), and ranks for local runs or slurm: examples/scaling/demo.yaml is one.",
        examples=(
            "ivlx scaling plan   examples/scaling/demo.yaml",
            "ivlx scaling submit examples/scaling/demo.yaml",
            "ivlx scaling report examples/scaling/demo.yaml",
        ),
        exits={
            DONE: "done",
            FAILED: "a point cannot run, failed, or has no results",
            MISTAKE: "wrong arguments or files",
        },
    )
    it.add_argument("action", choices=("plan", "submit", "report"), help="plan, submit or report")
    it.add_argument("grid", type=Path, metavar="GRID.yaml", help="grid file")
    return it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        grid = read_grid(options.grid)
        missing = {"plan": plan, "submit": submit, "report": report}[options.action](grid)
    except (ValueError, OSError) as error:
        print(f"ivlx scaling: {error}", file=sys.stderr)
        return MISTAKE
    return FAILED if missing else DONE
