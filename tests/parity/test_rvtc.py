"""RVTC against 4,800 grids that the released InternVL-X ('edge') and InternVL ('off') code chose."""

import json
from pathlib import Path

import pytest

from megatron_internvlx.data.rvtc import tile_count, tile_grid

GRID = Path(__file__).parents[1] / "golden" / "rvtc" / "grid.jsonl"


@pytest.mark.parametrize(("policy", "column"), [("edge", "rvtc"), ("off", "base")])
def test_every_golden_row(policy, column):
    rows = [json.loads(line) for line in GRID.read_text().splitlines()]
    assert len(rows) == 4800
    wrong = []
    for row in rows:
        cols, rows_ = tile_grid(row["w"], row["h"], max_tiles=row["max_num"], policy=policy)
        got = [cols, rows_, tile_count(cols, rows_, thumbnail=row["thumb"])]
        if got != row[column]:
            wrong.append((row, got))
    assert not wrong, f"{len(wrong)} of {len(rows)} rows differ, first: {wrong[0]}"
