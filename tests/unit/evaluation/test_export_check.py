"""The table of `ivlx check-export`: what is compared, what counts as a difference, what is said of a missing way."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_internvlx.checkpoint.exporter import export_checkpoint
from megatron_internvlx.checkpoint.importer import import_checkpoint
from megatron_internvlx.commands.check_export import WAYS as OFFERED
from megatron_internvlx.commands.check_export import main
from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.evaluation import export_check, local_answers, served_answers
from megatron_internvlx.evaluation.export_check import WAYS, CheckSettings, ExportCheck, check_export, table
from megatron_internvlx.evaluation.local_answers import with_end
from megatron_internvlx.evaluation.served_answers import ServerError, last_line
from tests.converting import FAMILIES, lvtc_config, make_directory


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in `hf`, a directory with released names in `released`, and four questions in meta.json."""
    root = tmp_path_factory.mktemp("check")
    import_checkpoint(
        make_directory(root / "source", lvtc_config(), tokenizer=True), root / "ck", processes=1, quiet=True
    )
    export_checkpoint(root / "ck", root / "hf", processes=1, quiet=True)
    make_directory(root / "released", FAMILIES["llama"], tokenizer=True)
    Image.new("RGB", (40, 20), "red").save(root / "a.png")

    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]

    records = [
        {"image": "a.png", "conversations": turns("<image>\nWhat?", "x", "And?", "y")},
        {"image": ["a.png", "a.png"], "conversations": turns("<image><image>\nWhich?", "z")},
        {"conversations": turns("Hello", "hi")},
    ]
    (root / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "meta.json").write_text(json.dumps({"d": {"root": "", "annotation": "d.jsonl"}}))
    return root


def settings(root: Path, **changes: Any) -> CheckSettings:
    found = CheckSettings(
        root / "hf", root / "meta.json", 100, OFFERED, Path(sys.executable), 2, 4, "float32"
    )
    return replace(found, **changes)


def answers(texts: str, tokens: list[list[int]] | None = None) -> dict[str, Any]:
    ids = tokens or [None] * len(texts.split())
    found = [{"text": text, "tokens": own} for text, own in zip(texts.split(), ids, strict=True)]
    return {
        "answers": found,
        "answer_tokens": 8,
        "seconds": 2.0,
        "peak_bytes": 3_000_000,
        "prompt_tokens": [9] * 4,
    }


IDS = [[1, 2], [1, 3], [4], [5, 2]]


def checked(
    root: Path, tmp_path: Path, given: dict[str, Any], **changes: Any
) -> tuple[ExportCheck, list[Any]]:
    """A check in which `given` stands for the programs: a result or an error for each way."""
    check = check_export(settings(root, **changes), Manifest(root / "meta.json"), tmp_path)

    def answer(way: str, numbers: list[int]) -> dict[str, Any]:
        found = given[way]
        if isinstance(found, Exception):
            raise found
        assert len(found["answers"]) == len(numbers)
        return found

    check._answers = answer  # type: ignore[method-assign, assignment]
    return check, list(check.rows())


def test_equal_answers(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_check, "missing_packages", list)
    given = {
        "evaluate": answers("a b c d", IDS), "generate": answers("a b c d", IDS), "serve": answers("a b d"),
        "vllm": answers("a b d", [IDS[0], IDS[1], IDS[3]]),
    }  # fmt: skip
    _, rows = checked(root, tmp_path, given)
    assert [(row.way, row.equal, row.asked) for row in rows] == [
        ("evaluate", 4, 4), ("generate", 4, 4), ("serve", 3, 3), ("vllm", 3, 3),
    ]  # fmt: skip
    assert all(row.good for row in rows)
    # The third question has two images in one line, which a chat request cannot say.
    assert "1 questions left out" in rows[2].note
    lines = table(rows)
    assert [line[:24].rstrip() for line in lines[1:]] == list(WAYS.values())
    assert "3 / 3" in lines[3] and "4.0" in lines[3] and "3 MB" in lines[3]


def test_differences_are_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_check, "missing_packages", list)
    given = {
        "evaluate": answers("a b c d", IDS), "generate": answers("a b c e", [*IDS[:3], [5, 7]]),
        "serve": answers("a b x"), "vllm": answers("a b d", [[1, 2], [1], [5, 2]]),
    }  # fmt: skip
    _, rows = checked(root, tmp_path, given)
    assert rows[1].difference == "question 3, token 1: 'e' instead of 'd'"
    assert rows[2].difference == "question 3, token 0: 'x' instead of 'd'"
    # The same text with other tokens is a difference too.
    assert rows[3].difference == "question 1, token 1: 'b' instead of 'b'"
    assert [row.good for row in rows] == [True, False, False, False]


