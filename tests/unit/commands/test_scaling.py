"""Scaling experiments: the grid, what is submitted, and the report."""

import json
import stat
from pathlib import Path

import pytest
import yaml

from megatron_internvlx.commands import scaling, scaling_report

REPOSITORY = Path(__file__).parents[3]


def grid_file(folder: Path, **changes) -> Path:
    content = {
        "name": "trial",
        "out": str(folder / "out"),
        "ranks": 1,
        "base": {"lr": 1e-3, "train_iters": 4, "data": "meta.json", "tokenizer_model": "tokenizer"},
        "axes": {"model": {"small": {"hidden_size": 64}, "large": None}, "expand_layer": [1, 2, 3]},
        **changes,
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_grid_is_the_product_of_its_axes(tmp_path):
    grid = scaling.read_grid(grid_file(tmp_path))
    assert [p.name for p in grid.points][:2] == [
        "model=small,expand_layer=1",
        "model=small,expand_layer=2",
    ]
    assert len(grid.points) == 6
    assert grid.points[0].settings | {"hidden_size": 64, "expand_layer": 1} == grid.points[0].settings
    assert "hidden_size" not in grid.points[3].settings


def test_example_grid_can_be_read(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    grid = scaling.read_grid(Path("examples/scaling/demo.yaml"))
    assert len(grid.points) == 6
    assert grid.points[0].settings["model_preset"] == "internvlx_demo"  # of the base recipe


@pytest.mark.parametrize(("slurm", "size"), [(None, "1"), ({"nodes": 2}, "16")])
def test_local_points_have_the_grids_ranks(tmp_path, monkeypatch, slurm, size):
    """The recipe's world size is what a cluster job has, not what runs here."""
    asked = []
    done = scaling.subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(scaling.subprocess, "run", lambda command, **_: asked.append(command) or done)
    base = {"train_iters": 4, "dry_run_world_size": 16}
    grid = scaling.read_grid(grid_file(tmp_path, base=base, slurm=slurm))
    assert scaling._plan_point(grid, grid.points[0]) is None
    assert asked[0][asked[0].index("--dry-run-world-size") + 1] == size


@pytest.mark.parametrize("key", ["name", "axes", "base"])
def test_incomplete_grid_names_what_is_missing(tmp_path, capsys, key):
    path = grid_file(tmp_path)
    content = yaml.safe_load(path.read_text())
    del content[key]
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert scaling.main(["plan", str(path)]) == 2
    assert f"{key} is missing" in capsys.readouterr().err


def figures(point: scaling.Point, tokens: int = 16) -> dict:
    point.folder.mkdir(parents=True)
    point.recipe.write_text(yaml.safe_dump(point.settings))
    found = {
        "parameters": 1000,
        "world_size": 1,
        "layout": "DP1",
        "tokens_per_step": 100,
        "tokens_per_tile": tokens,
        "flop_per_step": 1e12,
        "memory_per_gpu": 1 << 30,
    }
    (point.folder / "dry_run.json").write_text(json.dumps(found))
    return found


def test_slurm_jobs_follow_each_other(tmp_path, monkeypatch, capsys):
    """As many chains as may run in parallel; the fake sbatch numbers jobs and notes its arguments."""
    grid = scaling.read_grid(grid_file(tmp_path, slurm={"nodes": 3, "parallel": 2, "options": ["--time=9"]}))
    for point in grid.points:
        figures(point)
    notes = tmp_path / "notes"
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\necho "$RECIPE|$SAVE|$DATA|$MLFLOW_EXPERIMENT_NAME|$*" >> {notes}\nwc -l < {notes} | tr -d " "\n'
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    assert scaling.submit(grid) == 0
    lines = notes.read_text().splitlines()
    assert len(lines) == 6
    assert all("--nodes 3" in line and "--time=9" in line for line in lines)
    assert "--dependency" not in lines[0] + lines[1]
    assert [line.split("afterany:")[1].split()[0] for line in lines[2:]] == ["1", "2", "3", "4"]
    assert lines[0].split("|")[2:4] == ["meta.json", "trial"]


def test_local_runs_may_be_restarted_and_are_marked_when_they_fail(tmp_path, monkeypatch):
    grid = scaling.read_grid(grid_file(tmp_path, axes={"model": {"a": {}}}))
    figures(grid.points[0])
    seen, marked = {}, []
    done = scaling.subprocess.CompletedProcess([], 9)
    monkeypatch.setattr(scaling.subprocess, "run", lambda _, env, **__: seen.update(env) or done)
    monkeypatch.setattr(scaling, "mark_failed", marked.append)
    assert scaling.submit(grid) == 1
    assert seen["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert marked == [grid.points[0].save]


def test_nothing_planned_is_said(tmp_path, capsys):
    assert scaling.main(["submit", str(grid_file(tmp_path))]) == 2
    assert "plan" in capsys.readouterr().err


def test_report_has_a_table_and_three_pictures(tmp_path):
    grid = scaling.read_grid(
        grid_file(tmp_path, axes={"model": {"a": {}, "b": {}}, "tokens": {"64": {}, "16": {}, "4": {}}})
    )
    results = []
    for number, point in enumerate(grid.points):
        found = figures(point, int(point.labels["tokens"]))
        steps = range(10, 110, 10)
        series = {
            "loss": [(s, 5 / s + number / 10) for s in steps],
            "teraflop_per_step": [(s, 2.0) for s in steps],
            "tokens_per_s": [(s, 1000.0 * (number + 1)) for s in steps],
            "step_seconds": [(s, 0.5 / (number + 1)) for s in steps],
            "validation_accuracy": [(100, 0.9 - number / 20)],
        }
        results.append(scaling_report.Result(point.name, point.labels, found, series))
    assert results[0].compute()[-1] == pytest.approx((0.2, 0.05))
    text = scaling_report.write_report(tmp_path / "report", "trial", results).read_text()
    assert "| model=a,tokens=64" in text and "90.0%" in text
    pictures = sorted(path.name for path in (tmp_path / "report").glob("*.png"))
    assert pictures == [
        "loss_against_compute.png",
        "quality_against_visual_tokens.png",
        "throughput_against_gpus.png",
    ]
    assert all((tmp_path / "report" / name).stat().st_size > 10_000 for name in pictures)


def test_report_without_runs_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="no run"):
        scaling_report.write_report(tmp_path, "trial", [])
