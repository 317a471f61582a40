"""Chat templates: convert a conversation to prompt text, token ids and labels.

Templates and label rules are those of the released code (`conversation.py` and the `preprocess_*`
functions of `internvl/train/dataset.py`). The whole text is tokenized at once; supervised tokens are determined
by their character offsets, so no token arithmetic can go wrong.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_internvlx.data.quirks import NO_QUIRKS, ReleasedQuirks
from megatron_internvlx.data.rejects import BadSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
IMAGE = "<image>"
IMG_START, IMG_CONTEXT, IMG_END = "<img>", "<IMG_CONTEXT>", "</img>"
# While tokenizing, one context token represents the whole image; its id is repeated afterwards.
_IMAGE_BLOCK = IMG_START + IMG_CONTEXT + IMG_END


@dataclass(frozen=True)
class Template:
    """Chat template. Every message is `header + text + end + gap`; `gap` is never supervised."""

    name: str
    system: str
    gap: str = ""
    user_header: str = "<|im_start|>user\n"
    answer_header: str = "<|im_start|>assistant\n"
    system_header: str = "<|im_start|>system\n"
    end: str = "<|im_end|>"
    strip: bool = False  # remove surrounding white space of messages before tokenizing
    strict_rounds: bool = True  # a leading answer is skipped, then human and gpt must alternate

    @property
    def reserved(self) -> tuple[str, ...]:
        """Special tokens that message text must not contain, because they would imitate the template."""
        return (self.end, self.user_header.split("user")[0], IMG_CONTEXT)


_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
    "英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
TEMPLATES = {
    template.name: template
    for template in (
        Template("internlm2-chat", _SYSTEM, strip=True),
        Template("Hermes-2", _SYSTEM),
        Template("internvl2_5", _SYSTEM_2_5, gap="\n", strict_rounds=False),
    )
}


@dataclass(frozen=True)
class Encoded:
    """A tokenized conversation of n tokens.

    `input_ids` int64 [n]; `labels` int64 [n], `-100` where ignored, not shifted; `is_visual` bool
    [n], True at image placeholders; `attention_mask` bool [n], or None if every token is attended to;
    `num_images` number of used images; `dropped_tokens` number of tokens cut from the end by the limits.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    is_visual: np.ndarray
    attention_mask: np.ndarray | None
    num_images: int
    dropped_tokens: int


def get_template(name: str) -> Template:
    """Template with this name. Raises ValueError that lists the known ones."""
    if name not in TEMPLATES:
        raise ValueError(f"unknown chat template {name!r}; it must be one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def _parse_messages(
    template: Template, conversations: Sequence[Mapping[str, Any]], key: str
) -> tuple[str, list[tuple[str, str]]]:
    """Check a conversation; returns the system text and the (role, text) turns, with roles `human` and `gpt`."""
    system, turns = template.system, []
    for number, message in enumerate(conversations):
        role, text = message.get("from"), message.get("value")
        if role not in ("system", "human", "gpt") or not isinstance(text, str):
            raise BadSample(
                key, "bad_message", f"turn {number} needs 'from' (system, human or gpt) and a text 'value'"
            )
        if role == "system":
            if number:
                raise BadSample(key, "bad_message", f"turn {number} is a system turn; only turn 0 may be one")
            system = text
        else:
            turns.append((role, text))
    if template.strict_rounds:
        if turns and turns[0][0] == "gpt":
            turns = turns[1:]
        for number, (role, _) in enumerate(turns):
            if role != ("human", "gpt")[number % 2]:
                raise BadSample(
                    key,
                    "bad_message",
                    f"human and gpt must alternate, starting with human; turn {number} is {role}",
                )
    if not turns:
        raise BadSample(key, "bad_message", "the conversation has no human turn")
    return system, turns


