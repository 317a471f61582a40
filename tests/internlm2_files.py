"""Directories with InternLM2's tokenizer as released models bring it: Python code and a SentencePiece model."""

import json
from io import BytesIO
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto

CORPUS = (Path(__file__).parents[1] / "LICENSE").read_text()
"""A text that does not change: another one has other pieces."""
ADDED = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
FREE = "[UNUSED_TOKEN_1]"
"""Piece whose id the first added token gets."""


def train(prefix: bool, collapsed: bool, **options) -> bytes:
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=model,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=collapsed,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        user_defined_symbols=[FREE, "[UNUSED_TOKEN_2]"],
        num_threads=1,
        minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 700, "byte_fallback": True} | options,
    )
    return model.getvalue()


def with_piece(model: bytes, text: str, score: float = -900.0) -> bytes:
    """The model with one more piece; InternLM2's has one of a NUL, which the trainer does not make."""
    proto = ModelProto.FromString(model)
    proto.pieces.add(piece=text, score=score)
    return proto.SerializeToString()


def directory_of(folder: Path, model: bytes) -> Path:
    """A directory as the released ones: one added token has the id of a free piece, the others follow the pieces."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenization_internlm2.py").write_text("raise SystemExit('run')\n")
    pieces = [piece.piece for piece in ModelProto.FromString(model).pieces]
    ids = [pieces.index(FREE), *range(len(pieces), len(pieces) + 4)]
    added = dict(zip((0, 1, 2, *ids), ("<unk>", "<s>", "</s>", *ADDED), strict=True))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": {str(number): {"content": text} | flags for number, text in added.items()},
        "additional_special_tokens": list(ADDED),
        "eos_token": {"content": "<|im_end|>"} | flags,
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
