"""Messages of harnesses become the turns that training has: text, images and their order."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.evaluation.answers import questions
from megatron_internvlx.evaluation.generation import Sampling, answer_prompt
from megatron_internvlx.harness.answering import ExportAnswerer, sampling_of
from megatron_internvlx.harness.local_task import (
    TASK,
    doc_to_messages,
    local_messages,
    local_rows,
    process_results,
    write_task,
)
from megatron_internvlx.harness.messages import (
    ASK_LETTER,
    ASK_SHORT,
    chat_parts,
    choice_prompt,
    grouped_messages,
    training_turns,
)

A, B = Path("a.png"), Path("b.png")


def human(*parts: str | Path) -> str:
    """Text of one user's message of these parts."""
    (turn,), images = training_turns([("user", parts)])
    assert images == [part for part in parts if isinstance(part, Path)]
    return turn["value"]


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("Hello",), "Hello"),
        (("Hello", "there"), "Hello\nthere"),
        ((A, "What?"), "<image>\nWhat?"),
        (("What?", A), "What?\n<image>"),
        ((A, B, "Which?"), "Image-1: <image>\nImage-2: <image>\nWhich?"),
        (("Is", A, "like", B), "Is\nImage-1: <image>\nlike\nImage-2: <image>"),
        ((A, "<image>What?"), "<image>What?"),
        ((A, B, "<image><image>Which?"), "<image><image>Which?"),
        # Text that only looks like a placeholder; it must not take the image of another.
        (("What is <image>?",), "What is image?"),
        ((A, "What is <image> and <image>?"), "<image>\nWhat is image and image?"),
    ],
)
def test_one_message(parts: tuple, text: str) -> None:
    assert human(*parts) == text


def test_images_are_numbered_through_the_conversation() -> None:
    turns, images = training_turns(
        [("user", [A, "First?"]), ("assistant", ["yes"]), ("user", [B, "Second?"])]
    )
    assert [turn["value"] for turn in turns] == [
        "Image-1: <image>\nFirst?",
        "yes",
        "Image-2: <image>\nSecond?",
    ]
    assert [turn["from"] for turn in turns] == ["human", "gpt", "human"]
    assert images == [A, B]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (("tool", ["x"]), "role 'tool' must be one of system, user, assistant"),
        (("assistant", [A]), "has an image"),
    ],
)
def test_messages_that_training_does_not_have(message: tuple, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        training_turns([message])


def test_parts_of_lmms_eval() -> None:
    picture = Image.new("RGB", (2, 2))
    content = [
        {"type": "image", "url": picture},
        {"type": "image", "url": "b.png"},
        {"type": "text", "text": "x"},
    ]
    assert chat_parts(content) == [picture, B, "x"]
    assert chat_parts("x") == ["x"]
    with pytest.raises(ValueError, match="the task has video"):
        chat_parts([{"type": "video", "url": "v.mp4"}])


def test_items_of_vlmevalkit() -> None:
    items = [
        {"type": "text", "value": "Be short.", "role": "system"},
        {"type": "image", "value": "a.png"},
        {"type": "text", "value": "What?"},
    ]
    assert grouped_messages(items) == [("system", ["Be short."]), ("user", [A, "What?"])]
    with pytest.raises(ValueError, match="the data set has video"):
        grouped_messages([{"type": "video", "value": "v.mp4"}])


def test_choice_prompt() -> None:
    line = {
        "question": "Which?",
        "hint": float("nan"),
        "A": "red",
        "B": "blue",
        "C": float("nan"),
        "index": 1,
    }
    assert choice_prompt(line) == f"Which?\nA. red\nB. blue\n{ASK_LETTER}"
    assert choice_prompt({"question": "Which?", "hint": "Look."}) == f"Look.\nWhich?\n{ASK_SHORT}"


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ({}, Sampling(1024)),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": None, "num_beams": 1}, Sampling(16)),
        ({"do_sample": False, "temperature": 0.7}, Sampling(1024)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, Sampling(1024, temperature=0.7, top_p=0.9)),
        ({"do_sample": True}, Sampling(1024, temperature=1.0)),
        ({"until": ["\n\n"]}, Sampling(1024)),
    ],
)
def test_sampling(settings: dict, sampling: Sampling) -> None:
    assert sampling_of(settings) == sampling


def test_beam_search_is_refused() -> None:
    with pytest.raises(ValueError, match="num_beams 3 must be 1"):
        sampling_of({"num_beams": 3})


def test_settings_are_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype 'int8' must be one of float32, bfloat16, float16"):
        ExportAnswerer(tmp_path, "int8")
    with pytest.raises(ValueError, match="no such directory"):
        ExportAnswerer(tmp_path / "none")


TEMPLATES = ["internvl2_5", "Hermes-2", "internlm2-chat"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_local_task_asks_the_prompts_of_evaluate(tmp_path: Path, template: str) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)

    def turn(role: str, value: str) -> dict[str, str]:
        return {"from": role, "value": value}

    records = [
        {
            "image": ["a.png", "b.png"],
            "conversations": [
                turn("system", "Answer with one word."),
                turn("human", "Image-1: <image>\nWhat?"),
                turn("gpt", " cat "),
                turn("human", "<image>And this?"),
                turn("gpt", "dog"),
            ],
        },
        {
            "conversations": [turn("human", "Hello\n"), turn("gpt", "hi")],
            "answers": ["hi", "hello"],
            "metric": "anls",
        },
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"root": "", "annotation": "d.jsonl"}}))
    asked = list(questions(Manifest(tmp_path / "meta.json"), template))
    write_task(tmp_path / "task", local_rows(asked), 8)
    rows = [json.loads(line) for line in (tmp_path / "task" / f"{TASK}.jsonl").read_text().splitlines()]
    for question, row in zip(asked, rows, strict=True):
        for messages in (
            local_messages(row),
            [(one["role"], chat_parts(one["content"])) for one in doc_to_messages(row)],
        ):
            turns, images = training_turns(messages)
            assert answer_prompt(template, turns) == question.prompt
            paths = [getattr(image, "filename", image) for image in images]
            assert [str(path) for path in paths] == list(question.images)
    assert len(rows[1]["images"]) == 2
    assert process_results(rows[2], ["hello"]) == {"score": 1.0}
    task = (tmp_path / "task" / f"{TASK}.yaml").read_text()
    assert f'test: "{tmp_path}/task/{TASK}.jsonl"' in task
    assert 'doc_to_text: "{{question}}"' in task