def questions(template: str, conversations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Questions of all supervised answers: the human text before each answer, or "".

    Raises ValueError for an unknown template, BadSample for unusable turns.
    """
    _, turns = _parse_messages(get_template(template), conversations, "?")
    asked, found = "", []
    for role, text in turns:
        if role == "human":
            asked = text
        elif text:
            found.append(without_images(asked))
    return found


def without_images(text: str) -> str:
    """Text of a turn as a person reads it: without `<image>`, nor the `Image-1: ` that numbers several."""
    return re.sub(rf"(?:Image-\d+: ?)?{re.escape(IMAGE)}\n?", "", text).strip()


def render_prompt(
    template: str,
    conversations: Sequence[Mapping[str, Any]],
    *,
    generation_prompt: bool = False,
    key: str = "?",
) -> str:
    """Text of a conversation, with `<image>` unchanged and no message stripped.

    With `generation_prompt` it ends with the header of the answer to generate: that of the last gpt turn,
    whose text is omitted, or a new one after a human turn. Raises ValueError for an unknown template, BadSample
    with `key` for unusable turns.
    """
    form = get_template(template)
    system, turns = _parse_messages(form, conversations, key)
    text = form.system_header + system + form.end + form.gap
    last = len(turns) - 1
    for number, (role, message) in enumerate(turns):
        text += form.user_header if role == "human" else form.answer_header
        if role == "gpt" and number == last and generation_prompt:
            return text
        # In the released templates a turn without text is only its header.
        text += message + form.end + form.gap if message else ""
    return text + form.answer_header if generation_prompt else text


@lru_cache(maxsize=8)
def _special_ids(tokenizer: "PreTrainedTokenizerBase", template: Template) -> tuple[int, int | None]:
    """Ids of IMG_CONTEXT and of the bos token that this tokenizer adds (None if it adds none)."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} has no character offsets; convert it to a fast tokenizer "
            "(a directory with tokenizer.json)"
        )
    for token in (IMG_START, IMG_CONTEXT, IMG_END, *template.reserved):
        ids = tokenizer(token, add_special_tokens=False).input_ids
        if len(ids) != 1 or tokenizer.convert_ids_to_tokens(ids[0]) != token:
            raise ValueError(
                f"the tokenizer has no single token {token!r} (it gives ids {ids}), which template "
                f"{template.name!r} needs; add it as a special token and resize the embeddings"
            )
    # Found by tokenizing: `add_bos_token` is not reliable in every transformers version.
    first = tokenizer("").input_ids[:1]
    bos = first[0] if first and first[0] == tokenizer.bos_token_id else None
    return tokenizer(IMG_CONTEXT, add_special_tokens=False).input_ids[0], bos


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", template: str) -> None:
    """Check that a tokenizer has the tokens of a template. Raises ValueError with the remedy."""
    _special_ids(tokenizer, get_template(template))


def _place_images(
    system: str, turns: list[tuple[str, str]], num_images: int, quirks: ReleasedQuirks, key: str
) -> tuple[list[tuple[str, str]], int]:
    """Replace the first `num_images` `<image>` of the human turns with image blocks; returns turns and their number."""
    usable = sum(text.count(IMAGE) for role, text in turns if role == "human")
    elsewhere = system.count(IMAGE) + sum(text.count(IMAGE) for role, text in turns if role == "gpt")
    if not quirks.literal_surplus_placeholders and (usable > num_images or elsewhere):
        raise BadSample(
            key,
            "placeholder_mismatch",
            f"{usable} {IMAGE} placeholders in human turns and {elsewhere} elsewhere for {num_images} images;"
            f" every image needs exactly one {IMAGE}, in a human turn",
        )
    if not quirks.drop_surplus_images and usable < num_images:
        raise BadSample(
            key,
            "placeholder_mismatch",
            f"{usable} {IMAGE} placeholders in human turns for {num_images} images",
        )
    placed, left = [], min(num_images, usable)
    for role, text in turns:
        here = min(left, text.count(IMAGE)) if role == "human" else 0
        placed.append((role, text.replace(IMAGE, _IMAGE_BLOCK, here)))
        left -= here
    return placed, min(num_images, usable)


