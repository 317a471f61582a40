"""InternLM2's tokenizer, read from its SentencePiece model.

Released models with an InternLM2 decoder bring it as Python code, which is not run here, and which has no character
offsets. The code splits a text at the added tokens and hands each stretch between them to SentencePiece; the
`tokenizers` library does the same with the same merges.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_internvlx.files import read_object

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

MODEL, SETTINGS, FAST = "tokenizer.model", "tokenizer_config.json", "tokenizer.json"
CODE = "tokenization_internlm2*.py"
SPACE = "\u2581"
"""SentencePiece's sign for a space."""
# Kinds of pieces of a SentencePiece model: sentencepiece_model.proto, ModelProto.SentencePiece.Type.
_NORMAL, _USER_DEFINED, _UNUSED = 1, 4, 5
_BPE = 2  # TrainerSpec.ModelType
DEFAULTS = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "</s>"}
"""Special tokens of InternLM2's class where the settings name none."""
_PROBES = (
    "What is shown here?\nA cat, 2 dogs.",
    "  two spaces,   three,\t\ttabs\n\n\n    four ",
    'x = [1.5e-3, -20];  if (a != b) { return "c"; }',
    "----------======....   aaaaaaaaaaaaaaaaa",
    "\u56fe\u7247\u91cc\u6709\u4ec0\u4e48\uff1f \u00dcbergr\u00f6\u00dfe, na\u00efve caf\u00e9",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \U0001f600\U0001f44d\U0001f3fd \u0000\ufffd",
    " ",
)


def is_internlm2(directory: Path) -> bool:
    """Whether a directory has InternLM2's tokenizer as Python code and SentencePiece model only."""
    model, settings = directory / MODEL, directory / SETTINGS
    if (directory / FAST).is_file() or not model.is_file() or not settings.is_file():
        return False
    try:
        return str(read_object(settings).get("tokenizer_class", "")).startswith("InternLM2Tokenizer")
    except ValueError:
        return False  # transformers says what is wrong with it


def internlm2_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """InternLM2's tokenizer of a directory, with character offsets.

    Raises ValueError if a file is damaged, or if SentencePiece gives other ids for one of a few probing texts.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    settings = read_object(directory / SETTINGS)
    proto = _sentencepiece_model(directory / MODEL)
    added = _added_tokens(settings, directory)
    # An added token may have the id of a piece that was kept free for it.
    pieces = {number: piece for number, piece in enumerate(proto.pieces) if number not in added}
    vocab = {piece.piece: number for number, piece in pieces.items()}
    vocab |= {token.content: number for number, token in added.items() if number < len(proto.pieces)}
    tokenizer = Tokenizer(
        BPE(
            vocab,
            merges_of(pieces.values()),
            unk_token=proto.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = _decoder(proto.normalizer_spec.add_dummy_prefix)
    tokenizer.add_tokens([added[number] for number in sorted(added)])
    # Whole in the text before any merge, as SentencePiece has them. Where it puts a space before a text, what follows
    # such a piece begins with one here and not there; InternLM2's are free names such as [UNUSED_TOKEN_1].
    whole = [piece.piece for piece in pieces.values() if piece.type == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in whole])
    for number, token in added.items():
        found = tokenizer.token_to_id(token.content)
        if found != number:
            raise ValueError(
                f"{directory / SETTINGS}: {token.content!r} has the id {number} there, but would get {found}"
            )
    tokenizer.post_processor = _ends(tokenizer, settings)
    _check_probes(tokenizer, proto.SerializeToString(), directory / MODEL)
    kept = ("model_max_length", "chat_template", "padding_side", "additional_special_tokens")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{role}_token": _special(settings, role) for role in DEFAULTS},
        clean_up_tokenization_spaces=settings.get("clean_up_tokenization_spaces", False),
        **{name: settings[name] for name in kept if name in settings},
    )


def write_fast_tokenizer(directory: Path) -> None:
    """Replace InternLM2's tokenizer in a directory by files that need no code; raises what `internlm2_tokenizer` does.

    Any release of transformers since 4 reads them.
    """
    internlm2_tokenizer(directory).save_pretrained(directory)
    path = directory / SETTINGS
    settings = read_object(path) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if "extra_special_tokens" in settings:  # its name before release 5, which reads both
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for replaced in (directory / MODEL, *directory.glob(CODE)):
        replaced.unlink()


def merges_of(pieces: Iterable[Any]) -> list[tuple[str, str]]:
    """Merges of SentencePiece's BPE in the order of their precedence.

    SentencePiece merges the two neighbours whose joint piece has the highest score, whichever way it is split.
    """
    scores = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}
    merges = []
    # Sorting keeps the order of equal scores: that of the pieces, and the longer left half first.
    for text in sorted(scores, key=lambda text: -scores[text]):
        cuts = range(len(text) - 1, 0, -1)
        merges += [(text[:cut], text[cut:]) for cut in cuts if text[:cut] in scores and text[cut:] in scores]
    return merges


def _sentencepiece_model(path: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made on import

    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
    if proto.trainer_spec.model_type != _BPE:
        raise ValueError(f"{path} is not a BPE model, which InternLM2's is")
    if not proto.trainer_spec.byte_fallback or proto.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError(
            f"{path}: InternLM2's model has bytes for unknown characters, and spaces before words"
        )
    for number, piece in enumerate(proto.pieces):
        if "\0" in piece.piece:
            # InternLM2's has a piece of one NUL, which SentencePiece leaves out or refuses, by its version. It keeps
            # its id under a text that no merge makes; a NUL becomes its byte, as in SentencePiece 0.2.3.
            piece.piece = f"\ue000NUL{number}"
    normal = {piece.piece for piece in proto.pieces if piece.type == _NORMAL}
    for piece in proto.pieces:
        text = piece.piece
        if piece.type == _UNUSED and any(
            text[:cut] in normal and text[cut:] in normal for cut in range(1, len(text))
        ):
            raise ValueError(
                f"{path}: {text!r} is switched off but can be merged, which InternLM2's pieces cannot"
            )
    return proto


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(dummy_prefix: bool) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if dummy_prefix else steps)


def _ends(tokenizer: Tokenizer, settings: dict[str, Any]) -> Any:
    """Post-processor that adds the tokens of beginning and end that the settings ask for."""
    from tokenizers import processors

    bos, eos = _special(settings, "bos"), _special(settings, "eos")
    first = [bos] if settings.get("add_bos_token", True) else []
    last = [eos] if settings.get("add_eos_token", False) else []
    return processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", "$B", *last],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*first, *last}],
    )


def _added_tokens(settings: dict[str, Any], directory: Path) -> dict[int, AddedToken]:
    """Added tokens by id."""
    from tokenizers import AddedToken

    try:
        return {
            int(number): AddedToken(**token) for number, token in settings["added_tokens_decoder"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{directory / SETTINGS}: `added_tokens_decoder` is missing or damaged ({error}): it names the tokens that "
            f"{MODEL} does not have"
        ) from error


def _special(settings: dict[str, Any], role: str) -> str:
    """Text of a special token: the settings', or the class's where they have none or null."""
    token = settings.get(f"{role}_token") or DEFAULTS[role]
    return str(token["content"] if isinstance(token, dict) else token)


def _check_probes(tokenizer: Tokenizer, proto: bytes, model: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    try:
        original = SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise ValueError(f"{model}: SentencePiece refuses it: {error}") from error
    for text in _PROBES:
        wanted, found = original.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if wanted != found:
            raise ValueError(
                f"{model}: {text!r} would become {found} instead of SentencePiece's {wanted}; put a tokenizer.json "
                "that agrees beside it"
            )
