"""The page in headless Chromium: a question about an uploaded picture, and what else a user does there.

A test that fails leaves a picture of its page in its folder of pytest.
"""

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from megatron_internvlx.chat.session import Chat
from megatron_internvlx.commands.chat import main
from tests.unit.chat.browser import chromium
from tests.unit.chat.conftest import save_picture
from tests.unit.chat.test_session import library_answer
from tests.unit.chat.test_web import serving

IS_UPLOAD = re.compile(r"/pictures\?name=")
LIMIT = 120_000  # milliseconds; the machine may be busy
DROP = """([kind, name, type, text]) => {
    const files = new DataTransfer();
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    files.items.add(new File([bytes], name, {type}));
    const init = {bubbles: true, cancelable: true};
    document.body.dispatchEvent(kind === "paste"
        ? new ClipboardEvent(kind, {...init, clipboardData: files})
        : new DragEvent(kind, {...init, dataTransfer: files}));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def address(chat: Chat) -> Iterator[str]:
    for port in serving(chat):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def page(browser: Any, address: str, tmp_path: Path) -> Iterator[Any]:
    """The page, opened; it must have asked nobody else, and shown no error in its console."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = context.new_page()
    page.set_default_timeout(LIMIT)
    asked: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if "Content Security" in line.text else None)
    page.goto(address)
    expect(page.locator("#facts")).to_contain_text("parameters", timeout=LIMIT)
    yield page
    page.screenshot(path=tmp_path / "page.png")
    context.close()
    assert asked
    assert all(url.startswith(f"{address}/") for url in asked)
    assert problems == []


def count(page: Any, selector: str, number: int) -> None:
    """Wait until so many elements are there."""
    expect(page.locator(selector)).to_have_count(number, timeout=LIMIT)


def upload(page: Any, path: Path, waiting: int) -> None:
    page.set_input_files("#files", path)
    count(page, "#waiting figure", waiting)


def ask(page: Any, question: str, answers: int) -> str:
    page.fill("#question", question)
    page.press("#question", "Enter")
    count(page, ".figures", answers)
    return page.locator(".answer .text").last.text_content()


def test_a_question_about_an_uploaded_picture(page: Any, exported: Path, photo: Path, capsys) -> None:
    page.click("#settings-button")
    system = page.input_value("#system")
    page.fill("#system", "")
    page.fill("#system", system)
    upload(page, photo, 1)
    assert page.locator("#waiting .cut span").count() == 2
    assert "2 × 1 grid and a thumbnail: 3 tiles" in page.text_content("#waiting figcaption")
    given = ask(page, "What is this?", 1)
    command = [str(exported), "--ask", "What is this?", "--image", str(photo), "--max-new-tokens", "8"]
    capsys.readouterr()
    assert main(command) == 0
    assert given + "\n" == capsys.readouterr().out, "the terminal's answer is another one"
    assert given == library_answer(exported, photo, "What is this?")
    assert page.text_content(".figures").startswith("3 tiles, 3 → 12 visual tokens · ")
    assert page.locator(".question .cut span").count() == 2
    assert page.locator("#waiting").is_hidden()


def test_rounds_are_taken_back(page: Any, photo: Path) -> None:
    ask(page, "Hello", 1)
    upload(page, photo, 1)
    first = ask(page, "And this?", 2)
    page.click("#undo")
    count(page, ".answer", 1)
    assert page.input_value("#question") == "And this?"
    assert page.locator("#waiting figure").count() == 1
    assert ask(page, "And this?", 2) == first
    page.click("#reset")
    page.wait_for_selector("#welcome:visible")
    assert page.locator("article").count() == 0


def test_pictures_are_dropped_pasted_and_removed(page: Any, tmp_path: Path) -> None:
    data = base64.b64encode(save_picture(tmp_path / "x.png", 8, 8).read_bytes()).decode()
    page.evaluate(DROP, ["dragenter", "x.png", "image/png", data])
    assert page.locator("#drop").is_visible()
    page.evaluate(DROP, ["drop", "x.png", "image/png", data])
    count(page, "#waiting figure", 1)
    assert page.locator("#drop").is_hidden()
    page.evaluate(DROP, ["paste", "y.png", "image/png", data])
    count(page, "#waiting figure", 2)
    page.click("[aria-label='Remove x.png']")
    count(page, "#waiting figure", 1)
    assert page.text_content("#waiting figcaption b") == "y.png"


def test_a_question_waits_for_its_pictures(page: Any, photo: Path) -> None:
    held: list[Any] = []
    page.route(IS_UPLOAD, lambda route: held.append(route))
    page.fill("#question", "What?")

    def send_during_an_upload() -> None:
        with page.expect_request(IS_UPLOAD):
            page.set_input_files("#files", photo)
        page.press("#question", "Enter")
        page.press("#question", "Enter")
        assert page.locator("article").count() == 0

    send_during_an_upload()
    page.click("#stop")
    held.pop().continue_()
    page.wait_for_selector("#send:visible")
    assert page.input_value("#question") == "What?"
    assert page.locator("article").count() == 0
    send_during_an_upload()
    held.pop().continue_()
    count(page, ".figures", 1)
    assert page.locator("article.question").count() == 1
    assert page.locator(".question figure").count() == 2
    assert page.locator("#problem").is_hidden()


def test_a_picture_waits_for_its_conversation(page: Any, tmp_path: Path) -> None:
    """The page takes nothing before the server has answered: on a busy one pictures went to no conversation."""

    def late(route: Any) -> None:
        page.wait_for_timeout(300)
        route.continue_()

    page.route(re.compile(r"/conversations$"), late)
    page.reload()
    expect(page.locator("#facts")).to_contain_text("parameters", timeout=LIMIT)
    upload(page, save_picture(tmp_path / "early.png", 30, 20), 1)
    assert not page.locator("#problem").is_visible()


def test_mistakes_are_shown(page: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.set_input_files("#files", tmp_path / "broken.png")
    page.wait_for_selector("#problem:visible")
    assert page.text_content("#problem") == "broken.png: not a picture that Pillow can read"
    page.fill("#question", "word " * 300)
    page.press("#question", "Enter")
    expect(page.locator("#problem")).to_contain_text("send again to ask without this picture", timeout=LIMIT)
    assert page.locator("article").count() == 0
    page.press("#question", "Enter")
    expect(page.locator("#problem")).to_contain_text("too long for the model", timeout=LIMIT)
    assert page.locator("article").count() == 0
    assert page.input_value("#question").startswith("word word")
