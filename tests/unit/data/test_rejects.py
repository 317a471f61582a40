"""Counting of bad samples, the rejects file, and the stop."""

import json
import pickle

import pytest

from megatron_internvlx.data.rejects import BadSample, RejectLog, TooManyRejects, blamed_on


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
        TooManyRejects,
        match=r"2 bad records, 1 are allowed \(different records bad so far: bomb 2.*raise --max-rejects",
    ) as caught:
        log.add(BadSample("a:2", "bomb", "x"))
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ValueError, match="max_rejects -1"):
        RejectLog(None, -1)


def test_what_no_file_takes_is_escaped(tmp_path):
    log = RejectLog(tmp_path / "rejects.jsonl", None)
    log.add(BadSample("a\udc80.jsonl:1", "bad_message", "half \ud800"))
    (line,) = (tmp_path / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["detail"] == "half \\ud800"


def test_whatever_work_on_a_record_raises_is_blamed_on_it():
    for error in (ValueError("x"), RecursionError("x"), MemoryError(), UnicodeError("\ud800"), KeyError("k")):
        with pytest.raises(BadSample) as caught, blamed_on("a:1"):
            raise error
        assert (caught.value.key, caught.value.cause) == ("a:1", "unexpected_error")
        assert type(error).__name__ in caught.value.detail
    with pytest.raises(BadSample) as caught, blamed_on("a:1"):
        raise BadSample("picture.jpg", "bomb", "too large")
    assert (caught.value.key, caught.value.cause) == ("a:1", "bomb")
    with pytest.raises(KeyboardInterrupt), blamed_on("a:1"):
        raise KeyboardInterrupt


def test_what_to_do_when_nothing_is_usable():
    log = RejectLog(None, None)
    for number in range(19):
        log.add(BadSample(f"a:{number}", "missing_image", "x"))
        log.count_samples(0, 2)
    log.count_samples(3, 0)  # text only, as most mixtures have some
    said = log.nothing_found("64 tries")
    assert said.startswith(
        "64 tries in a row found no usable record (different records bad so far: missing_image 19"
    )
    assert "`root` in meta.json is probably wrong" in said
    assert "--rejects-file FILE or --save lists them" in said
    log.count_samples(1, 0, pictured=1)  # one image is there, so the root is not to blame
    assert "root" not in log.nothing_found("64 tries")
    log = RejectLog(None, None)
    log.add(BadSample("a:1", "missing_key", "tools/convert_messages.py writes one as the other"))
    log.count_samples(0, 1)
    assert "root" not in log.nothing_found("64 tries")
    assert "the last is a:1: missing_key: tools/convert_messages.py" in log.nothing_found("64 tries")


def test_the_share_of_bad_samples_does_not_shrink_when_they_come_again():
    log = RejectLog(None, None, max_rate=0.5)
    with pytest.raises(TooManyRejects, match=r"140 of 200 samples are bad, 70.0%; the limit is 50.0%"):
        for _ in range(3):  # of 30 good and 70 bad records
            for number in range(70):
                log.add(BadSample(f"a:{number}", "missing_key", "x"))
            log.count_samples(30, 70)
    log = RejectLog(None, None, max_rate=0.5)
    for _ in range(10):
        log.count_samples(60, 40)


def test_what_samples_gave_up_is_added_up():
    log = RejectLog(None, None)
    log.count_removed(2, 30)
    log.count_removed(0, 5)
    assert (log.cut_tiles, log.cut_tokens) == (2, 35)
