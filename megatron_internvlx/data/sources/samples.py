"""Choose the records that a page shows, and work out how training sees each: tiles, text, supervised parts, tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_internvlx.data.conversation import training_text
from megatron_internvlx.data.decode_pil import image_size
from megatron_internvlx.data.manifest import Record
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.data.rvtc import tile_grid
from megatron_internvlx.data.sample import EncoderSettings, ImageTiles, SampleEncoder
from megatron_internvlx.data.sources.survey import Survey

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Shown:
    """One record of the page.

    `why` are the extremes that it stands for ("longest text"); `text` is what is tokenized, `spans` its supervised
    parts in characters; `tokens` is None without a tokenizer; `warning` says what training would cut or refuse.
    """

    key: str
    set_name: str
    held_out: bool
    why: list[str]
    images: tuple[ImageTiles, ...]
    text: str
    spans: list[tuple[int, int]]
    characters: int
    tokens: int | None
    supervised: int | None
    mends: list[str]
    warning: str


def choose_samples(survey: Survey, count: int, seed: int) -> dict[int, list[str]]:
    """Numbers of at most `count` records, in order, with what is extreme about each.

    The extremes come first; the rest is spread evenly over the sets, by a hash of seed and place.
    """
    numbers = range(len(survey))
    pictured = [n for n in numbers if survey.sizes[survey.node_of[n]] != (0, 0)]

    def area(number: int) -> int:
        width, height = survey.sizes[survey.node_of[number]]
        return width * height

    chosen: dict[int, list[str]] = {}
    extremes = [
        ("longest text", max(numbers, key=survey.characters.__getitem__, default=None)),
        ("shortest text", min(numbers, key=survey.characters.__getitem__, default=None)),
        ("most tiles", max(pictured, key=survey.tiles.__getitem__, default=None)),
        ("largest picture", max(pictured, key=area, default=None)),
        ("smallest picture", min(pictured, key=area, default=None)),
    ]
    for why, number in extremes:
        if number is not None and (number in chosen or len(chosen) < count):
            chosen.setdefault(number, []).append(why)
    drawn = sorted(
        (n for n in numbers if n not in chosen), key=lambda n: hashlib.sha256(b"%d/%d" % (seed, n)).digest()
    )
    turns: dict[int, int] = {}
    rounds = []
    for number in drawn:  # the first of every set, then the second of every set, ...
        turn = turns[survey.set_of[number]] = turns.get(survey.set_of[number], 0) + 1
        rounds.append((turn, survey.set_of[number], number))
    for _, _, number in sorted(rounds)[: max(0, count - len(chosen))]:
        chosen[number] = []
    return dict(sorted(chosen.items()))


def look_at(
    survey: Survey,
    number: int,
    why: Sequence[str],
    held_out: set[int],
    settings: EncoderSettings,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Shown:
    """Text, tiles and tokens of a record of the survey as training sees them."""
    line = survey.line(number)
    report = survey.reports[survey.set_of[number]]
    paths = [str(survey.work / name) for name in line["images"]]
    own = report.source.entry.max_dynamic_patch
    data = {"image": paths, "conversations": line["turns"]}
    record = Record(line["key"], data, "", False, own)
    text, spans = training_text(settings.template, line["turns"], len(paths), key=line["key"])
    images = _cut(paths, own, settings)
    tokens = supervised = None
    warning = ""
    if tokenizer is not None:
        try:
            sample = SampleEncoder(tokenizer, settings).encode(record)
        except BadSample as bad:
            warning = f"training refuses it: {bad.cause}: {bad.detail}"
            try:
                sample = SampleEncoder(tokenizer, replace(settings, max_length=None, budget=None)).encode(
                    record
                )
            except BadSample:
                sample = None
        if sample is not None:
            tokens, supervised = len(sample.input_ids), int((sample.labels != -100).sum())
            cut = [
                f"{n:,} {what}"
                for n, what in ((sample.dropped_tiles, "tiles"), (sample.dropped_tokens, "tokens"))
                if n
            ]
            warning = warning or (
                f"training cuts it: {' and '.join(cut)} over the sequence length" if cut else ""
            )
    return Shown(
        line["key"],
        report.source.name,
        survey.groups.find(survey.node_of[number]) in held_out,
        list(why),
        images,
        text,
        spans,
        survey.characters[number],
        tokens,
        supervised,
        line["mends"],
        warning,
    )


def _cut(paths: list[str], own: int | None, settings: EncoderSettings) -> tuple[ImageTiles, ...]:
    most = max(1, (own or settings.max_tiles) // max(1, len(paths)))
    cut: list[ImageTiles] = []
    for path in paths:
        width, height = image_size(Path(path))
        cols, rows = 1, 1
        if settings.dynamic_image_size:
            options: dict[str, Any] = {"tile_size": settings.tile_size, "policy": settings.rvtc}
            cols, rows = tile_grid(
                width, height, min_tiles=min(settings.min_tiles, most), max_tiles=most, **options
            )
        cut.append(ImageTiles(path, width, height, cols, rows, settings.use_thumbnail))
    return tuple(cut)
