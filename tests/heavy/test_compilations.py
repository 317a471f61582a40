"""Nothing is compiled anew once a training has seen a few lengths, or one with static boundaries its first step.

Counted by torch's own counters in a process that may compile; see `tests/compilations.py`.
"""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[int]]:
    """Number of compiled functions after each step, by case."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_COMPILE_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compilations"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,  # a minute of work, on a machine that may be busy
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stderr.splitlines()[-1])


def late(counts: list[int], settled: int) -> int:
    """Compilations after the first `settled` steps."""
    return sum(after - before for before, after in pairwise(counts[settled - 1 :]))


def test_variable_lengths_compile_nothing_after_the_third_step(compiled: dict[str, list[int]]) -> None:
    assert compiled["variable"][0] > 0, (
        "nothing was compiled at all: the functions that a GPU run compiles are lost"
    )
    assert late(compiled["variable"], 3) == 0, compiled


def test_static_lengths_compile_nothing_after_the_first_step(compiled: dict[str, list[int]]) -> None:
    assert compiled["static"][0] > 0
    assert late(compiled["static"], 1) == 0, compiled


def test_a_mistake_is_counted(compiled: dict[str, list[int]]) -> None:
    """A function that is compiled for each length."""
    assert late(compiled["mistake"], 3) > 0, compiled
