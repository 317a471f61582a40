"""A mistyped path is told in one line, before PyTorch is imported, which takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_internvlx.commands import convert
from tests.converting import FAMILIES, make_directory

ROOT = Path(__file__).parents[3]
# Runs many command lines in one process in which PyTorch cannot be imported.
WITHOUT_TORCH = """
import contextlib, io, json, sys
sys.modules["torch"] = sys.modules["transformers"] = None
from megatron_internvlx.commands import convert, evaluate
answers = []
for tool, *arguments in json.load(sys.stdin):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = {"convert": convert, "evaluate": evaluate}[tool].main(arguments)
    answers.append([code, err.getvalue()])
json.dump(answers, sys.stdout)
"""


def test_paths_before_imports(tmp_path: Path) -> None:
    for name in ("hf", "list", "other", "ck"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "internvl_chat"}')
    (tmp_path / "list" / "config.json").write_text("[1]")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "file").write_text("")
    verify = ["convert", "verify", "--inputs", "file", "--out", "new"]
    cases = [
        (["convert", "import", "--hf", "none", "--save", "new"], "--hf none: no such directory"),
        (["convert", "import", "--hf", "file", "--save", "new"], "--hf file: a file, not a directory"),
        (["convert", "import", "--hf", "ck", "--save", "new"], "ck/config.json: No such file"),
        (["convert", "import", "--hf", "list", "--save", "new"], "list/config.json: not a JSON object"),
        (["convert", "import", "--hf", "other", "--save", "new"], "model_type 'bert'"),
        (["convert", "import", "--hf", "hf", "--save", "ck"], "ck exists already"),
        (["convert", "export", "--load", "none", "--hf", "new"], "--load none: no such directory"),
        (["convert", "export", "--load", "file", "--hf", "new"], "--load file: a file, not a directory"),
        (["convert", "export", "--load", "ck", "--hf", "hf"], "hf exists already"),
        (["convert", "export", "--load", "ck", "--hf", "new", "--like", "none"], "--like none: no such"),
        ([*verify, "--hf", "none"], "--hf none: no such directory"),
        ([*verify, "--load", "none"], "--load none: no such directory"),
        ([*verify, "--hf", "hf", "--inputs", "none"], "--inputs none: no such file"),
        ([*verify, "--hf", "hf", "--inputs", "ck"], "--inputs ck: not a file"),
        ([*verify, "--hf", "hf", "--out", "file"], "file exists already"),
        (["evaluate", "--hf", "none", "--data", "file"], "--hf none: no such directory"),
        (["evaluate", "--hf", "other", "--data", "file"], "model_type 'bert'"),
        (["evaluate", "--hf", "hf", "--data", "none"], "meta file none"),
        (["evaluate", "--hf", "hf", "--data", "file"], "file is not valid JSON"),
    ]
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input=json.dumps([case for case, _ in cases]), text=True,
        capture_output=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    for (case, message), (code, said) in zip(cases, json.loads(process.stdout), strict=True):
        assert code == 2, case
        assert message in said
        assert said.count("\n") == 1, said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "--seed", str(2**70)], "must be a whole number between 0 and "),
        (["verify", "--inputs", "x", "--out", "y", "--tolerance", "nan"], "nan: must be a number at least 0"),
        (["verify", "--inputs", "x", "--out", "y", "--tolerance", "-1"], "-1: must be a number at least 0"),
    ],
)
def test_numbers_that_make_no_sense(capsys, arguments: list[str], message: str) -> None:
    command = [*arguments, "--hf", "hf", *(["--save", "new"] if arguments[0] == "import" else [])]
    with pytest.raises(SystemExit) as stop:
        convert.main(command)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_ratios_and_processes_that_make_no_sense(tmp_path: Path, capsys) -> None:
    hf = make_directory(tmp_path / "hf", FAMILIES["llama"])
    command = ["import", "--hf", str(hf), "--save", str(tmp_path / "ck"), "--expand-layer", "1"]
    assert convert.main([*command, "--low-ratio", "1e-320"]) == 2
    assert "--low-ratio 1e-320 does not fit" in capsys.readouterr().err
    (tmp_path / "case").write_text("")
    command = ["verify", "--hf", str(hf), "--inputs", str(tmp_path / "case"), "--out", str(tmp_path / "o")]
    assert convert.main([*command, "--nproc", "100000"]) == 2
    assert "100000 processes on one machine are too many: use at most 256" in capsys.readouterr().err
