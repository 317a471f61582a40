"""The terminal: commands, mistakes, pipes, Ctrl-C; and the program with an export and with a checkpoint."""

import io
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_internvlx.chat import terminal as terminals
from megatron_internvlx.chat.conversation import Conversation
from megatron_internvlx.chat.pictures import read_picture
from megatron_internvlx.chat.session import Chat
from megatron_internvlx.chat.terminal import Terminal, chat_by_lines, chat_by_prompt
from megatron_internvlx.commands.chat import main
from tests.unit.chat.conftest import SAMPLING

SHORT = replace(SAMPLING, max_new_tokens=2)


def make(chat: Chat, *, interactive: bool = False) -> tuple[Terminal, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Terminal(chat, SHORT, out=out, err=err, interactive=interactive), out, err


def test_commands(chat: Chat, photo: Path, tmp_path: Path) -> None:
    it, out, err = make(chat, interactive=True)

    def say(line: str) -> str:
        out.seek(0)
        out.truncate()
        assert it.run_line(line)
        return out.getvalue()

    assert say(f"/image {photo}") == "my photo.png: 40 x 20 pixels, 2 x 1 grid and a thumbnail: 3 tiles\n"
    drawn = say("/tiles")
    assert "│ 1  │ 2  │  │ 3  │ thumbnail" in drawn
    assert "3 visual tokens before layer 1, 12 visual tokens from there on" in drawn
    assert say("What is this?").splitlines()[-1].startswith("3 tiles, 3 -> 12 visual tokens | ")
    assert "tokens/s" in say("And why?")
    assert say("/undo") == "taken back: And why?\n"
    assert say(f"/save {tmp_path / 'chat.jsonl'}").endswith("chat.jsonl: 1 record\n")
    assert json.loads((tmp_path / "chat.jsonl").read_text())["image"] == [str(photo)]
    assert say("/system Be brief.") == "system text: Be brief.\n"
    assert say("/system default").endswith("(default)\n")
    assert say("/undo").endswith("What is this? (1 picture waiting again; /drop forgets them)\n")
    assert say("/drop") == "1 picture forgotten\n"
    assert say("/drop") == "no picture waits for a question\n"
    assert say("/reset") == "a new conversation\n"
    assert say("/tiles").startswith("no picture yet")
    assert "/save FILE.jsonl" in say("/help")
    assert say("") == ""
    assert not err.getvalue()
    assert not it.run_line("/quit")


def test_a_mistake_is_one_line_and_the_chat_continues(chat: Chat, tmp_path: Path) -> None:
    it, out, err = make(chat)
    lines = [
        "/nothing", "/image", "/image none.png", "What is none.png?", "/save", "/undo", "/system <image>",
        "word " * 300, "a <|im_end|> b", "~nouser/x.png", "/image ~no\0user", f"{'x' * 300}.png what?",
        f"/{'x' * 300}", f"/image /{'x' * 300}.png", "file://[x.png", "/save ~nouser/a.jsonl", "Hello",
        f"/save {tmp_path}/two words.jsonl", f"/save {tmp_path}/a\0b", f"/save {tmp_path}/{'x' * 300}",
    ]  # fmt: skip
    chat_by_lines(it, iter(lines))
    told = err.getvalue().splitlines()
    assert len(told) == it.mistakes == len(lines) - 1
    assert not list(tmp_path.iterdir())
    assert told[0].startswith("/nothing: no such command; there are /image, ")
    assert "too long for the model" in told[7]
    assert len(it.conversation.turns) == 1
    assert out.getvalue() == it.conversation.turns[0].answer + "\n"


def test_a_path_alone_waits_for_a_question(chat: Chat, photo: Path) -> None:
    it, _, _ = make(chat)
    it.run_line(f"'{photo}'")
    assert len(it.conversation.waiting) == 1
    it.run_line(f"{photo} " + "word " * 300)
    assert len(it.conversation.waiting) == 1, "a question that fails leaves no picture behind"
    it.run_line(f"{photo} Same?")
    assert len(it.conversation.turns[0].pictures) == 2


class Interrupting(io.StringIO):
    """A terminal at which Ctrl-C is pressed when text appears, `count` times."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count

    def write(self, text: str) -> int:
        while self.left:
            self.left -= 1
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_an_answer_and_a_second_one_ends(chat: Chat) -> None:
    it = Terminal(chat, SAMPLING, out=Interrupting(1), interactive=True)
    assert it.ask("Hello").figures.ended == "stopped"
    assert len(it.conversation.turns) == 1
    it = Terminal(chat, SAMPLING, out=Interrupting(2), interactive=True)
    with pytest.raises(KeyboardInterrupt):
        it.run_line("Hello")
    assert not it.conversation.turns
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_prompt_ends_at_ctrl_d_or_ctrl_c_twice(chat: Chat, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(terminals, "history_file", lambda: tmp_path / "state" / "history")
    monkeypatch.setattr(terminals.atexit, "register", lambda save: None)

    def typed(*answers: str | type[BaseException]) -> int:
        left = list(answers)

        def read(_prompt: str) -> str:
            answer = left.pop(0)
            if isinstance(answer, str):
                return answer
            raise answer

        monkeypatch.setattr("builtins.input", read)
        it, _, _ = make(chat, interactive=True)
        chat_by_prompt(it)
        return len(left)

    assert typed("/help", EOFError) == 0
    assert typed(KeyboardInterrupt, "/help", KeyboardInterrupt, KeyboardInterrupt) == 0
    assert "Ctrl-C once more" in capsys.readouterr().out
    assert typed("/quit", "unread") == 1


# ------------------------------------------------------------------------------------- program


def asked(capsys: pytest.CaptureFixture, *words: str | Path) -> str:
    assert main([*map(str, words), "--max-new-tokens", "8"]) == 0
    return capsys.readouterr().out


def test_one_question_of_an_export_and_of_its_checkpoint(
    chat: Chat, exported: Path, photo: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    expected = chat.ask(Conversation(waiting=[read_picture(photo)]), "What?", SAMPLING).text
    question = ("--ask", "What?", "--image", photo)
    assert asked(capsys, exported, *question) == expected + "\n"
    row = json.loads(asked(capsys, exported, *question, "--json"))
    assert (row["answer"], row["deep_tokens"], row["images"][0]["cols"]) == (expected, 12, 2)
    assert json.loads(asked(capsys, exported, *question, "--json", "--max-tiles", "1"))["tiles"] == 1
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert asked(capsys, exported.parent / "ck", *question) == expected + "\n"
    assert not list((tmp_path / "temporary").iterdir())


def test_a_picture_of_an_unknown_user(exported: Path, capsys) -> None:
    assert main([str(exported), "--ask", "What?", "--image", "~nouser/x.png"]) == 2
    assert "no user nouser with a home directory" in capsys.readouterr().err


def test_a_checkpoint_without_its_tokenizer(exported: Path, tmp_path: Path, capsys) -> None:
    checkpoint = Path(shutil.copytree(exported.parent / "ck", tmp_path / "ck"))
    shutil.rmtree(checkpoint / "hf")
    assert main([str(checkpoint), "--ask", "What?"]) == 2
    assert "set --tokenizer-model to the tokenizer's directory" in capsys.readouterr().err
    kept = tmp_path / "kept"
    asked(capsys, checkpoint, "--ask", "What?", "--tokenizer-model", exported, "--keep", kept)
    assert (kept / "modeling_internvlx.py").is_file()
    assert main([str(checkpoint), "--ask", "What?", "--iteration", "7"]) == 2
    assert "iter_0000007: no such directory" in capsys.readouterr().err


def test_lines_of_a_pipe(exported: Path, photo: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {photo}\nWhat?\nWhy?\nnone.png?\n"))
    assert main([str(exported), "--max-new-tokens", "2", "--json"]) == 2
    found = capsys.readouterr()
    assert [json.loads(line)["question"] for line in found.out.splitlines()] == ["What?", "Why?"]
    assert "none.png: no such file" in found.err


def test_a_terminal_gets_the_prompt(exported: Path, monkeypatch, tmp_path: Path, capsys) -> None:
    typed = iter(["Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(typed))
    monkeypatch.setattr(terminals, "_keep_history", lambda: None)
    monkeypatch.setattr(sys, "stdin", Keyboard())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main([str(exported), "--max-new-tokens", "2"]) == 0
    shown = capsys.readouterr().out
    assert "1 visual tokens per tile in layers 0-0, 4 in layers 1-3" in shown
    assert "/help lists the commands" in shown
    assert "prompt + 2 answer tokens" in shown


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True
