"""Both harnesses give the answers of `ivlx evaluate`, in the environment of tools/eval_env.sh."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from megatron_internvlx.checkpoint.exporter import export_checkpoint
from megatron_internvlx.checkpoint.importer import import_checkpoint
from megatron_internvlx.commands import evaluate
from tests.converting import lvtc_config, make_directory
from tests.unit.test_ratchets import ROOT

PYTHON = ROOT / ".venv-eval/bin/python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="bash tools/eval_env.sh makes .venv-eval")


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an export with LVTC, records of no, one and two images and rounds, and evaluate's answers."""
    root = tmp_path_factory.mktemp("harness")
    for name, size in (("a.png", (40, 20)), ("b.png", (16, 16))):
        Image.effect_noise(size, 90).convert("RGB").save(root / name)

    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]

    records = [
        {"image": "a.png", "conversations": turns("<image>\nWhat?", "x", "And <now>?", "y & z")},
        {
            "image": ["a.png", "b.png"],
            "conversations": turns("<image><image>Which?", "first"),
            "metric": "anls",
        },
        {"conversations": turns("Hello", "hi"), "answers": ["hi", "hello"], "metric": "vqa_accuracy"},
        {"conversations": [{"from": "system", "value": "Be short."}, *turns("Say none", "none")]},
    ]
    (root / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "meta.json").write_text(json.dumps({"d": {"root": "", "annotation": "d.jsonl"}}))
    imported = make_directory(root / "imported", lvtc_config(), tokenizer=True)
    import_checkpoint(imported, root / "checkpoint", quiet=True)
    export_checkpoint(root / "checkpoint", root / "hf", quiet=True)
    command = ["--hf", str(root / "hf"), "--data", str(root / "meta.json"), "--out", str(root / "evaluation")]
    assert evaluate.main([*command, "--max-new-tokens", "6"]) == 0
    return root


@pytest.mark.parametrize("harness", ["lmms-eval", "vlmevalkit"])
def test_answers_are_those_of_evaluate(answered: Path, tmp_path: Path, harness: str) -> None:
    command = [
        PYTHON,
        "tools/run_harness.py",
        harness,
        "--hf",
        answered / "hf",
        "--data",
        answered / "meta.json",
    ]
    expected = answered / "evaluation/predictions.jsonl"
    command += ["--out", tmp_path, "--max-new-tokens", "6", "--batch-size", "2", "--expect", expected]
    environment = {**os.environ, "HOME": str(tmp_path / "home")}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"same as {expected}: 5 of 5" in done.stdout
    given = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    wanted = [json.loads(line) for line in expected.read_text().splitlines()]
    names = ("key", "question", "expected", "metric", "given", "score")
    assert given == [{name: row[name] for name in names} for row in wanted]
    assert {row["metric"] for row in given} == {"exact_match", "anls", "vqa_accuracy"}
    assert any(row["given"] for row in given)
    assert not (tmp_path / "home/LMUData").exists()
