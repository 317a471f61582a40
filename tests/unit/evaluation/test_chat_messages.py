"""Prompts as chat messages: the exported template renders them to the same prompt."""

import base64
from pathlib import Path

import pytest

from megatron_internvlx.checkpoint.remote_code import chat_template, load_tokenizer
from megatron_internvlx.data.conversation import TEMPLATES, render_prompt
from megatron_internvlx.evaluation.chat_messages import messages_of, template_messages, with_data
from tests.converting import TOKENIZER

CONVERSATIONS = {
    "one round": [("human", "<image>\nWhat?")],
    "two images": [("system", "Be short."), ("human", "Image-1: <image>\nImage-2: <image>\nWhich?")],
    "rounds": [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "And\n<image>\nhere?")],
    "text": [("human", "Hello"), ("gpt", "Hi\n"), ("human", "Who?")],
    "image last": [("human", "What? <image>\n")],
}


@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize("kind", list(CONVERSATIONS))
def test_there_and_back(template: str, kind: str) -> None:
    form = TEMPLATES[template]
    turns = [
        {"from": role, "value": text.strip() if form.strip else text} for role, text in CONVERSATIONS[kind]
    ]
    if form.strip and kind == "image last":
        pytest.skip("white space around a message is not kept")
    prompt = render_prompt(template, turns, generation_prompt=True)
    images = [f"{number}.png" for number in range(prompt.count("<image>"))]
    messages = messages_of(template, prompt, images)
    rendered = load_tokenizer(TOKENIZER).apply_chat_template(
        template_messages(messages), tokenize=False, add_generation_prompt=True,
        chat_template=chat_template(form),
    )  # fmt: skip
    assert rendered == prompt
    parts = [
        part for message in messages if not isinstance(message["content"], str) for part in message["content"]
    ]
    assert [part["image_url"]["url"] for part in parts if part["type"] == "image_url"] == images


@pytest.mark.parametrize(
    ("text", "images", "why"),
    [
        ("<image><image>\nWhich?", 2, "without a line break"),
        ("<image>\nWhat?", 0, "without an image"),
        ("What?", 1, "1 images are left over"),
    ],
)
def test_what_no_message_gives(text: str, images: int, why: str) -> None:
    prompt = render_prompt("internvl2_5", [{"from": "human", "value": text}], generation_prompt=True)
    with pytest.raises(ValueError, match=why):
        messages_of("internvl2_5", prompt, ["a.png"] * images)
    with pytest.raises(ValueError, match="no header"):
        messages_of("internvl2_5", "Hello<|im_end|>\n", [])
    with pytest.raises(ValueError, match="does not end"):
        messages_of("internvl2_5", "Hello", [])


def test_images_are_sent_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8 bytes")
    prompt = render_prompt("Hermes-2", [{"from": "human", "value": "<image>\nWhat?"}], generation_prompt=True)
    (_, message) = with_data(messages_of("Hermes-2", prompt, [str(tmp_path / "a.jpg")]))
    kind, _, content = message["content"][0]["image_url"]["url"].partition(",")
    assert kind == "data:image/jpeg;base64"
    assert base64.b64decode(content) == b"\xff\xd8 bytes"
    assert message["content"][1] == {"type": "text", "text": "What?"}