def test_ways_that_fail_or_are_missing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_check, "missing_packages", lambda: ["openai"])
    given = {"evaluate": answers("a b c d", IDS), "generate": ServerError("ended with code 1: no memory")}
    _, rows = checked(root, tmp_path, given, vllm_python=None)
    assert [row.good for row in rows] == [True, False, True, True]
    text = "\n".join(table(rows))
    assert "failed: ended with code 1: no memory" in text
    assert "not installed: openai; pip install 'megatron-internvlx[serve]'" in text
    assert "not installed here: --vllm-python" in text
    _, rows = checked(root, tmp_path, {"evaluate": ServerError("x")})
    assert [row.way for row in rows] == ["evaluate"]
    _, rows = checked(
        root, tmp_path, {"evaluate": answers("a b c d", IDS)}, hf=root / "released", ways=("generate",)
    )
    assert "export with --remote-code" in rows[1].note
    _, rows = checked(
        root, tmp_path, {"evaluate": answers("a b c d", IDS)}, hf=root / "released", ways=("vllm",)
    )
    assert "chat template" in rows[1].note


def test_both_local_ways_give_the_same(root: Path, tmp_path: Path) -> None:
    """The programs themselves, in this process; the text of an answer ends where its tokens do."""
    check = check_export(settings(root), Manifest(root / "meta.json"), tmp_path)
    found = []
    for way in ("evaluate", "generate"):
        job = {"way": way, "hf": str(root / "hf"), "dtype": "float32", "max_new_tokens": 6, "batch_size": 3}
        job["questions"] = [{"prompt": q.prompt, "images": list(q.images)} for q in check.asked.questions]
        (tmp_path / "job.json").write_text(json.dumps(job))
        assert local_answers.main([str(tmp_path / "job.json"), str(tmp_path / "out.json")]) == 0
        found.append(json.loads((tmp_path / "out.json").read_text()))
    assert found[0]["answers"] == found[1]["answers"]
    assert len({answer["text"] for answer in found[0]["answers"]}) > 1
    assert found[0]["prompt_tokens"] == found[1]["prompt_tokens"]
    assert found[0]["answer_tokens"] == sum(len(answer["tokens"]) for answer in found[0]["answers"]) > 4
    assert found[0]["peak_bytes"] > 10**8
    assert (with_end([1, 2, 0, 0], {0, 2}), with_end([1, 3], {2})) == ([1, 2], [1, 3])


def test_programs_that_fail(tmp_path: Path) -> None:
    program = "import sys; print('loading'); sys.exit('no such model\\n')"
    with pytest.raises(ServerError, match="ended with code 1: no such model"):
        export_check.run_program([sys.executable, "-c", program], {}, tmp_path, "x")
    good = "import sys, shutil; shutil.copyfile(*sys.argv[1:])"
    assert export_check.run_program([sys.executable, "-c", good], {"a": 1}, tmp_path, "y") == {"a": 1}
    (tmp_path / "empty").write_text("\n \n")
    assert last_line(tmp_path / "empty") == "no output"
    with pytest.raises(ServerError, match="Connection refused"):
        served_answers.ask("http://127.0.0.1:1", "m", [])


def test_mistakes(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = ["--data", str(root / "meta.json")]
    for arguments, why in (
        ([str(tmp_path / "none"), *data], "no such directory"),
        ([str(root / "hf"), "--data", "none.json"], "meta file none.json"),
        ([str(root / "hf"), *data, "--vllm-python", str(root / "meta.json")], "no program that can be run"),
        ([str(root / "hf"), *data, "--json", str(tmp_path)], "a directory, not a file"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("ivlx check-export: ") and why in error


def test_exit_codes_and_the_file(root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(export_check, "missing_packages", lambda: ["openai"])
    results = {"evaluate": answers("a b c d", IDS), "generate": answers("a b c e", IDS)}
    monkeypatch.setattr(ExportCheck, "_answers", lambda self, way, numbers: results[way])
    command = [str(root / "hf"), "--data", str(root / "meta.json"), "--json", str(tmp_path / "check.json")]
    assert main(command) == 1
    assert len(capsys.readouterr().out.splitlines()) == 5
    results["generate"] = results["evaluate"]
    assert main(command) == 0
    assert main([*command, "--ways", "generate"]) == 0
    assert main([*command, "--ways", "generate", "vllm"]) == 1  # named, and not installed: nothing is shown
    assert main(command) == 0
    found = json.loads((tmp_path / "check.json").read_text())
    assert [row["way"] for row in found["rows"]] == list(WAYS)
    assert found["answers"]["generate"] == ["a", "b", "c", "d"]
