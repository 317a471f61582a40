"""The local page of a chat: a Starlette application around one model.

Each tab of a browser has a conversation of its own, kept here under a random name. Answers are generated one at a
time; the page receives their text in lines of JSON. Everything that the page loads comes from here.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from megatron_internvlx.chat.conversation import Conversation, check_system
from megatron_internvlx.chat.pictures import FILE_BYTES, ChatError, Picture, check_picture, describe_cut
from megatron_internvlx.chat.server import plain_host
from megatron_internvlx.chat.session import Chat
from megatron_internvlx.evaluation.generation import Cut, Sampling

PAGE = Path(__file__).with_name("page")
HEADER = "x-ivlx"
"""Header of every request that changes something; a page of another site cannot send it."""
PREVIEW_SIDE = 1024
KEPT_BYTES = 512 << 20
"""Pictures of all conversations, in bytes; above it the conversations used least recently are forgotten."""
KEPT_CONVERSATIONS = 64
MAX_PICTURES = 32
"""Pictures of a conversation."""
QUESTION_BYTES = 1 << 20
"""Largest request with a question, in bytes."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


@dataclass
class Tab:
    """Conversation of one tab of a browser."""

    conversation: Conversation
    busy: bool = False
    """Whether an answer is being generated, or waits for another one."""
    stopped: threading.Event = field(default_factory=threading.Event)

    def size(self) -> int:
        """Bytes of its pictures."""
        return sum(len(picture.data) for picture in self.conversation.pictures())


class Tabs:
    """Conversations by name, the one used last at the end."""

    def __init__(self, system: str | None) -> None:
        self.system = system
        self.kept: dict[str, Tab] = {}

    def new(self) -> str:
        """Start a conversation; returns its name."""
        name = secrets.token_urlsafe(12)
        self.kept[name] = Tab(Conversation(self.system))
        self.trim()
        return name

    def get(self, name: str) -> Tab:
        """Conversation of this name. Raises ChatError if it was forgotten."""
        tab = self.kept.pop(name, None)
        if tab is None:
            raise ChatError(
                "this conversation was forgotten, since the server was restarted or others need room; reload"
            )
        self.kept[name] = tab
        return tab

    def trim(self) -> None:
        """Forget the conversations used least recently beyond the limits, but never the last one."""
        while len(self.kept) > 1 and (
            len(self.kept) > KEPT_CONVERSATIONS or sum(tab.size() for tab in self.kept.values()) > KEPT_BYTES
        ):
            oldest = next(iter(self.kept))
            self.kept.pop(oldest).stopped.set()


