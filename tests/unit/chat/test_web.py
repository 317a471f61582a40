"""The server of the page, asked without a browser: what it refuses, forgets and stops."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_internvlx.chat import pictures, web
from megatron_internvlx.chat.pictures import ChatError
from megatron_internvlx.chat.server import address_lines, answered_names, is_local, listen, make_server
from megatron_internvlx.chat.session import Chat
from megatron_internvlx.commands.chat import main
from tests.unit.chat.conftest import SAMPLING
from tests.unit.chat.test_pictures import bomb


@pytest.fixture(scope="module")
def port(chat: Chat) -> Iterator[int]:
    yield from serving(chat, "Be brief.")


def serving(chat: Chat, system: str | None = None) -> Iterator[int]:
    """Port of a server that runs in a thread of this process."""
    listening = listen("127.0.0.1", 0)
    server = make_server(chat, SAMPLING, system)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join()


class Client:
    """A page without a browser."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.name = self.call("POST", "/conversations")[1]["id"]

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request(method, path, body, {"X-Ivlx": "1", **headers})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if answer.headers["Content-Type"] == "application/json":
            return answer.status, json.loads(data)
        return answer.status, data

    def own(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        return self.call(method, f"/conversations/{self.name}/{path}", body)

    def ask(self, question: str, **settings: Any) -> list[dict[str, Any]]:
        status, data = self.own("POST", "ask", json.dumps({"question": question, **settings}).encode())
        return [json.loads(line) for line in data.splitlines()] if status == 200 else [data]


def test_a_conversation(port: int, photo: Path, chat: Chat) -> None:
    client = Client(port)
    status, state = client.own("POST", "pictures?name=..%2Fmy%20photo.png", photo.read_bytes())
    assert status == 200
    assert state["pictures"][0].items() >= {"name": "my photo.png", "cols": 2, "tiles": 3, "deep": 12}.items()
    status, preview = client.own("GET", "pictures/0")
    assert (status, preview[:2]) == (200, b"\xff\xd8")
    *pieces, last = client.ask("What?", max_new_tokens=3, system="Answer well.")
    assert last["done"]["answer_tokens"] == 3
    assert last["done"]["answer"].startswith("".join(piece["text"] for piece in pieces).strip())
    assert (last["waiting"], last["turns"]) == (0, 1)
    assert client.own("DELETE", "pictures/0")[0] == 400
    status, state = client.own("POST", "undo")
    assert (state["waiting"], state["turns"], state["question"]) == (1, 0, "What?")
    assert client.own("DELETE", "pictures/0")[1]["pictures"] == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.png", b"", "a.png: the file is empty"),
        ("a.png", b"text", "a.png: not a picture that Pillow can read"),
        ("a.png", bomb(), "a.png: too large to decode"),
        ("a.mp4", b"text", "a.mp4: videos cannot be asked about"),
        ("a.png", b"x" * 5000, "a.png: at most 0 MiB are taken"),
    ],
)
def test_uploads_that_are_refused(port: int, monkeypatch, name: str, data: bytes, message: str) -> None:
    for module in (web, pictures):
        monkeypatch.setattr(module, "FILE_BYTES", 4000)
    status, answer = Client(port).own("POST", f"pictures?name={name}", data)
    assert status == 400
    assert answer["error"].startswith(message)


def test_questions_that_are_refused(port: int) -> None:
    client = Client(port)
    for settings, message in (
        ({"max_new_tokens": 0}, "tokens per answer: 0 must be"),
        ({"temperature": "hot"}, "temperature: 'hot' must be"),
        ({"system": "<image>"}, "the system text contains <image>"),
    ):
        assert client.ask("Hello", **settings)[0]["error"].startswith(message)
    assert "no text" in client.ask("  ")[0]["error"]
    assert "too long for the model" in client.ask("word " * 300)[0]["error"]
    assert "cannot be read" in client.own("POST", "ask", b"[")[1]["error"]
    assert "too long" in client.own("POST", "ask", b"x" * (web.QUESTION_BYTES + 1))[1]["error"]
    assert client.own("POST", "undo")[1]["error"].startswith("nothing to take back")
    assert client.ask("Hello", max_new_tokens=1)[-1]["turns"] == 1


