"""Scores against values worked out by hand, and the tool on a tiny model from questions to page."""

import errno
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_internvlx.checkpoint.exporter import export_checkpoint
from megatron_internvlx.checkpoint.importer import import_checkpoint
from megatron_internvlx.commands.evaluate import main
from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.evaluation import run
from megatron_internvlx.evaluation.answers import Answerer, Question, questions, summarize_scores
from megatron_internvlx.evaluation.generation import Generator
from megatron_internvlx.evaluation.page import write_page
from megatron_internvlx.evaluation.scores import anls, edit_distance, exact_match, relaxed_accuracy
from megatron_internvlx.reporting.picture import read_predictions
from tests.converting import FAMILIES, lvtc_config, make_directory


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)]
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("expected", "given", "score"),
    [("Blue", " blue ", 1.0), ("blue", "blur", 0.75), ("ab", "xb", 0.0), ("", "", 1.0), ("a  b", "a b", 1.0)],
)
def test_anls(expected: str, given: str, score: float) -> None:
    assert anls(expected, given) == score


@pytest.mark.parametrize(
    ("expected", "given", "right"),
    [
        ("100", "105", True),
        ("100", "106", False),
        ("-100", "-95", True),
        ("50%", "0.51", True),
        ("1,000", "1000", True),
        ("0", "0.01", False),
        ("Paris", "paris", True),
        ("Paris", "100", False),
    ],
)
def test_relaxed_accuracy(expected: str, given: str, right: bool) -> None:
    assert relaxed_accuracy(expected, given) is right


