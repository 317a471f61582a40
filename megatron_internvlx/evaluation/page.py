"""HTML page that shows predictions: images, questions, answers."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from megatron_internvlx.evaluation.metrics import metric_lines

IMAGE_SIDE = 360  # pixels; images are embedded, so that the page is one file that can be shared

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#212529;margin:2rem auto;max-width:75rem;padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 .3rem}p.sub{color:#6c757d;margin:0 0 1.2rem}
table{border-collapse:collapse;margin:0 0 1.5rem}td,th{padding:.25rem 1rem .25rem 0;text-align:left}
th{color:#6c757d;font-weight:500}label{margin-right:1.2rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem;margin-top:1rem}
.card{border:1px solid #dee2e6;border-top:4px solid #1a7f37;border-radius:6px;padding:.8rem}
.card.wrong{border-top-color:#b42318}
.card img{max-width:100%;max-height:15rem;display:block;margin:0 auto .6rem;image-rendering:auto}
.q{font-weight:600;white-space:pre-wrap}.wrong .g{color:#b42318}.right .g{color:#1a7f37}
.k{color:#6c757d;font-size:.85rem;margin-top:.4rem}
#r:not(:checked)~.grid .right,#w:not(:checked)~.grid .wrong{display:none}
"""


def _image_tag(path: str) -> str:
    """HTML <img> tag with the downscaled image embedded; a note if it cannot be read."""
    try:
        with Image.open(path) as image:
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
            buffer = io.BytesIO()
            small.save(buffer, format="JPEG", quality=85)
    except (OSError, UnidentifiedImageError):
        return f"<p class=k>{html.escape(Path(path).name)} cannot be read</p>"
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(Path(path).name)}" src="data:image/jpeg;base64,{data}">'


def _card(row: Mapping[str, Any]) -> str:
    kind = "right" if row["correct"] else "wrong"
    pictures = "".join(_image_tag(path) for path in row["images"])
    grid = f"{row['cols']}x{row['rows']} tiles" + (" and thumbnail" if row["thumbnail"] else "")
    score = "" if row["score"] in (0, 1) else f"{row['metric']} {row['score']:.2f}"
    facts = " · ".join(filter(None, [score, row["kind"], grid if row["images"] else "no image", row["key"]]))
    wanted = " / ".join(dict.fromkeys(row["references"]))
    expected = "" if row["score"] == 1 else f"<div>expected: {html.escape(wanted)}</div>"
    return (
        f'<div class="card {kind}">{pictures}<div class=q>{html.escape(row["question"])}</div>'
        f"<div class=g>{html.escape(row['given']) or '(nothing)'}</div>{expected}"
        f"<div class=k>{html.escape(facts)}</div></div>"
    )


def write_page(
    path: Path, title: str, scores: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], most: int = 300
) -> None:
    """Write the page: scores, then at most `most` answers, the lowest score first."""
    kinds = "".join(
        f"<tr><td>{html.escape(kind)}</td><td>{right} of {asked}</td><td>{100 * right / asked:.1f} %</td>"
        f"<td>{100 * scores['score_by_kind'][kind]:.1f} %</td></tr>"
        for kind, (right, asked) in scores["by_kind"].items()
    )
    shown = sorted(rows, key=lambda row: row["score"])[:most]
    left_out = f", {len(rows) - len(shown)} of the best left out" if len(shown) < len(rows) else ""
    line = (
        f"{scores['answers']} answers: exact match {100 * scores['exact_match']:.1f} %, "
        f"ANLS {100 * scores['anls']:.1f} %, relaxed accuracy {100 * scores['relaxed_accuracy']:.1f} %; "
        f"{scores['tokens_per_second']:.0f} tokens/s{left_out}"
    )
    chosen = "".join(f"<p class=sub>{html.escape(text)}</p>" for text in metric_lines(scores))
    cards = "".join(_card(row) for row in shown)
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p class=sub>{line}</p>{chosen}"
        f"<table><tr><th>kind</th><th>right</th><th></th><th>mean score</th></tr>{kinds}</table>"
        "<input type=checkbox id=w checked><label for=w> wrong</label>"
        "<input type=checkbox id=r checked><label for=r> right</label>"
        f"<div class=grid>{cards}</div></html>\n",
        encoding="utf-8",
    )
