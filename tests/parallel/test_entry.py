"""The entry script from arguments to checkpoint: determinism, resume, bad data, refused combinations."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_internvlx.reporting.phases import PHASES
from tests import entry
from tests.distributed import Pool
from tools import make_demo_data

PIPELINE = ["--pipeline-model-parallel-size", "2"]
ALONE = ["--pipeline-model-parallel-size", "1"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    assert make_demo_data.main(["--out", str(folder), "--train", "48", "--val", "12"]) == 0
    return folder


def arguments(data: Path, *more: str) -> list[str]:
    return [
        *("--recipe", "examples/demo/demo.yaml", "--loader-workers", "0", "--log-interval", "1"),
        *("--data", str(data / "meta.json"), "--valid-data", str(data / "meta_val.json")),
        *("--tokenizer-model", str(data / "tokenizer"), "--lr-warmup-fraction", "0"),
        # The last step is one of those with an evaluation, and Megatron evaluates after it too.
        *("--train-iters", "6", "--eval-iters", "1", "--eval-interval", "6", "--lr-decay-iters", "6"),
        *(
            "--global-batch-size",
            "8",
            "--micro-batch-size",
            "4",
        ),  # a quarter of the demo's, which is enough here
        *("--eval-global-batch-size", "12", "--eval-micro-batch-size", "4", *more),
    ]


def losses(results: list[dict]) -> dict[int, float]:
    return results[-1]["losses"]


def phases(results: list[dict]) -> list[str]:
    """Phases of the start whose seconds the first rank has printed, in their order."""
    said = results[0]["err"].splitlines()
    found = [re.match(r"pretrain_vlm\.py: (.*) \d+\.\d s; ", line) for line in said]
    names = {text: name for name, (text, _) in PHASES.items()}
    assert not any("since the start" in line for result in results[1:] for line in result["err"].splitlines())
    return [names[match[1]] for match in found if match]


@pytest.fixture(scope="module")
def unbroken(pool: Pool, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    save = tmp_path_factory.mktemp("unbroken")
    more = ["--save", str(save), "--save-interval", "3"]
    results = pool.run(2, entry.run, arguments(demo, *more, *PIPELINE))
    results[0]["save"], results[0]["answers"] = save, save / "predictions.jsonl"
    return results


def test_run_ends_with_checkpoint_accuracy_and_answers(unbroken: list[dict]) -> None:
    assert [r["code"] for r in unbroken] == [0, 0]
    assert sorted(losses(unbroken)) == [1, 2, 3, 4, 5, 6]
    assert losses(unbroken)[6] < losses(unbroken)[1]
    assert (unbroken[0]["save"] / "latest_checkpointed_iteration.txt").read_text() == "6"
    ((prefix, values),) = unbroken[-1]["evaluations"]
    assert unbroken[-1]["out"].count("validation at step") == 1
    # Nothing but lines of ours: what Megatron has to say of a good run is filtered.
    said = [line for result in unbroken for line in result["out"].splitlines()]
    ours = (
        "step ",
        "validation: 12 held-out records",
        "validation at step 6 ",
        "finished: step 6, checkpoint ",
        "held-out ",
        "always ",
        "  ",
        "picture: ",
    )
    assert [line for line in said if not line.startswith(ours)] == []
    assert phases(unbroken) == ["imports", "arguments", "groups", "model", "data", "first_step"]
    assert ["left -" in line for line in said if line.startswith("step ")] == [True] + 5 * [False]
    assert "6" in prefix
    rows = [json.loads(line) for line in unbroken[0]["answers"].read_text().splitlines()]
    assert values["accuracy"] == pytest.approx(sum(row["correct"] for row in rows) / len(rows), abs=1e-6)
    assert len({row["key"] for row in rows}) == 12
    assert all(row["question"] and row["expected"] for row in rows)
    with Image.open(unbroken[0]["save"] / "report.png") as picture:
        assert picture.height > 1000  # the curve and six images


def test_same_seed_gives_the_same_losses_bit_for_bit(pool: Pool, demo: Path, unbroken: list[dict]) -> None:
    again = pool.run(2, entry.run, arguments(demo, *PIPELINE))
    assert losses(again) == losses(unbroken)
    assert again[-1]["evaluations"] == unbroken[-1]["evaluations"]
    split = [*ALONE, "--tensor-model-parallel-size", "2"]
    other = pool.run(2, entry.run, arguments(demo, *split, "--seed", "5"))
    assert losses(other)[1] != losses(unbroken)[1]
    assert "held-out answers entirely right" in other[-1]["out"]  # on whichever rank speaks


def test_resumed_run_gives_the_same_losses_bit_for_bit(
    pool: Pool, demo: Path, unbroken: list[dict], tmp_path: Path
) -> None:
    save = tmp_path / "resumed"
    shutil.copytree(unbroken[0]["save"], save)
    shutil.rmtree(save / "iter_0000006")
    (save / "latest_checkpointed_iteration.txt").write_text("3")
    more = ["--load", str(save), "--save", str(tmp_path / "on"), "--save-interval", "6"]
    resumed = pool.run(2, entry.run, arguments(demo, *more, *PIPELINE))
    curve = json.loads((tmp_path / "on" / "curve.json").read_text())["losses"]
    assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6]  # of both starts
    assert losses(resumed) == {step: unbroken[-1]["losses"][step] for step in (4, 5, 6)}
    assert resumed[-1]["evaluations"] == unbroken[-1]["evaluations"]
    assert phases(resumed) == list(PHASES)
    # The one line of the start that has no estimate is that of its first step.
    lines = [line for line in resumed[-1]["out"].splitlines() if line.startswith("step ")]
    assert [re.search(r" left (\S+)", line)[1] == "-" for line in lines] == [True, False, False]  # type: ignore[index]


@pytest.mark.parametrize(
    "more", [[], ["--use-distributed-optimizer"]], ids=["plain", "distributed optimizer"]
)
def test_a_run_is_extended_with_another_schedule(
    pool: Pool, demo: Path, tmp_path: Path, more: list[str]
) -> None:
    save = ["--save", str(tmp_path), "--save-interval", "2", "--auto-resume", *more, *PIPELINE]
    first = ["--train-iters", "2", "--lr-decay-iters", "2", "--lr-warmup-fraction", "0.25"]
    begun = pool.run(2, entry.run, arguments(demo, *save, *first))
    assert [r["code"] for r in begun] == [0, 0], begun[0]["err"]
    longer = ["--train-iters", "5", "--lr-decay-iters", "5", "--lr", "3e-3", "--lr-warmup-fraction", "0.25"]
    extended = pool.run(2, entry.run, arguments(demo, *save, *longer))
    assert [r["code"] for r in extended] == [0, 0], extended[0]["err"]
    assert sorted(losses(extended)) == [3, 4, 5]
    (line,) = [line for line in extended[0]["out"].splitlines() if line.startswith("learning-rate schedule")]
    assert line == (
        "learning-rate schedule, checkpoint -> arguments: --lr 0.001 -> 0.003, samples of warm-up 4.0 -> 10.0, "
        "samples until the learning rate has decayed 16 -> 40; the arguments are used"
    )
    assert not [line for line in begun[0]["out"].splitlines() if line.startswith("learning-rate schedule")]
    # The new schedule is in use, not only said: 3e-3 after 10 of 40 samples of warm-up, then a cosine to 5e-5.
    lines = [re.search(r"step (\d).* lr (\S+)", line) for line in extended[-1]["out"].splitlines()]
    rates = {int(found[1]): float(found[2]) for found in lines if found}
    for step in (3, 4, 5):
        share = (8 * step - 10) / 30
        wanted = 5e-5 + (3e-3 - 5e-5) * (math.cos(math.pi * share) + 1) / 2
        assert rates[step] == pytest.approx(wanted, rel=5e-3), step


def test_a_resumed_run_keeps_the_split_of_its_checkpoint(pool: Pool, demo: Path, tmp_path: Path) -> None:
    """With the distributed optimizer, whose state fits one split alone, and settings that weigh layers otherwise."""

    def train(save: Path, *more: str) -> list[dict]:
        odd = ["--num-layers", "5", "--use-distributed-optimizer", *PIPELINE]
        kept = ["--save", str(save), "--save-interval", "2", "--auto-resume"]
        ends = ["--train-iters", "4", "--lr-decay-iters", "4", "--eval-iters", "0"]
        return pool.run(2, entry.run, arguments(demo, *odd, *kept, *ends, *more))

    # Not the split that would be chosen.
    begun = train(tmp_path / "a", "--pipeline-model-parallel-layout", "Etttt|tL")
    assert [r["code"] for r in begun] == [0, 0], begun[0]["err"]
    moved = tmp_path / "b" / "elsewhere"
    shutil.copytree(tmp_path / "a", moved)
    for save in (tmp_path / "a", moved):
        shutil.rmtree(save / "iter_0000004")
        (save / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = train(tmp_path / "a", "--vision-recompute")
    assert [r["code"] for r in resumed] == [0, 0], resumed[0]["err"]
    assert "5 layers do not divide over 2 pipeline stages: split as in the checkpoint" in resumed[0]["out"]
    assert losses(resumed)[3] == losses(begun)[3]
    # Recompute adds the gradients up in another order: measured 8e-8.
    assert losses(resumed)[4] == pytest.approx(losses(begun)[4], rel=1e-6)
    named = train(tmp_path / "c", "--load", str(moved))
    assert losses(named) == {step: losses(begun)[step] for step in (3, 4)}

    # Another one that is asked for cannot be loaded: one line says so, and the run has failed.
    refused = train(moved, "--pipeline-model-parallel-layout", "Et|ttttL")
    assert [r["code"] for r in refused] == [2, 2]
    said = (
        f"{moved / 'iter_0000002'} does not fit this run, checkpoint -> arguments: "
        "--pipeline-model-parallel-layout 'Etttt|tL' -> 'Et|ttttL': give what it was made with"
    )
    assert said in refused[0]["err"]
    assert "Traceback" not in refused[0]["err"] + refused[1]["err"]
    state = json.loads((moved / "run_state.json").read_text())
    assert state["status"] == "failed"
    assert said in state["reason"]


def test_bad_records_are_skipped_counted_and_listed(pool: Pool, demo: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(demo, data)
    lines = (data / "train.jsonl").read_text().splitlines()
    lines[5] = lines[5][:40]
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    rejects = tmp_path / "rejects.jsonl"
    results = pool.run(1, entry.run, arguments(data, "--rejects-file", str(rejects), *ALONE))
    assert results[0]["code"] == 0
    assert "unusable samples 1" in results[0]["out"]
    (row,) = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert (row["key"], row["cause"]) == ("train.jsonl:6", "malformed_json")
    stopped = pool.run(1, entry.run, arguments(data, "--max-rejects", "0", *ALONE))
    assert stopped[0]["code"] == 2
    assert "malformed_json 1" in stopped[0]["err"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--expand-layer", "4"], "--expand-layer 4 must be between 1 and 3"),
        (["--low-ratio", "0.3"], "--low-ratio 0.3 does not fit"),
        (["--context-parallel-size", "2"], "--context-parallel-size"),
        (["--model-preset", "internvlx_9b"], "--model-preset internvlx_9b: unknown"),
        (["--freeze-vision", "--freeze-llm", "--freeze-projectors"], "nothing is left to train"),
        (["--pipeline-model-parallel-size", "3"], "1 rank cannot be divided into TP 1 x PP 3 = 3"),
        (["--data", "nowhere/meta.json", "--valid-data", "nowhere/meta.json"], "nowhere/meta.json"),
        (["--tokenizer-model", "nowhere"], "nowhere"),
        (["--valid-records", "0"], "--valid-records 0"),
    ],
)
def test_refused_before_anything_is_built(pool: Pool, demo: Path, more: list[str], said: str) -> None:
    (result,) = pool.run(1, entry.run, arguments(demo, *ALONE, *more))
    assert result["code"] == 2
    assert said in result["err"]


def test_empty_data_set_is_refused(pool: Pool, demo: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(demo, data)
    (data / "train.jsonl").write_text("")
    (result,) = pool.run(1, entry.run, arguments(data, *ALONE))
    assert result["code"] == 2
    assert "empty" in result["err"]


def test_a_second_run_with_the_same_save_is_refused(pool: Pool, demo: Path, tmp_path: Path) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from megatron_internvlx.lifecycle.lock import SaveLock; "
    )
    hold += "held = SaveLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(300)"
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        command = arguments(demo, *ALONE, "--save", str(tmp_path), "--auto-resume")
        (refused,) = pool.run(1, entry.run, command)
        assert refused["code"] == 77
        assert f"(pid {other.pid}, since " in refused["err"]
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    finally:
        other.kill()
        other.wait()
    (trained,) = pool.run(1, entry.run, command)
    assert trained["code"] == 0
