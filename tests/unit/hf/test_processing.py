"""The processor in a server: images from `data:` URIs and addresses, chat requests, and what it refuses."""

import base64
import io
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_internvlx.checkpoint.remote_code import chat_template, load_tokenizer
from megatron_internvlx.data.conversation import get_template, render_prompt
from megatron_internvlx.hf import processing_internvlx
from megatron_internvlx.hf.processing_internvlx import InternVLXProcessor, fetch_image
from tests.converting import TOKENIZER


@pytest.fixture(scope="module")
def processor() -> InternVLXProcessor:
    template = chat_template(get_template("internvl2_5"))
    return InternVLXProcessor(
        load_tokenizer(TOKENIZER), template, tile_size=16, tokens_per_tile=4, max_tiles=6
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that are easily read otherwise than in training: turned by EXIF, transparent, EXIF behind the pixels."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(2)
    pixels = rng.integers(0, 256, (20, 50, 4)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(root / "clear.png")
    Image.fromarray(pixels[..., :3].copy()).save(root / "turned.jpg", exif=exif)
    Image.fromarray(pixels[..., :3].copy()).save(root / "before.png", exif=exif)
    content = (root / "before.png").read_bytes()
    at = content.index(b"eXIf") - 4
    size = 12 + int.from_bytes(content[at : at + 4])
    end = content.index(b"IEND") - 4
    (root / "late.png").write_bytes(
        content[:at] + content[at + size : end] + content[at : at + size] + content[end:]
    )
    (root / "text.png").write_text("no image")
    (root / "cut.jpg").write_bytes((root / "turned.jpg").read_bytes()[:700])
    return root


@pytest.fixture(scope="module")
def address(pictures: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_args: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(pictures))) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def data_uri(path: Path) -> str:
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_pixels_are_those_of_the_file(processor, pictures: Path, address: str) -> None:
    for name in ("clear.png", "turned.jpg", "before.png", "late.png"):
        expected = processor.tiles(pictures / name)
        assert torch.equal(processor.tiles(str(pictures / name)), expected)
        assert torch.equal(processor.tiles(data_uri(pictures / name)), expected), name
        assert torch.equal(processor.tiles(f"{address}/{name}"), expected), name
    assert processor.tiles(pictures / "late.png").shape != processor.tiles(pictures / "before.png").shape or (
        not torch.equal(processor.tiles(pictures / "late.png"), processor.tiles(pictures / "before.png"))
    )


def test_a_chat_request_becomes_the_prompt_of_training(processor, pictures: Path) -> None:
    """As `transformers serve` calls it: several images and rounds, a system message."""
    first, second = data_uri(pictures / "clear.png"), str(pictures / "turned.jpg")
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
        {"role": "user", "content": [
            {"type": "text", "text": "Image-1: "}, {"type": "image", "url": first},
            {"type": "text", "text": "Image-2: "}, {"type": "image", "url": second},
            {"type": "text", "text": "Which?"},
        ]},
        {"role": "assistant", "content": [{"type": "text", "text": "The first."}]},
        {"role": "user", "content": "Why?"},
    ]  # fmt: skip
    turns = [
        ("system", "Be short."), ("human", "Image-1: <image>\nImage-2: <image>\nWhich?"), ("gpt", "The first."),
        ("human", "Why?"),
    ]  # fmt: skip
    given = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", tools=None,
        load_audio_from_video=False,
    )  # fmt: skip
    prompt = render_prompt("internvl2_5", [{"from": r, "value": v} for r, v in turns], generation_prompt=True)
    expected = processor(text=prompt, images=[pictures / "clear.png", pictures / "turned.jpg"])
    assert set(given) == set(expected) == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(given[name], expected[name]) for name in given)


def test_text_only(processor) -> None:
    given = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert set(given) == {"input_ids", "attention_mask"}


def test_unreadable_images(processor, pictures: Path, address: str) -> None:
    for source, why in (
        ("data:image/png;base64,AAAA", "its format is unknown, or it is no image"),
        ("data:image/png;base64,A", "cannot be read"),
        (data_uri(pictures / "text.png"), "it is no image"),
        (data_uri(pictures / "cut.jpg"), "truncated"),
        (f"{address}/text.png", "it is no image"),
        (f"{address}/none.png", "404"),
        ("http://127.0.0.1:1/a.png", "refused"),
        ("http://", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=why) as found:
            processor(text="<image>", images=[source])
        assert len(str(found.value)) < 300
    with pytest.raises(ValueError, match="no video and no audio"):
        processor(text="a", videos=[[1]])


def test_a_file_that_is_too_large_is_refused(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (pictures / "clear.png").read_bytes()
    address = "data:image/png;base64," + base64.b64encode(content).decode()
    assert fetch_image(address).width
    monkeypatch.setattr(processing_internvlx, "LARGEST", len(content) - 1)
    with pytest.raises(ValueError, match="it has more than 0 MiB"):
        fetch_image(address)


def test_a_server_answers_400_with_the_reason(processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the server's framework is: the error is also that framework's."""

    class HTTPException(Exception):
        def __init__(self, status_code: int, detail: str) -> None:
            self.status_code, self.detail = status_code, detail

        def __str__(self) -> str:
            return f"{self.status_code}: {self.detail}"

    monkeypatch.setitem(sys.modules, "starlette.exceptions", SimpleNamespace(HTTPException=HTTPException))
    for refused in (lambda: fetch_image("data:,"), lambda: processor(text="<image>")):
        with pytest.raises(HTTPException) as found:
            refused()
        assert isinstance(found.value, ValueError)
        assert found.value.status_code == 400
        assert str(found.value) == found.value.detail
    monkeypatch.delitem(sys.modules, "starlette.exceptions")
    with pytest.raises(ValueError, match="placeholders") as plain:
        processor(text="<image>")
    assert type(plain.value) is ValueError


def test_a_picture_in_memory_stays_possible(processor, pictures: Path) -> None:
    with Image.open(pictures / "clear.png") as image:
        content = io.BytesIO()
        image.save(content, format="PNG")
        assert torch.equal(processor.tiles(image), processor.tiles(pictures / "clear.png"))