def _check_text(
    form: Template, system: str, turns: list[tuple[str, str]], quirks: ReleasedQuirks, key: str
) -> None:
    for role, text in [("system", system), *turns]:
        for token in form.reserved:
            if token in text:
                raise BadSample(
                    key,
                    "reserved_token",
                    f"a {role} message contains {token!r}, which only the template may write",
                )
        if role == "gpt" and not text and not quirks.ignore_labels_on_length_mismatch:
            raise BadSample(key, "empty_answer", "a gpt message has no text")


def _compose(
    form: Template, system: str, turns: list[tuple[str, str]]
) -> tuple[list[str], list[tuple[int, int]]]:
    """Compose the pieces of the text (system turn, then one per turn) and the supervised spans in characters."""
    pieces = [form.system_header + system + form.end + form.gap]
    spans, length = [], len(pieces[0])
    for role, text in turns:
        header = form.user_header if role == "human" else form.answer_header
        body = text + form.end if text else ""
        if role == "gpt" and text:
            spans.append((length + len(header), length + len(header) + len(body)))
        pieces.append(header + body + (form.gap if text else ""))
        length += len(pieces[-1])
    return pieces, spans


def _compose_checked(
    form: Template, conversations: Sequence[Mapping[str, Any]], images: int, compat: ReleasedQuirks, key: str
) -> tuple[list[tuple[str, str]], int, list[str], list[tuple[int, int]]]:
    """Turns, number of used images, pieces of the text, and supervised spans of a conversation, all checked."""
    system, turns = _parse_messages(form, conversations, key)
    if form.strip:
        turns = [(role, text.strip()) for role, text in turns]
    _check_text(form, system, turns, compat, key)
    turns, used = _place_images(system, turns, images, compat, key)
    return turns, used, *_compose(form, system, turns)


def training_text(
    template: str, conversations: Sequence[Mapping[str, Any]], images: int, *, key: str = "?"
) -> tuple[str, list[tuple[int, int]]]:
    """Text to tokenize, one placeholder for each image, and its supervised spans in characters. Errors of `encode`."""
    _, _, pieces, spans = _compose_checked(get_template(template), conversations, images, NO_QUIRKS, key)
    return "".join(pieces), spans