class Server:
    """Answers the requests of the page."""

    def __init__(self, chat: Chat, sampling: Sampling, system: str | None) -> None:
        self.chat, self.sampling = chat, sampling
        self.tabs = Tabs(system)
        self._turn = asyncio.Lock()
        self._running: set[asyncio.Task[None]] = set()

    async def about(self, _request: Request) -> Response:
        """Facts about the model, and the settings of answers."""
        sampling = asdict(self.sampling)
        system = self.chat.about.system if self.tabs.system is None else self.tabs.system
        return JSONResponse(
            {
                **asdict(self.chat.about),
                "lines": self.chat.about.lines(),
                "sampling": sampling,
                "system": system,
            }
            | {"short": self.chat.about.short(), "max_bytes": FILE_BYTES}
        )

    async def start(self, _request: Request) -> Response:
        """Start a conversation."""
        return JSONResponse({"id": self.tabs.new()})

    async def add_picture(self, request: Request) -> Response:
        """Take an uploaded picture, the body of the request, for the next question."""
        self._with_room(request)
        name = Path(request.query_params.get("name", "")).name[:200] or "picture"
        data = await _body(
            request, FILE_BYTES, f"{name}: at most {FILE_BYTES >> 20} MiB are taken; save it smaller"
        )
        picture = await run_in_threadpool(check_picture, name, data)
        # Again: a question may have been asked, or other pictures taken, during the upload.
        tab = self._with_room(request)
        tab.conversation.waiting.append(picture)
        self.tabs.trim()
        return JSONResponse(self._state(tab))

    async def drop_picture(self, request: Request) -> Response:
        """Remove a waiting picture."""
        tab = self._idle(request)
        number = request.path_params["number"]
        before = len(tab.conversation.pictures()) - len(tab.conversation.waiting)
        if not before <= number < before + len(tab.conversation.waiting):
            raise ChatError("this picture belongs to an earlier question; Undo takes it back")
        del tab.conversation.waiting[number - before]
        return JSONResponse(self._state(tab))

    async def show_picture(self, request: Request) -> Response:
        """JPEG of a picture for the page."""
        pictures = self.tabs.get(request.path_params["id"]).conversation.pictures()
        number = request.path_params["number"]
        if number >= len(pictures):
            raise ChatError("no such picture")
        return Response(
            await run_in_threadpool(pictures[number].preview, PREVIEW_SIDE), media_type="image/jpeg"
        )

    async def undo(self, request: Request) -> Response:
        """Take the last question back; its pictures wait for the next one."""
        tab = self._idle(request)
        turn = tab.conversation.undo()
        return JSONResponse({**self._state(tab), "question": turn.question})

    async def stop(self, request: Request) -> Response:
        """Stop the answer that is being generated."""
        self.tabs.get(request.path_params["id"]).stopped.set()
        return JSONResponse({})

    async def ask(self, request: Request) -> Response:
        """Answer a question: lines of JSON with `text`, then one with `done`, or with `error`."""
        self._idle(request)
        body = await _body(
            request,
            QUESTION_BYTES,
            f"the question is too long: more than {QUESTION_BYTES >> 20} MiB; shorten it",
        )
        # Again: another question may have come first. Nothing below waits until the conversation is busy.
        tab = self._idle(request)
        try:
            asked = json.loads(body)
            question, system = str(asked["question"]), asked.get("system")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ChatError(f"the request cannot be read: {error}") from error
        sampling = self._sampling(asked)
        if system is not None and system != self.chat.about.system:
            check_system(str(system), self.chat.template)
            tab.conversation.system = str(system)
        elif system is not None:
            tab.conversation.system = None
        tab.busy = True
        tab.stopped.clear()
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        # A task of its own: if the browser leaves, the answer is stopped, and the next one must wait for its end.
        task = asyncio.create_task(self._answer(tab, question, sampling, queue))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return StreamingResponse(self._lines(tab, queue), media_type="application/x-ndjson")

    def _sampling(self, asked: dict[str, Any]) -> Sampling:
        """Settings of the page. Raises ChatError for a value out of range."""
        tokens = asked.get("max_new_tokens", self.sampling.max_new_tokens)
        temperature = asked.get("temperature", self.sampling.temperature)
        if type(tokens) is not int or not 1 <= tokens <= 2**20:
            raise ChatError(f"tokens per answer: {tokens!r} must be a whole number of at least 1")
        if type(temperature) not in (int, float) or not 0 <= temperature <= 100:
            raise ChatError(f"temperature: {temperature!r} must be a number from 0 to 100")
        return replace(self.sampling, max_new_tokens=tokens, temperature=float(temperature))

    async def _answer(
        self, tab: Tab, question: str, sampling: Sampling, queue: asyncio.Queue[dict[str, Any] | None]
    ) -> None:
        loop = asyncio.get_running_loop()

        def write(text: str) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, {"text": text})

        try:
            async with self._turn:
                answer = await run_in_threadpool(
                    self.chat.ask, tab.conversation, question, sampling, write=write, stop=tab.stopped.is_set
                )
            row = {"answer": answer.text, **answer.figures.row(), "line": answer.figures.line()}
            queue.put_nowait({"done": row, **self._state(tab)})
        except ChatError as error:
            queue.put_nowait({"error": str(error)})
        except Exception as error:  # such as no memory left on the device; the page shows it
            queue.put_nowait({"error": f"the model failed: {type(error).__name__}: {error}"})
        finally:
            tab.busy = False
            queue.put_nowait(None)

    async def _lines(self, tab: Tab, queue: asyncio.Queue[dict[str, Any] | None]) -> AsyncIterator[str]:
        try:
            while (item := await queue.get()) is not None:
                yield json.dumps(item, ensure_ascii=False) + "\n"
        finally:
            tab.stopped.set()

    def _idle(self, request: Request) -> Tab:
        """Conversation of a request that changes it. Raises ChatError if it is being answered."""
        tab = self.tabs.get(request.path_params["id"])
        if tab.busy:
            raise ChatError("an answer is being written; stop it, or wait for its end")
        return tab

    def _with_room(self, request: Request) -> Tab:
        """Conversation of a request that adds a picture. Raises ChatError if it is busy or full."""
        tab = self._idle(request)
        if len(tab.conversation.pictures()) >= MAX_PICTURES:
            raise ChatError(f"a conversation has at most {MAX_PICTURES} pictures; start a new one")
        return tab

    def _state(self, tab: Tab) -> dict[str, Any]:
        """Pictures of a conversation and their cuts, for the page."""
        cuts = self.chat.cuts(tab.conversation)
        pictures = tab.conversation.pictures()
        rows = [self._picture_row(picture, cut) for picture, cut in zip(pictures, cuts, strict=True)]
        return {
            "pictures": rows,
            "waiting": len(tab.conversation.waiting),
            "turns": len(tab.conversation.turns),
        }

    def _picture_row(self, picture: Picture, cut: Cut) -> dict[str, Any]:
        about = self.chat.about
        return {
            "name": picture.name, "digest": picture.digest, "width": picture.width, "height": picture.height,
            "cols": cut.cols, "rows": cut.rows, "thumbnail": cut.thumbnail, "tiles": cut.tiles,
            "cut": describe_cut(cut), "shallow": cut.tiles * about.shallow_per_tile,
            "deep": cut.tiles * about.deep_per_tile,
        }  # fmt: skip

    async def close(self) -> None:
        """Stop what is being generated, and wait for it."""
        for tab in self.tabs.kept.values():
            tab.stopped.set()
        await asyncio.gather(*self._running, return_exceptions=True)


