"""The demo's goals: each is missed once, with both numbers."""

import json
from pathlib import Path

import pytest

from tools import demo_goals
from tools.demo_questions import KINDS

ASKED = 20


def write(folder: Path, wrong: dict[str, int], common: str | None = None, without: str | None = None) -> str:
    """Predictions of 20 questions of each kind, of which some are wrong; a kind may have one answer only."""
    rows = [
        {
            "key": f"val.jsonl:{number}", "kind": kind, "image": None, "cols": 1, "rows": 1, "thumbnail": False,
            "question": "?", "given": "x", "correct": number >= wrong.get(kind, 0),
            "expected": "same" if kind == common else f"{number % 4}",
        }
        for kind in KINDS - {without}
        for number in range(ASKED)
    ]  # fmt: skip
    path = folder / "predictions.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_a_model_that_sees_meets_them(tmp_path, capsys):
    assert demo_goals.main([write(tmp_path, {"word": 6, "digit": 3})]) == 0
    assert capsys.readouterr().out == "goals met: the lowest kind is word, 14 of 20 right\n"


@pytest.mark.parametrize(
    ("made", "line"),
    [
        ({"wrong": {"word": 7}}, "goal missed: word: 13 of 20 right, 65.0 %, goal 70 %"),
        ({"wrong": dict.fromkeys(KINDS, 4)}, "goal missed: together: 160 of 200 right, 80.0 %, goal 85 %"),
        (
            {"wrong": {}, "common": "shape"},
            "goal missed: shape: always the commonest answer is 100.0 % right, goal below 30 %",
        ),
        ({"wrong": {}, "without": "digit"}, "goal missed: no question of kind digit"),
    ],
)
def test_a_goal_is_missed_with_both_numbers(tmp_path, capsys, made, line):
    assert demo_goals.main([write(tmp_path, **made)]) == 1
    assert capsys.readouterr().err == f"{line}\n"


def test_make_demo_ends_with_them():
    script = (Path(__file__).parents[3] / "examples" / "demo" / "run.sh").read_text()
    assert 'tools/demo_goals.py "$out/predictions.jsonl"' in script and "set -euo pipefail" in script