def test_other_sites_are_refused(port: int) -> None:
    client = Client(port)
    assert client.call("GET", "/about", Host="evil.example:80")[0] == 403
    assert client.call("GET", "/about", Host=f"localhost:{port}")[0] == 200
    assert client.call("GET", "/about", Host=f"LOCALHOST.:{port}")[0] == 200
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/conversations")
    answer = connection.getresponse()
    assert answer.status == 403
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_a_model_that_fails_is_shown(port: int, chat: Chat, monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(chat, "ask", fail)
    client = Client(port)
    assert client.ask("Hello") == [{"error": "the model failed: RuntimeError: out of memory"}]
    assert client.ask("Hello"), "the conversation is not busy any more"


def test_a_browser_that_leaves_stops_its_answer(port: int, chat: Chat, monkeypatch) -> None:
    slow = Slow(chat, monkeypatch)
    client = Client(port)
    with begin(client, "ask", HELLO) as browser:
        browser.sendall(HELLO)
        assert slow.begun.wait(60)
        assert "stop it, or wait" in client.own("POST", "undo")[1]["error"]
    assert slow.ended.wait(60)


def test_what_begins_before_a_question_and_ends_after_it_is_refused(
    port: int, chat: Chat, photo: Path, monkeypatch
) -> None:
    slow = Slow(chat, monkeypatch)
    client, picture = Client(port), photo.read_bytes()
    with (
        begin(client, "ask", HELLO) as first,
        begin(client, "ask", HELLO) as second,
        begin(client, "pictures?name=a.png", picture) as upload,
    ):
        upload.sendall(picture[:10])
        assert client.own("GET", "pictures/0")[1]["error"] == "no such picture"  # all three have begun
        first.sendall(HELLO)
        assert slow.begun.wait(60)
        for late, rest in ((second, HELLO), (upload, picture[10:])):
            late.sendall(rest)
            assert b"400 Bad Request" in late.recv(1000)
    assert slow.ended.wait(60)
    assert slow.count == 1


class Slow:
    """Replaces the model by one that writes until it is stopped."""

    def __init__(self, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.ended, self.count = threading.Event(), threading.Event(), 0
        monkeypatch.setattr(chat, "ask", self.ask)

    def ask(self, _conversation: Any, _question: str, _sampling: Any, *, write: Any, stop: Any) -> None:
        self.count += 1
        self.begun.set()
        while not stop():
            write("word ")
            time.sleep(0.01)  # or the queue fills memory on a busy machine
        self.ended.set()
        raise ChatError("stopped")


HELLO = b'{"question": "Hello"}'


def begin(client: Client, path: str, body: bytes) -> socket.socket:
    """Connection of a POST whose body is still to be sent."""
    browser = socket.create_connection(("127.0.0.1", client.port))
    head = f"POST /conversations/{client.name}/{path} HTTP/1.1\r\nHost: localhost\r\nX-Ivlx: 1\r\n"
    browser.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
    return browser


def test_old_conversations_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "KEPT_CONVERSATIONS", 2)
    tabs = web.Tabs(None)
    first, second = tabs.new(), tabs.new()
    tabs.get(first)
    third = tabs.new()
    assert list(tabs.kept) == [first, third]
    with pytest.raises(ChatError, match="this conversation was forgotten"):
        tabs.get(second)


def test_a_system_text_is_checked_before_the_page_is_served(exported: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("megatron_internvlx.chat.server.serve", lambda *_: pytest.fail("served"))
    assert main([str(exported), "--web", "--system", "<image>"]) == 2
    assert "the system text contains <image>" in capsys.readouterr().err


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    with listen("127.0.0.1", 0) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {number}: taken by another program"):
            listen("127.0.0.1", number)
    with pytest.raises(ValueError, match=r"--host no\.such\.host\.invalid: not an address"):
        listen("no.such.host.invalid", 0)
    assert all(is_local(host) for host in ("127.0.0.1", "127.0.0.2", "localhost", "LOCALHOST.", "::1"))
    assert not any(is_local(host) for host in ("0.0.0.0", "node7"))
    assert answered_names("127.0.0.2") == {"127.0.0.1", "localhost", "[::1]", "127.0.0.2"}
    assert "[0:0:0:0:0:0:0:1]" in answered_names("0:0:0:0:0:0:0:1")
    assert not answered_names("0.0.0.0")
    monkeypatch.setenv("SSH_CONNECTION", "x")
    assert "ssh -L 7860:127.0.0.1:7860 " in address_lines("127.0.0.1", 7860)[1]
    assert "there is no password" in address_lines("0.0.0.0", 7860)[1]
