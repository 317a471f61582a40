"""Counting of bad samples, the rejects file, and the stop."""

import json
import pickle

import pytest

from megatron_internvlx.data.rejects import BadSample, RejectLog, TooManyRejects


def test_bad_sample_survives_pickling():
    bad = pickle.loads(pickle.dumps(BadSample("a.jsonl:1", "bomb", "too large")))
    assert (bad.key, bad.cause, bad.detail) == ("a.jsonl:1", "bomb", "too large")
    assert str(bad) == "a.jsonl:1: bomb: too large"


def test_each_record_is_counted_and_written_once(tmp_path):
    path = tmp_path / "runs" / "rejects.jsonl"
    log = RejectLog(path, max_rejects=2)
    for _ in range(3):
        log.add(BadSample("a.jsonl:1", "bomb", "too large"))
    log.add(BadSample("a.jsonl:2", "missing_image", "图.png"))
    assert log.total == 2
    assert log.summary() == "bomb 1, missing_image 1"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["key"] for line in lines] == ["a.jsonl:1", "a.jsonl:2"]
    assert lines[1] == {"key": "a.jsonl:2", "cause": "missing_image", "detail": "图.png"}


def test_a_resumed_run_writes_known_records_once_and_survives_a_cut_line(tmp_path):
    path = tmp_path / "rejects.jsonl"
    RejectLog(path, None).add(BadSample("a:1", "bomb", "x"))
    with path.open("a") as file:
        file.write('{"key": "a:2", "cau\n')
    log = RejectLog(path, None)
    log.add(BadSample("a:1", "bomb", "x"))
    log.add(BadSample("a:2", "bomb", "x"))
    assert log.total == 2
    assert len(path.read_text().splitlines()) == 3


def test_too_many_stop_with_counts_and_remedy(tmp_path):
    log = RejectLog(None, max_rejects=1)
    log.add(BadSample("a:1", "bomb", "x"))
    with pytest.raises(
        TooManyRejects, match=r"2 bad records, 1 are allowed \(bomb 2\).*raise the number"
    ) as caught:
        log.add(BadSample("a:2", "bomb", "x"))
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ValueError, match="max_rejects is -1"):
        RejectLog(None, -1)
