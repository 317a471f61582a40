"""The command line of the chat: mistakes before slow imports, and its documentation."""

import json
import re
import subprocess
import sys
from pathlib import Path

from megatron_internvlx.commands.chat import parser

ROOT = Path(__file__).parents[3]
# Runs many command lines in one process in which PyTorch cannot be imported.
WITHOUT_TORCH = """
import contextlib, io, json, sys
sys.modules["torch"] = sys.modules["transformers"] = sys.modules["PIL"] = sys.modules["numpy"] = None
from megatron_internvlx.commands.chat import main
answers = []
for arguments in json.load(sys.stdin):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    answers.append([code, err.getvalue()])
json.dump(answers, sys.stdout)
"""


def test_mistakes_are_told_before_imports(tmp_path: Path) -> None:
    for name in ("hf", "ck"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    cases = [
        (["none"], "none: no such directory\n"),
        (["OpenGVLab/InternVL2-8B"], "hf download OpenGVLab/InternVL2-8B --local-dir InternVL2-8B"),
        (["file"], "file: a file, not a directory"),
        (["hf", "--web", "--ask", "What?"], "--web: --ask, --image and --json are for the terminal"),
        (["hf", "--iteration", "7"], "--iteration: only for checkpoints; hf is a Hugging Face directory"),
        (["ck", "--tokenizer-model", "none"], "--tokenizer-model none: no such directory"),
        (["ck", "--keep", "hf"], "--keep hf: exists already"),
        (["hf", "--image", "none.png"], "--image none.png: no such file"),
        (["hf", "--image", "ck"], "--image ck: not a file"),
        (["hf", "--temperature", "-1"], "must be a number at least 0"),
        (["hf", "--port", "70000"], "must be a whole number between 0 and 65,535"),
    ]
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input=json.dumps([case for case, _ in cases]), text=True,
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    for (case, message), (code, told) in zip(cases, json.loads(process.stdout), strict=True):
        assert code == 2, case
        assert message in told, case


def test_every_option_is_documented() -> None:
    options = {
        name for action in parser()._actions for name in action.option_strings if name.startswith("--")
    }
    text = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    table = text.split("## Options", 1)[1]
    assert set(re.findall(r"`(--[\w-]+)", table)) == options - {"--help"}
