"""RVTC against 4,800 grids that the released InternVL-X ('edge') and InternVL ('off') code chose.

Of training, and of the code that an export brings along.
"""

import json
from pathlib import Path

import pytest

from megatron_internvlx.data import rvtc
from megatron_internvlx.data.rvtc import tile_count
from megatron_internvlx.hf import processing_internvlx

GRID = Path(__file__).parents[1] / "golden" / "rvtc" / "grid.jsonl"


@pytest.mark.parametrize("code", [rvtc, processing_internvlx], ids=["training", "export"])
@pytest.mark.parametrize(("policy", "column"), [("edge", "rvtc"), ("off", "base")])
def test_every_golden_row(policy, column, code):
    rows = [json.loads(line) for line in GRID.read_text().splitlines()]
    assert len(rows) == 4800
    wrong = []
    for row in rows:
        cols, rows_ = code.tile_grid(row["w"], row["h"], max_tiles=row["max_num"], policy=policy)
        got = [cols, rows_, tile_count(cols, rows_, thumbnail=row["thumb"])]
        if got != row[column]:
            wrong.append((row, got))
    assert not wrong, f"{len(wrong)} of {len(rows)} rows differ, first: {wrong[0]}"
