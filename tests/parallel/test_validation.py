"""Validation on real ranks: every held-out record once in every layout, and no record ends the run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests import entry  # isort: skip  (sets Megatron up)
from megatron_internvlx.data.rejects import UnusableData
from megatron_internvlx.megatron_settings import Batches
from megatron_internvlx.training.validation import check_equal_on_all_ranks
from tests.distributed import Pool
from tools import make_demo_data

RECORDS = 17
STATIC = [
    *(
        "--boundary",
        "static",
        "--seq-length",
        "128",
        "--shallow-seq-length",
        "96",
        "--max-tiles-per-pack",
        "3",
    ),
    *("--max-tiles", "2", "--micro-batch-size", "1", "--eval-micro-batch-size", "1"),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validation") / "data"
    assert make_demo_data.main(["--out", str(folder), "--train", "24", "--val", str(RECORDS)]) == 0
    return folder


def arguments(data: Path, *more: str) -> list[str]:
    return [
        *("--recipe", "examples/demo/demo.yaml", "--loader-workers", "0", "--log-interval", "1"),
        *("--data", str(data / "meta.json"), "--valid-data", str(data / "meta_val.json")),
        *("--tokenizer-model", str(data / "tokenizer"), "--lr-warmup-fraction", "0"),
        *("--train-iters", "1", "--eval-interval", "100", "--lr-decay-iters", "6", *more),
    ]


def said(results: list[dict], path: Path) -> tuple[dict[str, float], list[dict], str]:
    """Values, answers and log line of the last evaluation."""
    assert [result["code"] for result in results] == [0] * len(results), results[0]["err"]
    line = next(line for line in results[-1]["out"].splitlines() if line.startswith("validation at step"))
    return results[-1]["evaluations"][-1][1], [json.loads(row) for row in path.read_text().splitlines()], line


def test_every_record_once_on_any_ranks(pool: Pool, demo: Path, tmp_path: Path) -> None:
    """One process, two replicas, two stages; batches that the 17 records fill and that they do not.

    Measured: equal losses and accuracies (relative 1e-7), the same answers.
    """
    found = {}
    for name, ranks, more in (
        ("one", 1, ["--pipeline-model-parallel-size", "1", "--eval-iters", "1"]),
        ("replicas", 2, ["--pipeline-model-parallel-size", "1", "--eval-global-batch-size", "16"]),
        (
            "stages",
            2,
            ["--eval-global-batch-size", "64", "--eval-micro-batch-size", "2", "--full-validation"],
        ),
    ):
        answers = tmp_path / f"{name}.jsonl"
        # A learning rate of 0 keeps the weights of all layouts those of the checkpoint of the first.
        more += ["--predictions-file", str(answers), "--lr", "0", "--min-lr", "0"]
        if name == "one":
            more += ["--save", str(tmp_path / "one")]
        else:
            more += ["--pretrained-checkpoint", str(tmp_path / "one")]
        values, rows, line = said(pool.run(ranks, entry.run, arguments(demo, *more), timeout=240), answers)
        keys = [row["key"] for row in rows]
        assert set(keys) == {f"val.jsonl:{i + 1}" for i in range(RECORDS)}
        assert f"{RECORDS} records" in line
        assert "unusable" not in line and "cut" not in line
        found[name] = values, sorted((row["key"], row["question"], row["given"]) for row in rows)
    for name in ("replicas", "stages"):
        assert found[name][1] == found["one"][1]
        for value in ("loss", "accuracy"):
            assert found[name][0][value] == pytest.approx(found["one"][0][value], rel=1e-5)


def test_no_held_out_record_ends_a_run_with_static_boundaries(pool: Pool, demo: Path, tmp_path: Path) -> None:
    """Held-out records over the budgets are cut or left out by training's rule, and counted; broken ones too."""
    data = tmp_path / "data"
    shutil.copytree(demo, data)
    rows = [json.loads(line) for line in (data / "val.jsonl").read_text().splitlines()]
    image = next(row["image"] for row in rows if isinstance(row.get("image"), str))
    question, right = {"from": "human", "value": "Which shape?"}, {"from": "gpt", "value": "red"}
    long = {"from": "human", "value": "red " * 400}
    hostile = [
        {"image": image, "conversations": [question, right, long, right]},  # its second round is cut
        {"conversations": [long, right]},  # no answer fits
        {"image": [image] * 9, "conversations": [{"from": "human", "value": "<image>" * 9}, right]},
        {"conversations": [question, {"from": "gpt", "value": "\ud800"}]},
        {"image": "nowhere.png", "conversations": [question, right]},
        "{half a record",
    ]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in [*hostile, *rows]]
    (data / "val.jsonl").write_text("\n".join(lines) + "\n")
    answers = tmp_path / "answers.jsonl"
    command = arguments(
        data, *STATIC, "--predictions-file", str(answers), "--rejects-file", str(tmp_path / "bad")
    )
    _, rows, line = said(pool.run(2, entry.run, command, timeout=240), answers)
    causes = {
        json.loads(row)["key"]: json.loads(row)["cause"]
        for row in (tmp_path / "bad").read_text().splitlines()
    }
    assert causes == {
        "val.jsonl:2": "answer_truncated",
        "val.jsonl:3": "too_many_images",
        "val.jsonl:4": "bad_message",
        "val.jsonl:5": "missing_image",
        "val.jsonl:6": "malformed_json",
    }
    assert {row["key"] for row in rows} == {"val.jsonl:1", *(f"val.jsonl:{i + 7}" for i in range(RECORDS))}
    assert f"{RECORDS + 1} records | unusable 5 (" in line
    assert "cut to fit" in line


