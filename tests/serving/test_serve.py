"""`transformers serve` on exports: the answers of `ivlx evaluate`, and what a client meets."""

import base64
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_internvlx.commands.check_export import main
from megatron_internvlx.evaluation.served_answers import (
    ServerError,
    ask,
    missing_packages,
    transformers_server,
)
from tests.serving.conftest import random_export

pytestmark = pytest.mark.skipif(
    bool(missing_packages()), reason=f"transformers serve lacks {missing_packages()}"
)


def check(hf: Path, data: Path, out: Path, *arguments: str) -> dict[str, Any]:
    """The file that `ivlx check-export` writes; all answers must be equal."""
    command = [str(hf), "--data", str(data / "meta_val.json"), "--json", str(out), *arguments]
    code = main([*command, "--max-new-tokens", "10"])
    found: dict[str, Any] = json.loads(out.read_text())
    assert code == 0, found["rows"]
    return found


def test_100_held_out_questions(demo_export: Path, demo_data: Path, tmp_path: Path) -> None:
    found = check(demo_export, demo_data, tmp_path / "check.json", "--ways", "generate", "serve")
    assert [(row["way"], row["equal"], row["asked"]) for row in found["rows"]] == [
        ("evaluate", 100, 100), ("generate", 100, 100), ("serve", 100, 100),
    ]  # fmt: skip
    # Equality means something: answers depend on the question.
    assert len(set(found["answers"]["evaluate"])) > 10


@pytest.mark.parametrize("kind", ["mlp", "native"])
def test_exports_without_lvtc(demo_data: Path, tmp_path: Path, kind: str) -> None:
    """An MLP projector with our code, and transformers' own InternVL."""
    hf = random_export(tmp_path / kind, kind, demo_data / "tokenizer")
    found = check(hf, demo_data, tmp_path / "check.json", "--ways", "serve", "--questions", "12")
    assert [row["asked"] for row in found["rows"]] == [12, 12]
    assert len(set(found["answers"]["evaluate"])) > 3


@pytest.fixture(scope="module")
def server(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with transformers_server(demo_export, log, device="cpu", dtype="float32") as (address, _):
        yield address


@pytest.fixture(scope="module")
def pictures(demo_data: Path) -> list[Path]:
    return sorted((demo_data / "images" / "val").glob("*.jpg"))


def data_uri(path: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def answer(server: str, model: Path, *messages: dict[str, Any], **settings: Any) -> tuple[str, int]:
    """(answer, tokens of the prompt)."""
    found = ask(server, str(model), messages, **{"max_tokens": 6, **settings})
    return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens"]


def test_addresses_of_images(server: str, demo_export: Path, pictures: list[Path]) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_args: object) -> None:
            """Nothing."""

    folder = str(pictures[0].parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_address[1]}/{pictures[0].name}"
        by_address = answer(server, demo_export, user(image(url), text("Which digit?")))
        web.shutdown()
    assert by_address == answer(server, demo_export, user(image(data_uri(pictures[0])), text("Which digit?")))


def test_images_and_rounds(server: str, demo_export: Path, pictures: list[Path]) -> None:
    first, second = (image(data_uri(path)) for path in pictures[:2])
    plain = answer(server, demo_export, {"role": "user", "content": "Hello"})[1]
    one = answer(server, demo_export, user(first, text("Which digit?")))[1]
    two = answer(server, demo_export, user(first, second, text("Which digit?")))[1]
    assert plain < one < two
    rounds = [
        user(first, text("Which digit?")),
        {"role": "assistant", "content": "4"},
        user(text("Which shape?")),
    ]
    assert one < answer(server, demo_export, *rounds)[1] < two + 40
    system = {"role": "system", "content": "Answer with one word."}
    # In place of the template's own, which is longer.
    assert answer(server, demo_export, system, *rounds)[1] != answer(server, demo_export, *rounds)[1]


def test_streaming_with_openais_client(server: str, demo_export: Path, pictures: list[Path]) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    messages: Any = [user(image(data_uri(pictures[0])), text("Background colour?"))]
    settings: dict[str, Any] = {"model": str(demo_export), "messages": messages, "max_tokens": 6}
    whole = client.chat.completions.create(**settings).choices[0]
    parts = list(client.chat.completions.create(**settings, stream=True))
    streamed = "".join(part.choices[0].delta.content or "" for part in parts)
    assert streamed.strip() == (whole.message.content or "").strip()
    assert parts[-1].choices[0].finish_reason == whole.finish_reason


def test_what_is_wrong_is_said(server: str, demo_export: Path, pictures: list[Path]) -> None:
    for parts, why in (
        ([image("data:image/png;base64,AAAA"), text("What?")], "status 400: .*it is no image"),
        ([image("http://127.0.0.1:1/a.png"), text("What?")], "status 400: .*Connection refused"),
        ([text("<image> What?")], "status 400: .*placeholders"),
    ):
        with pytest.raises(ServerError, match=why):
            answer(server, demo_export, user(*parts))
    with pytest.raises(ServerError, match="status 422"):
        answer(server, demo_export, user(text("a")), nonsense=1)
    # It goes on answering.
    assert answer(server, demo_export, user(image(data_uri(pictures[0])), text("Which digit?")))[1] > 100