async def _body(request: Request, most: int, refusal: str) -> bytes:
    """Body of a request. Raises ChatError with the refusal as soon as it has more than `most` bytes."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise ChatError(refusal)
    return bytes(data)


async def _refuse(_request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


class _Guard:
    """Adds headers to every answer, and refuses what the page of another site asks for.

    Such a page can send requests here, or point a name of its own at this machine.
    """

    def __init__(self, app: Any, hosts: frozenset[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.lower().encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        refusal = self._refusal(scope["method"], dict(scope["headers"]))
        answer = JSONResponse({"error": refusal}, status_code=403) if refusal else self.app
        await answer(scope, receive, send_with_headers)

    def _refusal(self, method: str, headers: dict[bytes, bytes]) -> str | None:
        name = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1"))
        if self.hosts and plain_host(name) not in self.hosts:
            return f"this server is not called {name}; its names are {', '.join(sorted(self.hosts))}"
        if method not in ("GET", "HEAD") and HEADER.encode() not in headers:
            return f"the header {HEADER} is missing"
        return None


def _file(name: str) -> Any:
    async def show(_request: Request) -> Response:
        return FileResponse(PAGE / name)

    return show


def make_app(
    chat: Chat, sampling: Sampling, system: str | None = None, hosts: frozenset[str] = frozenset()
) -> Starlette:
    """Application of the page.

    Args:
        chat: the loaded model.
        sampling: settings of answers; the page can change length and temperature.
        system: system text; None: that of the chat template.
        hosts: names under which the page may be asked for, as `plain_host` writes them; empty: all.
    """
    server = Server(chat, sampling, system)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await server.close()

    one = "/conversations/{id}"
    routes = [
        Route("/", _file("index.html")),
        *(Route(f"/{name}", _file(name)) for name in ("chat.css", "chat.js", "icon.svg")),
        Route("/about", server.about),
        Route("/conversations", server.start, methods=["POST"]),
        Route(f"{one}/pictures", server.add_picture, methods=["POST"]),
        Route(f"{one}/pictures/{{number:int}}", server.show_picture),
        Route(f"{one}/pictures/{{number:int}}", server.drop_picture, methods=["DELETE"]),
        Route(f"{one}/ask", server.ask, methods=["POST"]),
        Route(f"{one}/stop", server.stop, methods=["POST"]),
        Route(f"{one}/undo", server.undo, methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(_Guard, hosts=hosts)],
        exception_handlers={ChatError: _refuse, ClientDisconnect: _refuse},
        lifespan=lifespan,
    )