def compare(valid_data: str, batches: Batches, records: list[int]) -> str:
    """What a rank with its own number of held-out records says."""
    try:
        check_equal_on_all_ranks(valid_data, records[torch.distributed.get_rank()], batches)
    except UnusableData as error:
        return str(error)
    return ""


def test_ranks_that_found_other_held_out_data_do_not_train(pool: Pool) -> None:
    batches = Batches(
        seq_length=8,
        micro_batch_size=1,
        global_batch_size=8,
        eval_micro_batch_size=1,
        eval_global_batch_size=8,
        eval_iters=2,
        train_iters=1,
        seed=1,
    )
    assert pool.run(2, compare, "meta.json", batches, [17, 17]) == ["", ""]
    said = pool.run(2, compare, "meta.json", batches, [17, 16])
    assert said[0] == said[1]
    assert "has 16 records on one rank and 17 on another" in said[0]


def test_training_shows_what_the_length_limit_cuts(pool: Pool, demo: Path, tmp_path: Path) -> None:
    """Both in the simple loader and where validation only would meet it."""
    data = tmp_path / "data"
    shutil.copytree(demo, data)
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["conversations"] += [{"from": "human", "value": "red " * 300}, {"from": "gpt", "value": "red"}]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = ["--pipeline-model-parallel-size", "1"]
    (result,) = pool.run(1, entry.run, arguments(data, *alone))
    line = next(line for line in result["out"].splitlines() if line.startswith("step 1/1"))
    assert "cut to fit 0 tiles, " in line


def test_held_out_data_of_which_nothing_is_usable_is_refused_at_start(
    pool: Pool, demo: Path, tmp_path: Path
) -> None:
    meta = json.loads((demo / "meta_val.json").read_text())
    for part in meta.values():
        part["root"], part["annotation"] = str(tmp_path / "elsewhere"), str(demo / "val.jsonl")
    (tmp_path / "meta_val.json").write_text(json.dumps(meta))
    wrong = ["--valid-data", str(tmp_path / "meta_val.json"), "--pipeline-model-parallel-size", "1"]
    (result,) = pool.run(1, entry.run, arguments(demo, *wrong))
    assert result["code"] == 2
    assert "`root` in meta.json is probably wrong" in result["err"]
