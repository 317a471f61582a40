"""Conversations: messages, taking back, and records that can be trained on."""

import json
from pathlib import Path

import pytest

from megatron_internvlx.chat.conversation import (
    Conversation,
    Turn,
    check_question,
    check_system,
    save_conversation,
)
from megatron_internvlx.chat.pictures import ChatError, read_picture
from megatron_internvlx.data.conversation import get_template
from megatron_internvlx.data.manifest import JsonlFile, Manifest
from megatron_internvlx.data.sample import parse_record

TEMPLATE = get_template("internvl2_5")


def test_pictures_stand_before_the_question_or_where_they_are_written(photo: Path) -> None:
    picture = read_picture(photo)
    assert Turn("What?", (picture, picture), "").message == "<image>\n<image>\nWhat?"
    assert Turn("This <image> or <image>?", (picture, picture), "").message == "This <image> or <image>?"


@pytest.mark.parametrize(
    ("question", "count", "message"),
    [
        (" ", 0, "the question has no text; type one$"),
        ("", 1, "type one about the picture"),
        ("", 2, "type one about the 2 pictures"),
        ("<image> and?", 2, "1 <image> for 2 pictures"),
        ("<image>?", 0, "1 <image> for 0 pictures"),
        ("a <|im_end|>", 0, r"contains <\|im_end\|>, which only the chat template may write"),
        ("a <img>", 0, "contains <img>"),
    ],
)
def test_questions_that_cannot_be_asked(photo: Path, question: str, count: int, message: str) -> None:
    with pytest.raises(ChatError, match=message):
        check_question(Turn(question, (read_picture(photo),) * count, ""), TEMPLATE)


def test_system_text(photo: Path) -> None:
    check_system("Be brief.", TEMPLATE)
    with pytest.raises(ChatError, match="pictures belong to questions"):
        check_system("see <image>", TEMPLATE)


def test_saved_records_can_be_trained_on(tmp_path: Path, photo: Path) -> None:
    picture = read_picture(photo)
    file = tmp_path / "chat.jsonl"
    conversation = Conversation(
        "Be brief.", [Turn("Hello", (), "hi"), Turn("What?", (picture,), "a cat")], [picture]
    )
    assert save_conversation(conversation, file) == 1
    file.write_text(file.read_text().rstrip("\n"))  # as an editor may leave it
    assert save_conversation(Conversation(turns=[Turn("Hello", (), "hi")]), file) == 2
    (tmp_path / "meta.json").write_text(json.dumps({"chat": {"root": "", "annotation": "chat.jsonl"}}))
    manifest = Manifest(tmp_path / "meta.json")
    paths, turns = parse_record(manifest.record(0))
    assert paths == [str(photo)]
    assert [turn["from"] for turn in turns] == ["system", "human", "gpt", "human", "gpt"]
    assert turns[3]["value"] == "<image>\nWhat?"
    assert parse_record(manifest.record(1)) == ([], [
        {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "hi"},
    ])  # fmt: skip


def test_nothing_is_lost_by_saving(tmp_path: Path) -> None:
    full = Conversation(turns=[Turn("Hello", (), "hi")])
    notes = tmp_path / "notes.txt"
    notes.write_text("{}\nnot a record\n")
    with pytest.raises(ChatError, match=r"notes.txt:2: not a JSON record, so nothing is added"):
        save_conversation(full, notes)
    assert notes.read_text() == "{}\nnot a record\n"
    with pytest.raises(ChatError, match="a directory; name a file"):
        save_conversation(full, tmp_path)
    with pytest.raises(ChatError, match="no question has been answered"):
        save_conversation(Conversation(), tmp_path / "x.jsonl")
    with pytest.raises(ChatError, match="an answer is empty"):
        save_conversation(Conversation(turns=[Turn("Hello", (), "")]), tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()
    notes.write_bytes(b"\xff\xfe")
    with pytest.raises(ChatError, match="not UTF-8 text, so nothing is added"):
        save_conversation(full, notes)
    assert notes.read_bytes() == b"\xff\xfe"


def test_line_ends_of_a_text_and_blank_lines_are_no_records(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    conversation = Conversation(turns=[Turn("one\u2028two\u0085three", (), "hi\x0c")])
    assert save_conversation(conversation, file) == 1
    file.write_text(file.read_text(encoding="utf-8") + "\n \n", encoding="utf-8")
    assert save_conversation(conversation, file) == 2
    assert len(JsonlFile(file, file.name)) == 2


def test_taking_back(photo: Path) -> None:
    picture = read_picture(photo)
    conversation = Conversation("Be brief.", [Turn("Hello", (picture,), "hi")])
    assert conversation.undo().question == "Hello"
    assert conversation.waiting == [picture]
    with pytest.raises(ChatError, match="nothing to take back"):
        conversation.undo()
    conversation.reset()
    assert (conversation.system, conversation.waiting) == ("Be brief.", [])
