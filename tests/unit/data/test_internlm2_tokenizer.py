"""InternLM2's tokenizer from its SentencePiece model: the ids of SentencePiece itself between added tokens."""

import json
import random
import re
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from megatron_internvlx.data.conversation import check_tokenizer
from megatron_internvlx.data.internlm2_tokenizer import (
    is_internlm2,
    merges_of,
    write_fast_tokenizer,
)
from megatron_internvlx.data.tokenizer import load_tokenizer, read_tokenizer
from tests.internlm2_files import ADDED, CORPUS, directory_of, train, with_piece

# Whether a space is put before each stretch, and whether surplus spaces go.
KINDS = {"prefix": (True, False), "plain": (False, False), "collapsed": (True, True)}


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory) -> Path:
    return directory_of(tmp_path_factory.mktemp("tokenizer") / "hf", train(*KINDS[request.param]))


def texts(number: int) -> list[str]:
    """Prose, runs of one character, characters of all planes, and words with spaces around."""
    draw = random.Random(3)
    words = CORPUS.split()
    planes = [(32, 127), (0x80, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1F700)]
    found = []
    for _ in range(number // 4):
        start = draw.randrange(len(CORPUS) - 200)
        found.append(CORPUS[start : start + draw.randrange(200)])
        runs = (draw.choice(" \n\t-=.a1#<") * draw.randrange(1, 12) for _ in range(draw.randrange(1, 12)))
        found.append("".join(runs))
        found.append("".join(chr(draw.randrange(*draw.choice(planes))) for _ in range(draw.randrange(30))))
        spaces = (" " * draw.randrange(4) for _ in range(2))
        found.append(" ".join(draw.choices(words, k=draw.randrange(1, 15))).join(spaces))
    for at in range(0, len(found), 5):
        found[at] += draw.choice(ADDED) + found[at - 1] + "</s>" + draw.choice(ADDED)
    return found


def reference(directory: Path, text: str) -> list[int]:
    """Ids by SentencePiece for every stretch between added tokens."""
    settings = json.loads((directory / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    ids = {token["content"]: int(number) for number, token in settings.items()}
    pieces = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    found = [pieces.bos_id()]
    for part in re.split("(" + "|".join(map(re.escape, ids)) + ")", text):
        found += [ids[part]] if part in ids else pieces.encode(part)
    return found


def test_ids_are_those_of_sentencepiece(made):
    tokenizer = load_tokenizer(str(made))
    for text in texts(1600):
        assert tokenizer(text).input_ids == reference(made, text), text


def test_training_finds_what_it_needs(made):
    tokenizer = load_tokenizer(str(made))
    check_tokenizer(tokenizer, "internlm2-chat")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == (
        "<|im_end|>",
        "</s>",
        8192,
    )
    text = "<|im_start|>user\nWas ist gr\u00fcn?<|im_end|>"
    encoded = tokenizer(text, return_offsets_mapping=True)
    covered = 0
    for start, end in encoded.offset_mapping[1:]:
        assert start <= covered, "characters of no token"
        covered = max(covered, end)
    assert covered == len(text)
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == "user\nWas ist gr\u00fcn?"


def test_files_without_code_are_the_same_tokenizer(made, tmp_path):
    copy = tmp_path / "hf"
    copy.mkdir()
    for path in made.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    write_fast_tokenizer(copy)
    assert sorted(path.name for path in copy.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert not is_internlm2(copy)
    # transformers 4 fails at a list under its later name.
    assert "extra_special_tokens" not in json.loads((copy / "tokenizer_config.json").read_text())
    before, after = read_tokenizer(made), read_tokenizer(copy)
    for text in texts(80):
        assert before(text).input_ids == after(text).input_ids
    assert (after.eos_token, after.pad_token, len(after)) == ("<|im_end|>", "</s>", len(before))


def test_merges_go_by_score_and_not_by_place():
    class Piece:
        type = 1

        def __init__(self, piece, score):
            self.piece, self.score = piece, score

    found = merges_of([Piece("a", -9), Piece("b", -8), Piece("ab", -2), Piece("ba", -1), Piece("aba", -3)])
    assert found == [("b", "a"), ("a", "b"), ("ab", "a"), ("a", "ba")]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: (d / "tokenizer.model").write_bytes(b"\xff\xff"), "is not a SentencePiece model"),
        (
            lambda d: (d / "tokenizer.model").write_bytes(
                train(True, False, model_type="unigram", vocab_size=400)
            ),
            "is not a BPE model",
        ),
        (
            lambda d: (d / "tokenizer.model").write_bytes(train(True, False, byte_fallback=False)),
            "bytes for unknown characters",
        ),
        (
            lambda d: (d / "tokenizer.model").write_bytes(with_piece(train(True, False), "e")),
            "SentencePiece refuses it",
        ),
        (lambda d: settings_of(d, added_tokens_decoder=None), "`added_tokens_decoder` is missing or damaged"),
        (
            lambda d: settings_of(d, added_tokens_decoder={"9000": {"content": "<img>"}}),
            "'<img>' has the id 9000 there, but would get 700",
        ),
    ],
)
def test_damage_is_told(change, told, tmp_path):
    directory = directory_of(tmp_path / "hf", train(True, False))
    change(directory)
    with pytest.raises(ValueError, match=told):
        load_tokenizer(str(directory))


def settings_of(directory: Path, **changes) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_tokenizer_than_sentencepieces_is_refused(tmp_path, monkeypatch):
    directory = directory_of(tmp_path / "hf", train(True, False))
    monkeypatch.setattr(
        "megatron_internvlx.data.internlm2_tokenizer.merges_of", lambda pieces: merges_of(pieces)[::-1]
    )
    with pytest.raises(ValueError, match="instead of SentencePiece's"):
        load_tokenizer(str(directory))


def test_a_piece_of_a_nul_keeps_its_id_and_is_not_made(tmp_path):
    """As InternLM2's vocabulary has it; SentencePiece 0.2.3 writes a NUL as its byte."""
    plain = train(False, False)
    tokenizer = load_tokenizer(str(directory_of(tmp_path / "hf", with_piece(plain, "\0"))))
    without = SentencePieceProcessor(model_proto=plain)
    for text in ("a\0b", "\0", *texts(40)[1::5]):
        assert tokenizer(text, add_special_tokens=False).input_ids == without.encode(text)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == len(without) + 1


def test_a_special_token_of_null_is_the_classs(tmp_path):
    directory = directory_of(tmp_path / "hf", train(True, False))
    settings_of(directory, pad_token=None, unk_token=None)
    tokenizer = load_tokenizer(str(directory))
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("</s>", "<unk>")
    assert tokenizer("None of them").input_ids == reference(directory, "None of them")


def test_others_are_left_to_transformers(tmp_path):
    directory = directory_of(tmp_path / "hf", train(True, False))
    assert is_internlm2(directory)
    settings_of(directory, tokenizer_class="LlamaTokenizer")
    assert not is_internlm2(directory)
    settings_of(directory, tokenizer_class="InternLM2Tokenizer")
    (directory / "tokenizer.json").write_text("{}")
    assert not is_internlm2(directory)
