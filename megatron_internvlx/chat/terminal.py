"""Chat in a terminal, by lines of a pipe, or with one question."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron_internvlx.chat.conversation import Conversation, check_system, save_conversation
from megatron_internvlx.chat.line import split_line, split_paths
from megatron_internvlx.chat.pictures import ChatError, describe_cut, draw_cut, read_picture
from megatron_internvlx.chat.session import Answer, Chat
from megatron_internvlx.evaluation.generation import Sampling

HELP = """\
Type a question. Pictures are named by path, in the line or before it:
  What is this? ~/photos/cat.jpg        a path in the line; quotes for spaces
  /image PATH [PATH ...]                pictures for the next question
  /drop                                 forget pictures that wait for a question
  /tiles                                how the last picture is cut
  /system [TEXT | default]              show or set the system text
  /undo                                 take the last question back; its pictures wait
  /reset                                start anew
  /save FILE.jsonl                      add the conversation to a training file
  /help, /quit                          this text; end (or Ctrl-D)
Ctrl-C stops an answer; a second one ends the chat."""
HISTORY_LINES = 1000


class Terminal:
    """A chat by lines: each is a question or a command.

    Args:
        chat: the loaded model.
        sampling: length of answers and choice of their tokens.
        out: receives the answers.
        err: receives notes and mistakes.
        interactive: whether answers are streamed, and followed by their figures.
        as_json: whether an answer is a line of JSON with its figures.
    """

    def __init__(
        self,
        chat: Chat,
        sampling: Sampling,
        *,
        out: TextIO | None = None,
        err: TextIO | None = None,
        interactive: bool = False,
        as_json: bool = False,
    ) -> None:
        self.chat, self.sampling = chat, sampling
        self.out, self.err = out or sys.stdout, err or sys.stderr
        self.interactive, self.as_json = interactive, as_json
        self.conversation = Conversation()
        self.mistakes = 0
        self._dim = interactive and self.out.isatty() and "NO_COLOR" not in os.environ
        self._commands: dict[str, Callable[[str], None]] = {
            "image": self._image, "drop": self._drop, "tiles": self._tiles, "system": self._system, "undo": self._undo,
            "reset": self._reset, "save": self._save, "help": self._help,
        }  # fmt: skip

    def run_line(self, line: str) -> bool:
        """Run a line; returns False if it ends the chat. A mistake is told in one line."""
        line = line.strip()
        if not line:
            return True
        if line in ("/quit", "/exit", "/q"):
            return False
        try:
            name, _, rest = line[1:].partition(" ")
            # A path begins with a slash too, and has another one.
            if line[0] == "/" and name.isalpha() and not Path(line.split()[0]).exists():
                if name not in self._commands:
                    known = ", ".join(f"/{command}" for command in (*self._commands, "quit"))
                    raise ChatError(f"/{name}: no such command; there are {known}")
                self._commands[name](rest.strip())
            else:
                self._ask(line)
        except ChatError as error:
            self._tell_mistake(str(error))
        except OSError as error:
            self._tell_mistake(f"{error.filename or line[:80]}: {error.strerror or error}")
        except (RuntimeError, ValueError) as error:  # such as a text or a path that has no bytes in UTF-8
            self._tell_mistake(f"this cannot be done: {type(error).__name__}: {error}")
        return True

    def _tell_mistake(self, text: str) -> None:
        self.mistakes += 1
        self._tell(" ".join(text.splitlines()))

    def ask(self, question: str) -> Answer:
        """Answer a question about the waiting pictures, and print the answer. Raises ChatError."""
        streamed = self.interactive and not self.as_json
        stopped = threading.Event()

        def write(text: str) -> None:
            self.out.write(text)
            self.out.flush()

        with _stop_on_interrupt(stopped) if self.interactive else _nothing():
            answer = self.chat.ask(
                self.conversation,
                question,
                self.sampling,
                write=write if streamed else lambda text: None,
                stop=stopped.is_set,
            )
        if self.as_json:
            print(json.dumps(self._row(question, answer), ensure_ascii=False), file=self.out, flush=True)
        elif streamed:
            self._note(("\n" if answer.text else "(no text)\n") + answer.figures.line())
        else:
            print(answer.text, file=self.out, flush=True)
        return answer

    def _ask(self, line: str) -> None:
        found = split_line(line)
        pictures = [read_picture(path) for path in found.paths]
        if pictures and not found.text:
            self.conversation.waiting += pictures
            self._tell_waiting(len(pictures))
            return
        before = list(self.conversation.waiting)
        self.conversation.waiting += pictures
        try:
            self.ask(found.text)
        except BaseException:
            self.conversation.waiting[:] = before
            raise

    def _row(self, question: str, answer: Answer) -> dict[str, Any]:
        pictures = self.conversation.pictures()
        images = [
            {
                "path": str(picture.path), "width": picture.width, "height": picture.height,
                "cols": cut.cols, "rows": cut.rows, "thumbnail": cut.thumbnail, "tiles": cut.tiles,
            }
            for picture, cut in zip(pictures, answer.cuts, strict=True)
        ]  # fmt: skip
        return {
            "question": question, "answer": answer.text, "images": images, **answer.figures.row()
        }  # fmt: skip

    # ------------------------------------------------------------------------------- commands

    def _image(self, rest: str) -> None:
        paths = split_paths(rest)
        if not paths:
            raise ChatError("/image needs the path of a picture")
        pictures = [read_picture(path) for path in paths]
        self.conversation.waiting += pictures
        self._tell_waiting(len(pictures))

    def _tell_waiting(self, count: int) -> None:
        pictures, cuts = self.conversation.pictures(), self.chat.cuts(self.conversation)
        for picture, cut in zip(pictures[-count:], cuts[-count:], strict=True):
            self._tell(f"{picture.name}: {picture.width} x {picture.height} pixels, {describe_cut(cut)}")

    def _tiles(self, _rest: str) -> None:
        pictures, cuts = self.conversation.pictures(), self.chat.cuts(self.conversation)
        if not pictures:
            raise ChatError("no picture yet: name one by its path, or with /image PATH")
        picture, cut, about = pictures[-1], cuts[-1], self.chat.about
        self._tell(f"{picture.name}: {picture.width} x {picture.height} pixels, {describe_cut(cut)}")
        self._tell("\n".join(draw_cut(cut)))
        tokens = f"{cut.tiles * about.deep_per_tile:,} visual tokens"
        if about.expand_layer:
            shallow = cut.tiles * about.shallow_per_tile
            tokens = f"{shallow:,} visual tokens before layer {about.expand_layer}, {tokens} from there on"
        self._tell(f"tiles of {about.tile_size} x {about.tile_size} pixels, {tokens}")

    def set_system(self, text: str | None) -> None:
        """Set the system text; None: that of the chat template. Raises ChatError."""
        if text is not None:
            check_system(text, self.chat.template)
        self.conversation.system = text

    def _system(self, rest: str) -> None:
        if rest:
            self.set_system(None if rest == "default" else rest)
        shown = self.conversation.system
        self._tell(f"system text: {self.chat.about.system + ' (default)' if shown is None else shown}")

    def _undo(self, _rest: str) -> None:
        turn = self.conversation.undo()
        count = len(turn.pictures)
        kept = f" ({count} picture{'s' * (count > 1)} waiting again; /drop forgets them)" if count else ""
        self._tell(f"taken back: {turn.question}{kept}")

    def _drop(self, _rest: str) -> None:
        count = len(self.conversation.waiting)
        if not count:
            raise ChatError("no picture waits for a question")
        self.conversation.waiting.clear()
        self._tell(f"{count} picture{'s' * (count > 1)} forgotten")

    def _reset(self, _rest: str) -> None:
        self.conversation.reset()
        self._tell("a new conversation")

    def _save(self, rest: str) -> None:
        if not rest:
            raise ChatError("/save needs the name of a file, such as /save chat.jsonl")
        path, *more = split_paths(rest)
        if more:
            raise ChatError(
                f"/save takes one file, not {1 + len(more)}; write a name with spaces between quotes"
            )
        count = save_conversation(self.conversation, path)
        self._tell(f"{path}: {count} record{'s' * (count > 1)}")

    def _help(self, _rest: str) -> None:
        self._tell(HELP)

    def _tell(self, text: str) -> None:
        print(text, file=self.out if self.interactive else self.err, flush=True)

    def _note(self, text: str) -> None:
        self._tell(f"\x1b[2m{text}\x1b[0m" if self._dim else text)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _stop_on_interrupt(stopped: threading.Event) -> Iterator[None]:
    """Context in which the first Ctrl-C sets `stopped`, and the second raises KeyboardInterrupt."""

    def handle(_signal: int, _frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def history_file() -> Path:
    """File of the typed lines: in the user's folder of states."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "ivlx" / "chat_history"


def _keep_history() -> None:
    """Load the lines of earlier chats for the arrow keys, and save them at the end."""
    try:
        import readline
    except ImportError:  # a Python without it edits lines plainly
        return
    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            readline.read_history_file(path)
    except OSError:
        return  # a chat needs no history
    readline.set_history_length(HISTORY_LINES)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")

    def save() -> None:
        try:
            readline.write_history_file(path)
        except OSError:
            return

    atexit.register(save)


def chat_by_prompt(terminal: Terminal) -> None:
    """Read lines from the keyboard until Ctrl-D, /quit, or Ctrl-C twice."""
    _keep_history()
    interrupted = False
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if interrupted:
                print()
                return
            interrupted = True
            print("\n(Ctrl-C once more, or Ctrl-D, ends the chat)")
            continue
        interrupted = False
        if not terminal.run_line(line):
            return


def chat_by_lines(terminal: Terminal, lines: Iterator[str]) -> None:
    """Run the lines of a pipe or a file."""
    for line in lines:
        if not terminal.run_line(line):
            return
