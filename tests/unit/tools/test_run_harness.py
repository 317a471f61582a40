"""Mistakes of `tools/run_harness.py`, told before a harness is imported."""

import json
from pathlib import Path

import pytest

from tests.converting import FAMILIES, make_directory
from tools import run_harness

ROWS = [{"key": "d.jsonl:1", "question": "What?"}, {"key": "d.jsonl:2", "question": "Which?"}]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_harness_that_is_not_installed(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(run_harness.MODULES, "lmms-eval", "not_there")
    assert run_harness.main(["lmms-eval", "--hf", str(tmp_path), "--data", "meta.json"]) == 2
    assert "lmms-eval is not installed here; bash tools/eval_env.sh" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hf", "none", "--data", "meta.json"], "--hf none: no such directory"),
        (["--hf", "hf", "--data", "none.json"], "none.json"),
        (
            ["--hf", "hf", "--data", "meta.json", "--", "--judge", "x"],
            "--judge x: arguments after -- are for",
        ),
        (
            ["--hf", "hf", "--tasks", "pope", "--expect", "a.jsonl"],
            "--expect a.jsonl: of no effect with --tasks",
        ),
        (["--hf", "hf", "--tasks", "pope", "--metric", "anls"], "--metric anls: of no effect with --tasks"),
    ],
)
def test_mistakes(tmp_path: Path, monkeypatch, capsys, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(run_harness.MODULES, "lmms-eval", "json")
    for name in (*run_harness.OFFLINE, *run_harness.FOLDERS):
        monkeypatch.setenv(name, "")  # restored afterwards
    make_directory(tmp_path / "hf", FAMILIES["llama"], tokenizer=True)
    assert run_harness.main(["lmms-eval", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_vlmevalkit_has_no_limit_for_its_tasks(tmp_path: Path, capsys) -> None:
    command = ["vlmevalkit", "--hf", str(tmp_path), "--tasks", "POPE", "--limit", "3"]
    assert run_harness.main(command) == 2
    assert "--limit 3: of no effect with --tasks in vlmevalkit" in capsys.readouterr().err


def test_expected_answers_must_be_to_the_same_questions(tmp_path: Path) -> None:
    fine = [row | {"given": "x"} for row in ROWS]
    assert run_harness.read_expected(write(tmp_path / "a", fine), ROWS[:1]) == ["x"]
    with pytest.raises(ValueError, match=r"answer 2 must be to 'Which\?' of d.jsonl:2, found nothing"):
        run_harness.read_expected(write(tmp_path / "b", fine[:1]), ROWS)
    for number, rows in enumerate(([{"a": 1}], [1])):
        with pytest.raises(ValueError, match="a line has no answer"):
            run_harness.read_expected(write(tmp_path / f"d{number}", rows), ROWS)
    (tmp_path / "e").write_text("answers")
    with pytest.raises(ValueError, match=r"e: no predictions.jsonl"):
        run_harness.read_expected(tmp_path / "e", ROWS)
    with pytest.raises(ValueError, match=r"answer 1 must be to 'What\?' of d.jsonl:1, found 'Which\?'"):
        run_harness.read_expected(write(tmp_path / "c", fine[::-1]), ROWS)


def test_different_answers_are_shown_and_fail(tmp_path: Path, monkeypatch, capsys) -> None:
    for name in (*run_harness.OFFLINE, *run_harness.FOLDERS):
        monkeypatch.setenv(name, "")
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "cat"}]
    write(tmp_path / "d.jsonl", [{"conversations": turns}] * 2)
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"root": "", "annotation": "d.jsonl"}}))
    expected = write(
        tmp_path / "predictions.jsonl",
        [{"key": f"d.jsonl:{number}", "question": "What?", "given": "cat"} for number in (1, 2)],
    )
    monkeypatch.setitem(run_harness.MODULES, "lmms-eval", "json")
    monkeypatch.setitem(run_harness.RUNS, "lmms-eval", lambda rows, options: ["cat", "dog"])
    hf = make_directory(tmp_path / "hf", FAMILIES["llama"], tokenizer=True)
    command = [
        "lmms-eval",
        "--hf",
        str(hf),
        "--data",
        str(tmp_path / "meta.json"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert run_harness.main([*command, "--expect", str(expected)]) == 1
    out = capsys.readouterr().out
    assert "mean score 50.00 %" in out
    assert "1 of 2" in out
    assert "'cat' -> 'dog'" in out
    assert len((tmp_path / "out/answers.jsonl").read_text().splitlines()) == 2
