"""A model that was trained a little, exported, and asked in transformers what training had asked it."""

import json
from pathlib import Path

import pytest

from megatron_internvlx.commands import convert, evaluate
from tests import entry
from tests.distributed import Pool
from tools import make_demo_data


def answers(path: Path) -> dict[tuple[str, str], dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["key"], row["question"]): row for row in rows}


def test_exported_model_has_the_accuracy_that_training_reported(pool: Pool, tmp_path: Path) -> None:
    """Teacher-forced in Megatron on a pipeline, generated token by token in transformers: the same answers are
    right. Without the thumbnail, with another chat template or with another tile rule they are not."""
    data, save, said = tmp_path / "data", tmp_path / "save", tmp_path / "said.jsonl"
    assert make_demo_data.main(["--out", str(data), "--train", "160", "--val", "24"]) == 0
    command = [
        *("--recipe", "examples/demo/demo.yaml", "--loader-workers", "0", "--train-iters", "20"),
        *("--data", str(data / "meta.json"), "--valid-data", str(data / "meta_val.json")),
        *("--tokenizer-model", str(data / "tokenizer"), "--predictions-file", str(said)),
        *("--eval-iters", "2", "--eval-interval", "100", "--eval-global-batch-size", "12"),
        *("--eval-micro-batch-size", "4", "--save", str(save), "--pipeline-model-parallel-size", "2"),
    ]
    results = pool.run(2, entry.run, command, timeout=240)
    ((_, values),) = results[-1]["evaluations"]
    hf, out = tmp_path / "hf", tmp_path / "evaluation"
    assert convert.main(["export", "--load", str(save), "--hf", str(hf), "--quiet"]) == 0
    limits = ["--max-new-tokens", "8", "--batch-size", "24"]
    questions = ["--hf", str(hf), "--data", str(data / "meta_val.json"), "--out", str(out)]
    assert evaluate.main([*questions, *limits]) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert 0.05 < values["accuracy"] < 0.9  # all right or all wrong would prove little; measured 0.095
    assert scores["exact_match"] == pytest.approx(values["accuracy"], abs=0.01)
    expected, found = answers(said), answers(out / "predictions.jsonl")
    assert expected.keys() == found.keys()
    differing = [key for key, row in expected.items() if row["correct"] != found[key]["correct"]]
    assert len(differing) <= 0.01 * len(expected)
    assert {key: row["kind"] for key, row in expected.items()} == {k: r["kind"] for k, r in found.items()}
