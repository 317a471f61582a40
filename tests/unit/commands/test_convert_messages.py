"""OpenAI chat records -> InternVL records, and what is left out."""

import base64
import json

import pytest

from megatron_internvlx.commands import convert_messages
from megatron_internvlx.data.manifest import Manifest

PIXEL = base64.b64encode(b"\x89PNG-not-looked-at").decode()


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text(value):
    return {"type": "text", "text": value}


def image(url):
    return {"type": "image_url", "image_url": {"url": url}}


ANSWER = {"role": "assistant", "content": "A cat."}


def convert(tmp_path, *records):
    source, out = tmp_path / "chat.jsonl", tmp_path / "out" / "train.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    code = convert_messages.main([str(source), str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return code, rows, out


def test_messages_become_conversations(tmp_path):
    system = {"role": "system", "content": "Be short."}
    code, rows, out = convert(
        tmp_path,
        {"id": 7, "messages": [system, user(image("a b.jpg"), text("What is it?")), ANSWER]},
        {"messages": [{"role": "user", "content": "Hello"}, ANSWER]},
        {"messages": [user(text("This"), image(f"data:image/png;base64,{PIXEL}"), image("file:///x%20y.png")), ANSWER]},
    )  # fmt: skip
    assert code == 0
    assert rows[0] == {
        "id": 7,
        "image": ["a b.jpg"],
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A cat."},
        ],
    }
    assert "image" not in rows[1]
    stored, path = rows[2]["image"]
    assert path == "/x y.png"
    assert (out.parent / stored).read_bytes() == b"\x89PNG-not-looked-at"
    assert rows[2]["conversations"][0]["value"] == "This\n<image>\n<image>"
    meta = {"chat": {"root": "", "annotation": "train.jsonl"}}
    (out.parent / "meta.json").write_text(json.dumps(meta))
    assert len(Manifest(out.parent / "meta.json")) == 3


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (None, "must have 'messages'"),
        ([{"role": "tool", "content": "x"}], "role 'tool'"),
        ([{"role": "user", "content": 3}], "must be a text or a list"),
        ([user({"type": "input_audio"})], "type 'input_audio'"),
        ([user(image("https://example.org/a.jpg"))], "download it"),
        ([user(image("data:image/png;base64,###"))], "base64"),
        ([user(image(""))], "without a URL"),
        ([user(text("an <image> here"))], "reserved for images"),
        ([{"role": "user", "content": "\ud800"}], "surrogates not allowed"),
    ],
)
def test_what_cannot_be_used_is_named_and_left_out(tmp_path, capsys, messages, said):
    good = {"messages": [{"role": "user", "content": "Hello"}, ANSWER]}
    code, rows, _ = convert(tmp_path, good, {"messages": messages})
    assert (code, len(rows)) == (0, 1)
    message = capsys.readouterr().err
    assert said in message
    assert "chat.jsonl:2" in message


def test_nothing_is_written_where_nothing_can_be_converted(tmp_path, capsys):
    code, _, out = convert(tmp_path, {"messages": "none"})
    assert code == 2
    assert not list(out.parent.iterdir())
    assert convert_messages.main([str(tmp_path / "nowhere.jsonl"), str(out)]) == 2
    assert "no such file" in capsys.readouterr().err
