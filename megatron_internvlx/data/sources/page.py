"""HTML page of a prepared data set: what was found, what was left out, and sampled records as training sees them."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from megatron_internvlx.data.conversation import IMG_CONTEXT, IMG_END, IMG_START, TEMPLATES
from megatron_internvlx.data.decode_pil import UPRIGHT, orientation, read_header
from megatron_internvlx.data.sample import EncoderSettings, ImageTiles
from megatron_internvlx.data.sources.page_style import SCRIPT, STYLE
from megatron_internvlx.data.sources.record import CAUSES, LeftOut
from megatron_internvlx.data.sources.samples import Shown
from megatron_internvlx.data.sources.survey import SetReport, Survey

THUMBNAIL_SIDE = 460  # pixels; embedded, so that the page is one file that can be shared
_MOST_TEXT = 900  # characters of a part that are shown
_BLOCK = IMG_START + IMG_CONTEXT + IMG_END


def _text(text: object) -> str:
    return html.escape(str(text))


def _picture(image: ImageTiles, settings: EncoderSettings) -> str:
    """The image as an SVG with the lines along which it is cut, or a sentence if it cannot be decoded."""
    try:
        small = _small(image)
    except Exception as error:  # whatever a decoder raises on a file that was not decoded before
        why = _text(f"{Path(image.path).name} cannot be decoded, training will refuse it: {error}"[:300])
        return f"<figure><p class=warning>{why}</p><figcaption>{_cut_line(image, settings)}</figcaption></figure>"
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = small.size
    lines = [f"M{width * i / image.cols:.1f} 0V{height}" for i in range(1, image.cols)]
    lines += [f"M0 {height * i / image.rows:.1f}H{width}" for i in range(1, image.rows)]
    path = "".join(lines)
    grid = f'<path class="below" d="{path}"/><path class="above" d="{path}"/>' if path else ""
    name = _text(Path(image.path).name)
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" style="--w:{width}px" role="img" aria-label="{name}">'
        f'<image width="{width}" height="{height}" href="data:image/jpeg;base64,{data}"/>{grid}</svg>'
        f"<figcaption>{_cut_line(image, settings)}</figcaption></figure>"
    )


def _small(image: ImageTiles) -> Image.Image:
    """The image upright, with sides of at most `THUMBNAIL_SIDE` pixels."""
    with read_header(image.path) as opened:
        turn = UPRIGHT.get(orientation(opened))
        opened.draft("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        small = opened.convert("RGB")
    if turn is not None:
        small = small.transpose(turn)
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    return small


def _cut_line(image: ImageTiles, settings: EncoderSettings) -> str:
    tiles = image.num_tiles
    whole = " + the whole image" if tiles > image.cols * image.rows else ""
    shallow, deep = tiles * settings.shallow_per_tile, tiles * settings.tokens_per_tile
    tokens = f"{deep:,} tokens" if shallow == deep else f"{shallow:,} → {deep:,} tokens"
    return (
        f"<b>{image.width:,} × {image.height:,}</b> cut {image.cols} × {image.rows}{whole} · "
        f"{tiles} tile{'s' * (tiles > 1)} · {tokens}"
    )


def _part(text: str, images: list[ImageTiles]) -> str:
    """A piece of the text: special tokens faint, image blocks as chips, long text shortened in its middle."""
    if len(text) > _MOST_TEXT and _BLOCK not in text:
        half = _MOST_TEXT // 2
        hidden = len(text) - 2 * half
        return (
            f"{_part(text[:half], images)}<i class=cut>… {hidden:,} characters not shown …</i>"
            f"{_part(text[-half:], images)}"
        )
    shown = ""
    for number, piece in enumerate(text.split(_BLOCK)):
        if number:
            tiles = images.pop(0).num_tiles if images else 0
            shown += f"<span class=chip>image · {tiles} tile{'s' * (tiles != 1)}</span>"
        shown += _text(piece)
    for token in ("<|im_start|>", "<|im_end|>"):
        shown = shown.replace(_text(token), f"<span class=token>{_text(token)}</span>")
    return shown


def _conversation(record: Shown, template: str) -> str:
    """Text of a record with supervised parts marked, the system turn of the template folded away."""
    images, shown, place = list(record.images), "", 0
    head = TEMPLATES[template].system_header + TEMPLATES[template].system
    if record.text.startswith(head):
        end = record.text.find("<|im_end|>") + len("<|im_end|>")
        place = end + len(TEMPLATES[template].gap)
        shown = (
            f"<details><summary>system turn of {template}</summary>{_part(record.text[:end], [])}</details>"
        )
    for start, stop in record.spans:
        shown += (
            _part(record.text[place:start], images) + f"<mark>{_part(record.text[start:stop], [])}</mark>"
        )
        place = stop
    return f"<div class=text>{shown}{_part(record.text[place:], images).rstrip()}</div>"


def _card(record: Shown, settings: EncoderSettings) -> str:
    badges = "".join(f"<span class=badge>{_text(why)}</span>" for why in record.why)
    badges += "<span class='badge held'>validation</span>" if record.held_out else ""
    pictures = "".join(_picture(image, settings) for image in record.images[:4])
    if len(record.images) > 4:
        pictures += f"<p class=more>and {len(record.images) - 4} more images</p>"
    if record.tokens is None:
        counts = f"{record.characters:,} characters of text"
    else:
        counts = f"{record.tokens:,} tokens, {record.supervised:,} of them learnt"
    mends = f"<p class=mend>mended: {_text('; '.join(record.mends))}</p>" if record.mends else ""
    warning = f"<p class=warning>{_text(record.warning)}</p>" if record.warning else ""
    return (
        f"<article><header><b>{_text(record.key)}</b><span>{badges}</span></header>{pictures}"
        f"{_conversation(record, settings.template)}{warning}{mends}"
        f"<footer>{_text(record.set_name)} · {counts}</footer></article>"
    )


def _tile_bars(survey: Survey) -> str:
    """Bars of the number of records by their tiles."""
    counts = Counter(survey.tiles)
    most = max(counts.values())
    rows = "".join(
        f"<tr><td>{tiles}</td><td><i style='width:{max(1, 100 * count // most)}%'></i></td><td>{count:,}</td></tr>"
        for tiles, count in sorted(counts.items())[:16]
    )
    return f"<section><h2>Tiles of a record</h2><table class=bars>{rows}</table></section>"


def _sets(reports: Sequence[SetReport]) -> str:
    rows = "".join(
        f"<tr><td><b>{_text(r.source.name)}</b></td><td>{_text(r.source.kind)}</td><td class=n>{r.records:,}</td>"
        f"<td class=n>{len(r.images):,}</td><td class=n>{r.rounds:,}</td><td class=n>{r.left_out.total():,}</td></tr>"
        for r in reports
    )
    return (
        "<section class=wide><h2>Sets</h2><table class=list><tr><th>name</th><th>read as</th><th class=n>records</th>"
        f"<th class=n>images</th><th class=n>answers</th><th class=n>left out</th></tr>{rows}</table></section>"
    )


def _left_out(reports: Sequence[SetReport]) -> str:
    causes = sum((report.left_out for report in reports), Counter[str]())
    if not causes:
        return "<section><h2>Left out</h2><p class=good>nothing</p></section>"
    examples: dict[str, list[LeftOut]] = {}
    for report in reports:
        for error in report.examples:
            examples.setdefault(error.cause, []).append(error)
    rows = ""
    for cause, count in causes.most_common():
        details = "".join(
            f"<p><b>{_text(e.key)}</b> {_text(e.detail)}</p>" for e in examples.get(cause, [])[:3]
        )
        meaning = _text(CAUSES[cause].replace("`", ""))
        rows += f"<tr><td class=n>{count:,}</td><td><b>{cause}</b><br><small>{meaning}</small></td>"
        rows += f"<td>{details}</td></tr>"
    return f"<section class=wide><h2>Left out</h2><table class='list causes'>{rows}</table></section>"


def _counts(title: str, counts: Counter[str]) -> str:
    if not counts:
        return ""
    rows = "".join(
        f"<tr><td class=n>{n:,}</td><td>{_text(what)}</td></tr>" for what, n in counts.most_common()
    )
    return f"<section><h2>{title}</h2><table class=list>{rows}</table></section>"


def page_text(survey: Survey, shown: Sequence[Shown], held_out: int, settings: EncoderSettings) -> str:
    """The page, one HTML file that loads nothing.

    Args:
        survey: what was found.
        shown: sampled records.
        held_out: number of records kept for validation.
        settings: template, tiles and lengths of the training.
    """
    reports = survey.reports
    records, images = len(survey), sum(len(report.images) for report in reports)
    facts = [
        (f"{records:,}", "records"),
        (f"{images:,}", "images"),
        (f"{sum(r.rounds for r in reports):,}", "answers to learn"),
        (f"{sum(survey.tiles) / records:.1f}", "tiles a record"),
        (f"{held_out:,}", "held out"),
        (f"{sum(r.left_out.total() for r in reports):,}", "left out"),
    ]
    tiles = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in facts)
    names = ", ".join(report.source.name for report in reports)
    limit = f", {settings.max_length:,} tokens at most" if settings.max_length else ""
    how = (
        f"template {settings.template}, tiles of {settings.tile_size} pixels, {settings.max_tiles} at most, "
        f"RVTC {settings.rvtc}{limit}"
    )
    mends = sum((report.mends for report in reports), Counter[str]())
    remarks = sum((report.remarks for report in reports), Counter[str]())
    cards = "".join(_card(record, settings) for record in shown)
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{_text(names)}: prepared data</title><style>{STYLE}</style></head><body>"
        f"<button id=theme type=button aria-label='light or dark'>◐</button><h1>{_text(names)}</h1>"
        f"<p class=sub>{_text(how)}</p><div class=facts>{tiles}</div><div class=sections>{_sets(reports)}"
        f"{_tile_bars(survey)}{_counts('Mended', mends)}{_counts('Good to know', remarks)}{_left_out(reports)}</div>"
        f"<h2>{len(shown)} of {records:,} records, as training sees them</h2>"
        "<p class=sub><mark>Marked</mark> text is what the model learns to write; lines are where an image is cut "
        f"into tiles.</p><div class=cards>{cards}</div><script>{SCRIPT}</script></body></html>\n"
    )