def _label_answers(
    ids: np.ndarray, offsets: np.ndarray, spans: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of all tokens, -100 outside the spans, and a mask of the last token of each span."""
    labels, last = np.full_like(ids, IGNORE_INDEX), np.zeros(len(ids), dtype=bool)
    for start, stop in spans:
        # A token across the end of the header belongs to the prompt at inference, so it is not supervised.
        inside = np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 0] < stop))
        labels[inside] = ids[inside]
        last[inside[-1]] = True
    return labels, last


def _lengths_differ(
    tokenizer: "PreTrainedTokenizerBase", pieces: list[str], turns: list[tuple[str, str]], ids: np.ndarray
) -> bool:
    """Length check of the released code: whether the parts have other tokens than the whole, padding excluded."""
    parts = tokenizer(pieces, add_special_tokens=False, verbose=False).input_ids
    empty = sum(role == "gpt" and not text for role, text in turns)  # counted with an end token they lack
    return sum(map(len, parts)) + empty != int((ids != tokenizer.pad_token_id).sum())


def _kept_length(
    labels: np.ndarray,
    last: np.ndarray,
    is_visual: np.ndarray,
    limits: tuple[int | None, int | None],
    partial: bool,
    key: str,
) -> int:
    """Number of tokens to keep of a sample under `limits` of all and of supervised tokens, None for no limit.

    Raises BadSample if an image or every answer is cut.
    """
    total, most = len(labels), limits[1]
    limit = total if limits[0] is None else limits[0]
    by, name = "length limit", ""
    remedy = "raise the sequence length, or lower max_tiles or the tokens per tile"
    supervised = np.flatnonzero(labels != IGNORE_INDEX) if most is not None else np.zeros(0)
    if most is not None and len(supervised) > most and supervised[most] < limit:
        limit, name = int(supervised[most]), f" ({len(supervised)} supervised tokens, of which {most} fit)"
        by = "budget of supervised tokens"
        remedy = "raise --max-supervised-tokens-per-pack, which the samples of a micro-batch share, or split the record"
    if total <= limit:
        return total
    num_visual = int(is_visual.sum())
    ends = np.flatnonzero(last[:limit])
    kept = limit if partial else (int(ends[-1]) + 1 if len(ends) else 0)
    images_end = int(np.flatnonzero(is_visual)[-1]) + 2 if num_visual else 0  # past </img>
    if images_end > limit or (kept and images_end > kept):
        raise BadSample(
            key,
            "image_truncated",
            f"{total} tokens ({num_visual} of images, the last ends at token {images_end}): the limit of "
            f"{limit}{name} would cut an image block or separate it from its answer; {remedy}",
        )
    if not (labels[:kept] != IGNORE_INDEX).any():
        first = int(np.flatnonzero(last)[0]) + 1
        raise BadSample(
            key,
            "answer_truncated",
            f"the answer is cut by the {by}: {total} tokens ({num_visual} of images), the first "
            f"answer ends at token {first}, the limit is {limit}{name}; {remedy}",
        )
    return kept


def _tokenize(
    tokenizer: "PreTrainedTokenizerBase", pieces: list[str], spans: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    text = tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(text.input_ids, dtype=np.int64)
    return ids, *_label_answers(ids, np.asarray(text.offset_mapping, dtype=np.int64).reshape(-1, 2), spans)


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    conversations: Sequence[Mapping[str, Any]],
    *,
    image_tokens: Sequence[int],
    max_length: int | None,
    max_supervised: int | None = None,
    compat: ReleasedQuirks = NO_QUIRKS,
    key: str = "?",
) -> Encoded:
    """Tokenize a conversation and label its answers, each with its end token.

    `image_tokens`: number of placeholders of each image, in the order of the `<image>` they replace.
    `max_length`: maximum number of tokens, including bos and images; None: no limit. `max_supervised`: maximum number
    of supervised tokens; None: no limit. A longer conversation is cut after its last complete answer that fits; an
    image block is never cut or dropped.

    Raises ValueError for an unknown template or a tokenizer without the needed special tokens, and
    BadSample with `key`: bad_message, reserved_token, empty_answer, placeholder_mismatch, no_supervision,
    image_truncated, answer_truncated.
    """
    form = get_template(template)
    context_id, bos = _special_ids(tokenizer, form)
    turns, num_images, pieces, spans = _compose_checked(form, conversations, len(image_tokens), compat, key)
    ids, labels, last = _tokenize(tokenizer, pieces, spans)

    repeats = np.ones(len(ids), dtype=np.int64)
    repeats[ids == context_id] = image_tokens[:num_images]
    num_tokens = int(repeats.sum()) + (bos is not None)
    fits = max_length is None or num_tokens <= max_length
    no_loss = num_images < len(image_tokens) or (
        compat.ignore_labels_on_length_mismatch
        and form.strict_rounds
        and fits
        and _lengths_differ(tokenizer, pieces, turns, ids)
    )
    if not spans and not no_loss:
        raise BadSample(key, "no_supervision", "the conversation has no gpt turn with text")
    ids, labels, last = (np.repeat(row, repeats) for row in (ids, labels, last))
    if bos is not None:
        ids, labels, last = np.r_[bos, ids], np.r_[IGNORE_INDEX, labels], np.r_[False, last]
    is_visual = ids == context_id
    limits = (max_length, None if no_loss else max_supervised)
    kept = _kept_length(labels, last, is_visual, limits, compat.partial_answers, key)
    if no_loss:
        labels[:] = IGNORE_INDEX
    ids, labels, is_visual = ids[:kept], labels[:kept], is_visual[:kept]
    attention_mask = ids != 0 if compat.mask_id_zero else None
    return Encoded(ids, labels, is_visual, attention_mask, num_images, num_tokens - kept)