def test_exact_match_minds_case() -> None:
    assert exact_match("a", " a\n")
    assert not exact_match("a", "A")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """meta.json of three records: one image, two rounds; two images; none."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    for name, size in (("a.png", (20, 40, 3)), ("b.png", (16, 16, 3))):
        Image.fromarray(rng.integers(0, 256, size).astype(np.uint8)).save(root / name)

    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]

    records = [
        {"image": "a.png", "kind": "one", "conversations": turns("What?", "x", "And <now>?", "y & z")},
        {"image": ["a.png", "b.png"], "conversations": turns("<image><image>Which?", "first")},
        {"kind": "text", "conversations": turns("Hello", "hi")},
    ]
    (root / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "meta.json").write_text(json.dumps({"d": {"root": "", "annotation": "d.jsonl"}}))
    return root / "meta.json"


@pytest.mark.parametrize("kind", ["lvtc", "released"])
def test_the_tool(data: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture) -> None:
    config = lvtc_config() if kind == "lvtc" else FAMILIES["llama"]
    hf = make_directory(tmp_path / "hf", config, tokenizer=True)
    if kind == "lvtc":
        import_checkpoint(hf, tmp_path / "ck", quiet=True)
        hf = tmp_path / "exported"
        export_checkpoint(tmp_path / "ck", hf, quiet=True)
    out = tmp_path / "out"
    command = ["--hf", str(hf), "--data", str(data), "--out", str(out), "--max-new-tokens", "3"]
    assert main([*command, "--batch-size", "3"]) == 0
    rows = read_predictions(out / "predictions.jsonl")
    assert [row.question for row in rows] == ["What?", "And <now>?", "Which?", "Hello"]
    assert [row.cols * row.rows for row in rows] == [2, 2, 2, 0]
    assert [row.expected for row in rows] == ["x", "y & z", "first", "hi"]
    page = (out / "page.html").read_text()
    assert page.count("data:image/jpeg") == 4
    assert "And &lt;now&gt;?" in page
    scores = json.loads((out / "scores.json").read_text())
    assert scores["answers"] == 4
    # Answers have 1 to 3 tokens.
    assert 4 <= scores["tokens"] <= 12
    # Seconds have three digits behind the point.
    assert scores["tokens"] / scores["tokens_per_second"] == pytest.approx(scores["seconds"], abs=6e-4)
    assert "exact match" in capsys.readouterr().out
    one_by_one = tmp_path / "single"
    command[command.index(str(out))] = str(one_by_one)
    assert main([*command, "--batch-size", "1"]) == 0
    assert [r.given for r in read_predictions(one_by_one / "predictions.jsonl")] == [r.given for r in rows]


def test_mistakes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hf = make_directory(tmp_path / "hf", FAMILIES["llama"])
    assert main(["--hf", str(hf), "--data", str(tmp_path / "none.json")]) == 2
    assert "meta file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--hf", str(tmp_path), "--data", str(data), "--limit", "0"])
    assert "'0' must be a whole number of at least 1" in capsys.readouterr().err


def test_missing_images_are_told_before_answers_are_generated(data: Path, tmp_path: Path, capsys) -> None:
    held = Path(shutil.copytree(data.parent, tmp_path / "data"))
    (held / "b.png").unlink()
    hf = make_directory(tmp_path / "hf", FAMILIES["llama"], tokenizer=True)
    command = ["--hf", str(hf), "--data", str(held / "meta.json"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert f"no such file: {held}/b.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_answers_and_no_half_page(
    data: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    def full(path: Path, *_: Any) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "write_page", full)
    hf = make_directory(tmp_path / "hf", FAMILIES["llama"], tokenizer=True)
    command = ["--hf", str(hf), "--data", str(data), "--out", str(tmp_path / "out"), "--max-new-tokens", "1"]
    assert main(command) == 2
    assert "No space left" in capsys.readouterr().err
    (left,) = (tmp_path / "out").iterdir()
    assert left.name == "predictions.jsonl.partial" and len(left.read_text().splitlines()) == 4


def test_a_broken_image_does_not_take_the_answers_before_it(data: Path, tmp_path: Path, capsys) -> None:
    held = Path(shutil.copytree(data.parent, tmp_path / "data"))
    lines = (held / "d.jsonl").read_text().splitlines()
    (held / "d.jsonl").write_text("\n".join([lines[2], lines[1]]) + "\n")
    (held / "b.png").write_bytes((held / "b.png").read_bytes()[:700])
    hf = make_directory(tmp_path / "hf", FAMILIES["llama"], tokenizer=True)
    out = tmp_path / "out"
    command = ["--hf", str(hf), "--data", str(held / "meta.json"), "--out", str(out), "--max-new-tokens", "1"]
    assert main([*command, "--batch-size", "1"]) == 2
    assert f"1 of 2 answers are in {out}/predictions.jsonl.partial" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["predictions.jsonl.partial"]


def test_kinds_of_a_conversation_are_those_of_its_answers(tmp_path: Path) -> None:
    turns = [{"from": ("human", "gpt")[i % 2], "value": str(i)} for i in range(6)]
    record = {"kind": "rounds", "kinds": ["shape", "colour"], "conversations": turns}
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"root": "", "annotation": "d.jsonl"}}))
    found = questions(Manifest(tmp_path / "meta.json"), "internvl2_5")
    assert [question.kind for question in found] == ["shape", "colour", "colour"]


def asked(tmp_path: Path, record: dict, metric: str | None = None) -> list[Question]:
    """Questions of a data set of one record."""
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"root": "", "annotation": "d.jsonl"}}))
    return list(questions(Manifest(tmp_path / "meta.json"), "internvl2_5", None, metric))


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_references_and_metric_of_a_record(tmp_path: Path) -> None:
    record = {
        "conversations": turns("What?", "cat"),
        "answers": ["cat", "a cat", "dog"],
        "metric": "vqa_accuracy",
    }
    (one,) = asked(tmp_path, record)
    assert (one.expected, one.compared, one.metric) == ("cat", ("cat", "a cat", "dog"), "vqa_accuracy")
    assert asked(tmp_path, record, "anls")[0].metric == "anls"
    both = {"conversations": turns("What?", "cat", "And?", "2"), "answers": [["cat"], ["2", "two"]]}
    assert [question.compared for question in asked(tmp_path, both)] == [("cat",), ("2", "two")]
    assert asked(tmp_path, {"conversations": turns("What?", "cat")})[0].compared == ("cat",)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"answers": "cat"}, "'answers' must be a list of texts for one gpt turn"),
        ({"answers": []}, "'answers' must be"),
        ({"answers": [["cat"], ["dog"]]}, "one for each of the 1 gpt turns"),
        ({"answers": ["cat", 2]}, "'answers' must be"),
        ({"metric": "bleu"}, "unknown metric 'bleu'; it must be one of exact_match"),
        ({"metric": ["anls"]}, "d.jsonl:1: bad_message"),
        ({"metric": "yes_no"}, "needs yes or no as the expected answer, found 'cat'"),
    ],
)
def test_answers_that_cannot_be_scored(tmp_path: Path, keys: dict, message: str) -> None:
    with pytest.raises(BadSample, match=re.escape(message)):
        asked(tmp_path, {"conversations": turns("What?", "cat")} | keys)


def test_scores_and_page_of_partly_right_answers(tmp_path: Path) -> None:
    record = {"conversations": turns("What?", "cat"), "answers": ["cat"] * 2 + ["lynx"] * 8, "kind": "animal"}
    (question,) = asked(tmp_path, record, "vqa_accuracy")
    answerer = Answerer(None, None, 1)  # type: ignore[arg-type]  # the model is not asked
    rows = [answerer.prediction_row(question, given) for given in ("lynx", "a cat", "dog")]
    assert [row["score"] for row in rows] == pytest.approx([1.0, 0.6, 0.0])
    assert [row["correct"] for row in rows] == [True, True, False]
    scores = summarize_scores(rows) | {"tokens_per_second": 12.0}
    assert scores["metrics"] == {"vqa_accuracy": {"answers": 3, "score": pytest.approx(1.6 / 3)}}
    assert scores["by_kind"] == {"animal": [2, 3]}
    assert scores["score_by_kind"] == {"animal": pytest.approx(1.6 / 3)}
    assert scores["exact_match"] == pytest.approx(1 / 3)
    write_page(tmp_path / "page.html", "title", scores, rows, most=2)
    page = (tmp_path / "page.html").read_text()
    assert page.index("dog") < page.index("a cat")
    assert "expected: cat / lynx" in page
    assert "vqa_accuracy 0.60" in page
    assert "12 tokens/s, 1 of the best left out" in page


@pytest.mark.parametrize(
    ("ends", "count"),
    [(7, 3 + 1 + 4), ([7, 9], 2 + 1 + 2), (None, 12)],
)
def test_tokens_are_counted_up_to_the_end_of_each_answer(ends: int | list[int] | None, count: int) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends))
    new = torch.tensor([[1, 9, 7, 7], [7, 0, 0, 0], [1, 9, 2, 3]])
    assert Generator(model, None).count_tokens(new) == count  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "cut.png", "conversations": []}, "no record has an answer"),
        ({"image": "cut.png"}, "cut.png: truncated_image"),
        (
            {"image": ["a.png", "b.png"]},
            "d.jsonl:1: placeholder_mismatch: 1 <image> placeholders for 2 images",
        ),
        ({"image": []}, "d.jsonl:1: placeholder_mismatch: 1 <image> placeholders for 0 images"),
        (
            {"image": "a.png", "conversations": [{"from": "user", "value": "<image>"}]},
            "d.jsonl:1: bad_message",
        ),
    ],
)
def test_records_that_cannot_be_asked(data: Path, tmp_path: Path, capsys, record: dict, message: str) -> None:
    """Named by the record or the image, also when only decoding shows it."""
    held = Path(shutil.copytree(data.parent, tmp_path / "data"))
    (held / "cut.png").write_bytes((held / "a.png").read_bytes()[:1200])
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "x"}]
    if record.get("conversations") == []:
        record = record | {"conversations": turns[:1]}
    (held / "d.jsonl").write_text(json.dumps({"conversations": turns} | record) + "\n")
    hf = make_directory(tmp_path / "hf", FAMILIES["llama"], tokenizer=True)
    command = ["--hf", str(hf), "--data", str(held / "meta.json"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
