"""Which ranks are named when a step does not end."""

import json
import time
from pathlib import Path

import pytest

from megatron_internvlx.lifecycle import stall
from megatron_internvlx.lifecycle.stall import Position, StallClock

WAITING, WORKING = "waiting for data", "computing or exchanging tensors"


HERE = Position(7, 3, WORKING)


def clock(folder: Path | None, rank: int, position: Position = HERE):
    return StallClock(60.0, folder, rank, 4, lambda: position, lambda _: None)


def age(folder: Path, rank: int, seconds: float) -> None:
    file = stall.heartbeat_file(folder, rank)
    beat = json.loads(file.read_text())
    file.write_text(json.dumps(beat | {"time": beat["time"] - seconds, "host": f"node{rank}"}))


def test_silent_ranks_are_named_by_the_lowest_that_lives(tmp_path):
    for rank in range(3):  # the fourth never began
        clock(tmp_path, rank).beat()
    age(tmp_path, 0, 50)
    age(tmp_path, 2, 0)
    reason, lines = clock(tmp_path, 1).findings()
    assert reason.startswith("no step has ended for 1 minutes; rank 0 on node0 (pid ")
    assert "no heartbeat for 50 s; it was at step 7, forward pass 3, computing" in reason
    assert "and 1 more are silent" in reason
    assert "rank 3 has never written a heartbeat" in lines[2]
    assert lines[3].endswith("ranks 1-2: step 7, forward pass 3, computing or exchanging tensors")
    assert clock(tmp_path, 2).findings()[1] == []  # rank 1 says it


def test_of_living_ranks_the_one_behind_is_named(tmp_path):
    for rank in range(4):
        clock(tmp_path, rank, Position(7, 2 if rank == 3 else 5, WAITING if rank == 3 else WORKING)).beat()
    age(tmp_path, 3, 0)
    reason, lines = clock(tmp_path, 0).findings()
    assert "furthest behind is rank 3 on node3" in reason and "forward pass 2, waiting for data" in reason
    assert lines[-1].endswith("ranks 0-2: step 7, forward pass 5, computing or exchanging tensors")


def test_nobody_is_blamed_without_evidence(tmp_path):
    for rank in range(4):
        clock(tmp_path, rank).beat()
    assert "few or none are behind" in clock(tmp_path, 0).findings()[0]
    assert "without --save" in clock(None, 3).findings()[1][0]


def test_a_file_that_cannot_be_read_is_no_sign_of_life(tmp_path):
    clock(tmp_path, 0).beat()
    assert stall.read_heartbeat(tmp_path, 0).position == HERE
    for text in ("", '{"rank": 0', "[]", '{"rank": 0, "position": 3}'):
        stall.heartbeat_file(tmp_path, 0).write_text(text)
        assert stall.read_heartbeat(tmp_path, 0) is None


def test_the_clock_beats_and_cleans_up(tmp_path, monkeypatch):
    ended = []
    one = clock(tmp_path / "heartbeats", 0)
    one.interval = 0.01
    monkeypatch.setattr(one, "_end", lambda: ended.append(True))
    one.restart()
    end = time.monotonic() + 10
    while (first := stall.read_heartbeat(one.folder, 0)) is None:
        assert time.monotonic() < end
    while stall.read_heartbeat(one.folder, 0) == first:
        assert time.monotonic() < end
    one.release()
    assert stall.read_heartbeat(one.folder, 0) is None and not ended


@pytest.mark.parametrize(("numbers", "shown"), [([], ""), ([3], "3"), ([0, 1, 2, 7, 9, 10], "0-2, 7, 9-10")])
def test_ranges(numbers, shown):
    assert stall._format_ranks(numbers) == shown
