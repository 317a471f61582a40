"""Answers: equal to the library's, streamed completely, with true figures; limits; seeds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from megatron_internvlx.chat.conversation import Conversation
from megatron_internvlx.chat.loading import Source, load_chat
from megatron_internvlx.chat.pictures import ChatError, read_picture
from megatron_internvlx.chat.session import Chat, Figures, count_words
from megatron_internvlx.evaluation.generation import Sampling, TextStream
from tests.converting import FAMILIES, make_directory
from tests.unit.chat.conftest import SAMPLING, save_picture


def library_answer(directory: Path, path: Path, question: str) -> str:
    """Answer of the exported directory in transformers alone, as its model card says."""
    model = AutoModel.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[Image.open(path)], text=prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=SAMPLING.max_new_tokens)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_the_answer_is_the_librarys(chat: Chat, exported: Path, photo: Path) -> None:
    conversation = Conversation(waiting=[read_picture(photo)])
    pieces: list[str] = []
    answer = chat.ask(conversation, "What is this?", SAMPLING, write=pieces.append)
    assert answer.text == library_answer(exported, photo, "What is this?")
    assert answer.text.startswith("".join(pieces).strip().removesuffix("\ufffd"))
    assert len(pieces) > 2
    found = answer.figures
    assert [cut.tiles for cut in answer.cuts] == [3]
    assert (found.tiles, found.shallow_tokens, found.deep_tokens, found.answer_tokens) == (3, 3, 12, 8)
    assert found.ended == "length"
    assert 0 < found.first_seconds < found.seconds
    assert conversation.turns[0].answer == answer.text
    assert not conversation.waiting


def test_rounds_and_pictures_add_up(chat: Chat, tmp_path: Path, photo: Path) -> None:
    conversation = Conversation(waiting=[read_picture(photo)])
    first = chat.ask(conversation, "What?", replace(SAMPLING, max_new_tokens=2))
    conversation.waiting.append(read_picture(save_picture(tmp_path / "b.png", 8, 8)))
    second = chat.ask(conversation, "And this?", replace(SAMPLING, max_new_tokens=2))
    assert [cut.tiles for cut in second.cuts] == [3, 1]
    assert second.figures.deep_tokens == 16
    assert second.figures.prompt_tokens > first.figures.prompt_tokens + 4
    text_only = chat.ask(Conversation("Be brief."), "Hello", replace(SAMPLING, max_new_tokens=1))
    assert text_only.figures.tiles == 0
    assert text_only.figures.prompt_tokens < first.figures.prompt_tokens


def test_an_answer_can_be_stopped(chat: Chat) -> None:
    calls = iter([False, False, *[True] * 9])
    answer = chat.ask(Conversation(), "Hello", SAMPLING, stop=lambda: next(calls))
    assert answer.figures.answer_tokens == 3
    assert answer.figures.ended == "stopped"


def test_what_does_not_fit_is_told_with_its_tokens(chat: Chat, photo: Path) -> None:
    conversation = Conversation(waiting=[read_picture(photo)])
    with pytest.raises(
        ChatError, match=r"too long for the model: 1,\d{3} tokens \(12 of pictures\), and it has 256"
    ):
        chat.ask(conversation, "word " * 300, SAMPLING)
    assert conversation.waiting and not conversation.turns
    length = (
        256 - chat.ask(Conversation(), "Hello", replace(SAMPLING, max_new_tokens=1)).figures.prompt_tokens
    )
    answer = chat.ask(Conversation(), "Hello", replace(SAMPLING, max_new_tokens=10_000))
    assert answer.figures.answer_tokens <= length


def test_no_memory_left_is_a_mistake_like_others(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(chat.generator.model, "generate", fail)
    with pytest.raises(ChatError, match="no memory left on CPU for"):
        chat.ask(Conversation(), "Hello", SAMPLING)


def test_a_released_model_in_bfloat16(tmp_path: Path, photo: Path) -> None:
    directory = make_directory(tmp_path / "hf", FAMILIES["llama"], tokenizer=True)
    chat = load_chat(Source(directory, dtype="bfloat16", max_tiles=1))
    answer = chat.ask(
        Conversation(waiting=[read_picture(photo)]), "What?", replace(SAMPLING, max_new_tokens=2)
    )
    assert (answer.figures.shallow_tokens, answer.figures.deep_tokens) == (4, 4)
    assert chat.about.lines()[1:] == [
        f"{count_words(chat.about.parameters)} parameters, bfloat16 on CPU",
        "4 visual tokens per tile; tiles of 16 pixels, one tile per picture (RVTC off)",
    ]
    with pytest.raises(ValueError, match="--device cuda: PyTorch finds no GPU here"):
        load_chat(Source(directory, device="cuda"))


def test_draws_follow_the_seed(chat: Chat) -> None:
    def answer(seed: int) -> str:
        return chat.ask(Conversation(), "Hello", Sampling(8, temperature=2.0, top_p=0.9, seed=seed)).text

    assert answer(1) == answer(1) != answer(2)


def test_a_stream_holds_back_parts_of_characters() -> None:
    pieces: list[str] = []
    data = "né 😀!".encode()
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), pieces.append)
    for byte in data:
        stream.add(byte)
    assert pieces == ["n", "é", " ", "😀", "!"]


def test_figures_in_words() -> None:
    figures = Figures(3, 192, 768, 812, 25, 0.5, 2.5, "end")
    assert figures.line() == (
        "3 tiles, 192 -> 768 visual tokens | 812 prompt + 25 answer tokens | 2.5 s, 12.0 tokens/s"
    )
    assert replace(figures, tiles=0, ended="stopped").line().endswith("tokens/s | stopped")
    assert replace(figures, answer_tokens=1, first_seconds=2.5).tokens_per_second == 0.4
    assert [count_words(n) for n in (2_204_000_000, 1_310_000, 999)] == ["2.2 B", "1.3 M", "999"]
