"""The GPU report measures: its command with tiny rows on the CPU, where neither Energon nor MLflow can be imported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ROWS = ("2b-bf16-eager", "curve-bf16", "plain-loop", "images")  # one of each kind that is not a file of tests
ABSENT = ("megatron.energon", "mlflow")
# Python runs it at the start of every process of the command. Packages are not found, as where they are not installed.
WITHOUT = f"""\
from importlib.machinery import PathFinder

found = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None: None if name.startswith({ABSENT!r}) else found(name, path, target)
)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a process without the absent packages."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "sitecustomize.py").write_text(WITHOUT)
    return os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def files(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the command wrote, by suffix."""
    out = tmp_path_factory.mktemp("report")
    words = ["--tiny", "--minutes", "60", "--out", str(out), "--only", *ROWS]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_report", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {path.suffix: path for path in out.iterdir()}


@pytest.fixture(scope="module")
def results(files: dict[str, Path]) -> dict[str, Any]:
    """Results by row."""
    return json.loads(files[".json"].read_text())["rows"]


@pytest.mark.parametrize("name", ABSENT)
def test_packages_are_absent(environment: dict[str, str], name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], env=environment, capture_output=True, text=True, check=False
    )
    assert f"No module named '{name}'" in done.stderr


def test_every_row_has_a_time_and_no_error(results: dict[str, Any]) -> None:
    errors = {name: (row["error"], row.get("log")) for name, row in results.items() if "error" in row}
    assert results.keys() == set(ROWS) and not errors
    assert all(row["took"] > 0 and row["device"] == "CPU" for row in results.values())


@pytest.mark.parametrize("name", ["2b-bf16-eager", "plain-loop"])
def test_steps_are_timed_and_profiled(results: dict[str, Any], name: str) -> None:
    row = results[name]
    assert len(row["warmup_seconds"]) == len(row["seconds"]) == 2
    assert min(row["seconds"]) > 0 and row["build_seconds"] > 0 and row["parameters"] > 1e5
    assert row["tokens"] == 3 * 16 + 130  # of three tiles and of text
    profile = row["profile"]
    assert profile["kernels"] > 100 and profile["busy_ms"] > 0 and profile["recorded_ms"] > 0
    assert {"attention", "norms"} < profile["classes"].keys()


def test_own_steps_count_flops_and_memory(results: dict[str, Any]) -> None:
    row = results["2b-bf16-eager"]
    assert 0 < row["useful_flops"] < row["flops"]  # budgets are fuller than packs
    assert row["loss"] > 0 and row["predicted_gib"] > 0 and "predicted_error" not in row


def test_curve_begins_without_an_update(results: dict[str, Any]) -> None:
    """Two micro-batches are a step: the second step repeats the first one's loss, the third does not."""
    first, second, *others = results["curve-bf16"]["losses"]
    assert first == second and len(others) == 2 and others[0] < first


def test_images_are_decoded(results: dict[str, Any]) -> None:
    rates = [row["images_per_s"] for row in results["images"]["images"] if "images_per_s" in row]
    times = [row["collect_ms"] for row in results["images"]["images"] if "collect_ms" in row]
    assert len(rates) == 10 and len(times) == 2 and min(rates + times) > 0


def test_table_and_picture_are_whole(files: dict[str, Path]) -> None:
    assert files.keys() == {".json", ".md", ".png"}
    text = files[".md"].read_text()
    assert re.search(r"^\| 2b-bf16-eager \| \d+ \(\d+-\d+\) \|", text, re.MULTILINE)
    assert all(f"\n| {name} |" in text for name in ROWS if name != "images") and "## Images" in text
    assert "Rows that failed" not in text and f"({files['.png'].name})" in text
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
