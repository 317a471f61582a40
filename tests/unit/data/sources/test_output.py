"""The written directory: split by image, deterministic, whole or not there, continued and never overwritten unasked."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from megatron_internvlx.data.sources import output
from tests.preparing import (
    Item,
    items,
    photo,
    records_of,
    write_captions,
    write_csv,
    write_messages,
    write_parquet,
)


def _contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _images(meta: Path) -> set[bytes]:
    return {Path(path).read_bytes() for record in records_of(meta) for path in record["paths"]}


@pytest.mark.parametrize("validation", [0.2, 7, None])
def test_an_image_is_never_on_both_sides(validation, tmp_path, prepare):
    # 20 images, three rows each, every second one under two names: content counts, not the name.
    records = []
    for n in range(20):
        name = f"p{n}.jpg"
        records += [Item(name, photo(n), "A?", "a"), Item(name, photo(n), "B?", "b")]
        records.append(Item(f"copy{n}.jpg", photo(n), "C?", "c"))
    write_csv(tmp_path, records)
    share = () if validation is None else ("--validation", validation)
    prepare(tmp_path, "--out", tmp_path / "out", *share)
    train, held = (_images(tmp_path / "out" / name) for name in ("meta.json", "meta_val.json"))
    assert train
    assert held
    assert not train & held
    count = len(records_of(tmp_path / "out" / "meta_val.json"))
    assert count == {0.2: 12, 7: 6, None: 3}[validation]


def test_records_that_share_images_stay_together(tmp_path, prepare):
    # A chain: each record has an image of the one before, so all are one group, but for a last one.
    for n in range(9):
        (tmp_path / f"p{n}.jpg").write_bytes(photo(n))
    turns = [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "b"}]
    rows = [{"image": [f"p{n}.jpg", f"p{n + 1}.jpg"], "conversations": turns} for n in range(7)]
    rows.append({"image": "p8.jpg", "conversations": turns})
    (tmp_path / "d.json").write_text(json.dumps(rows))
    prepare(tmp_path / "d.json", "--out", tmp_path / "out", "--validation", 4)
    (held,) = records_of(tmp_path / "out" / "meta_val.json")
    assert held["paths"] == [str(tmp_path / "p8.jpg")]


def test_one_image_cannot_be_split(tmp_path, prepare):
    write_csv(tmp_path, [Item("p.jpg", photo(), f"{n}?", "a") for n in range(4)])
    assert "4 records for training, 0 for validation" in prepare(tmp_path, "--out", tmp_path / "out")


def test_validation_larger_than_the_data_is_refused(tmp_path, prepare):
    write_csv(tmp_path, items())
    text = prepare(tmp_path, "--out", tmp_path / "out", "--validation", 4, code=2)
    assert "only 4 records are usable" in text
    assert not (tmp_path / "out").exists()


def test_bytes_are_the_same_and_the_seed_changes_the_split(tmp_path, prepare):
    source = write_parquet(tmp_path, items(30))
    contents = []
    for out in ("a", "b"):
        prepare(source, "--out", tmp_path / out, "--validation", 5)
        contents.append(_contents(tmp_path / out))
    assert contents[0] == contents[1]
    prepare(source, "--out", tmp_path / "c", "--validation", 5, "--seed", 7)
    assert (
        _contents(tmp_path / "c")["val/train-00000-of-00001.jsonl"]
        != contents[0]["val/train-00000-of-00001.jsonl"]
    )


def test_rerun_does_nothing_and_changes_need_force(tmp_path, prepare):
    write_csv(tmp_path, items())
    out = tmp_path / "out"
    prepare(tmp_path, "--out", out)
    before = _contents(out)
    assert "nothing to do" in prepare(tmp_path, "--out", out)
    text = prepare(tmp_path, "--out", out, "--seed", 9, code=2)
    assert "--force" in text
    assert _contents(out) == before
    assert "4 records" in prepare(tmp_path, "--out", out, "--seed", 9, "--force")
    assert not list(tmp_path.glob(".out*"))


def test_a_directory_of_others_is_never_touched(tmp_path, prepare):
    write_csv(tmp_path, items())
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for content in (None, "{}", "[1]", "not json"):
        if content is not None:
            (mine / output.MARK).write_text(content)
        for force in ((), ("--force",)):
            assert "was not made by this command" in prepare(tmp_path, "--out", mine, *force, code=2)
    assert (mine / "thesis.txt").read_text() == "years of work"
    (tmp_path / ".new.partial").mkdir()
    assert "remove it" in prepare(tmp_path, "--out", tmp_path / "new", code=2)


def test_error_while_writing_leaves_nothing_under_the_name(tmp_path, prepare, monkeypatch):
    source = write_parquet(tmp_path, items())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(output, "write_sets", full)
        assert "No space left" in prepare(source, "--out", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()
    # The images that were written are used by the next run; one of another run is removed.
    stray = tmp_path / ".out.partial" / "images" / "ff" / f"{'f' * 32}.jpg"
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"x")
    prepare(source, "--out", tmp_path / "out", "--validation", 0)
    assert len(list((tmp_path / "out" / "images").rglob("*.jpg"))) == 4
    assert not list(tmp_path.glob(".out*"))


def test_two_processes_do_not_write_one_directory(tmp_path, prepare):
    write_csv(tmp_path, items())
    with output.working_directory(tmp_path / "out"):
        assert "being written by another process" in prepare(tmp_path, "--out", tmp_path / "out", code=2)


def _hold(out: Path) -> None:
    with output.working_directory(out) as work:
        (work / "half.jsonl").write_text("half")
        time.sleep(600)


def test_killed_run_is_continued(tmp_path, prepare):
    write_csv(tmp_path, items())
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path / "out",))
    process.start()
    while not (tmp_path / ".out.partial" / "half.jsonl").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    prepare(tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "half.jsonl").exists()


def test_output_inside_the_input_is_not_read_again(tmp_path, prepare):
    for item in items():
        (tmp_path / item.name).write_bytes(item.data)
        (tmp_path / item.name).with_suffix(".txt").write_text("A thing.")
    for _ in range(2):
        text = prepare(tmp_path, "--out", tmp_path / "out", "--copy", "--force")
        assert "4 records, 4 images" in text
    assert "4 records, 4 images" in prepare(tmp_path, "--check")


def test_several_inputs_are_sets_of_their_own(tmp_path, prepare):
    for name in ("a", "b"):
        (tmp_path / name / "photos").mkdir(parents=True)
        write_csv(tmp_path / name / "photos", items(6))
    more = write_messages(tmp_path, items(3))
    text = prepare(
        tmp_path / "a/photos", tmp_path / "b/photos", more, "--out", tmp_path / "out", "--limit", 2
    )
    assert "stopped at --limit" in text
    counts = dict.fromkeys(("photos", "photos_2", "messages"), 0)
    for side in ("meta.json", "meta_val.json"):
        for name, entry in json.loads((tmp_path / "out" / side).read_text()).items():
            counts[name] += entry["length"]
    assert counts == {"photos": 2, "photos_2": 2, "messages": 2}


def test_left_out_records_are_listed(tmp_path, prepare):
    records = items(5)
    records[2].answer = ""
    write_csv(tmp_path, records)
    prepare(tmp_path, "--out", tmp_path / "out")
    (entry,) = map(json.loads, (tmp_path / "out" / "left_out.jsonl").read_text().splitlines())
    assert entry == {"set": tmp_path.name, "key": "questions.csv:4", "cause": "empty_answer",
                     "detail": "turn 1, an answer, has no text: write it"}  # fmt: skip


def test_energon_form_is_read_after_a_move(tmp_path, prepare):
    source = write_parquet(tmp_path, items(6))
    text = prepare(source, "--out", tmp_path / "out", "--energon", "--validation", 1)
    assert "--loader energon --packing" in text
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert (moved / "energon" / "metadataset.yaml").is_file()
    (part,) = (moved / "energon").glob("*/records.jsonl")
    assert len(part.read_text().splitlines()) == 5
    assert (moved / "energon" / "broken.jsonl").read_text() == ""


def test_force_deletes_nothing_that_the_owner_put_there(tmp_path, prepare):
    write_csv(tmp_path, items())
    out = tmp_path / "out"
    prepare(tmp_path, "--out", out)
    (out / "notes.md").write_text("mine")
    (out / "runs").mkdir()
    before = _contents(out)
    text = prepare(tmp_path, "--out", out, "--force", code=2)
    assert "notes.md, runs, which this command did not write" in text
    assert _contents(out) == before
    assert not list(tmp_path.glob(".out*")), "refused before work starts"
    # What appears there while the command runs stays, too.
    (out / "notes.md").rename(tmp_path / "notes.md")
    (out / "runs").rmdir()
    with pytest.raises(ValueError, match=r"late\.md"), output.working_directory(out):
        (out / "late.md").write_text("mine")
    assert (out / "late.md").read_text() == "mine"


def test_changed_captions_and_new_images_are_noticed(tmp_path, prepare):
    out = tmp_path / "out"
    write_captions(tmp_path, items())
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "none.jpg")
    for _ in range(2):
        text = prepare(tmp_path, "--out", out)
    assert "nothing to do" in text, "the directory in the folder changes the folder's time only"
    (tmp_path / "p1.txt").write_text("Another thing.")
    assert "made from other files" in prepare(tmp_path, "--out", out, code=2)
    prepare(tmp_path, "--out", out, "--force")
    (tmp_path / "p8.jpg").write_bytes(photo(8))
    assert "made from other files" in prepare(tmp_path, "--out", out, code=2)


def test_late_refusal_keeps_the_images(tmp_path, prepare):
    source = write_parquet(tmp_path, items())
    assert "only 4 records" in prepare(source, "--out", tmp_path / "out", "--validation", 4, code=2)
    assert len(list((tmp_path / ".out.partial" / "images").rglob("*.jpg"))) == 4
    prepare(source, "--out", tmp_path / "out", "--validation", 1)
    assert not list(tmp_path.glob(".out*"))


def test_killed_before_the_renaming_is_brought_to_its_end(tmp_path, prepare):
    write_csv(tmp_path, items())
    prepare(tmp_path, "--out", tmp_path / "out")
    before = _contents(tmp_path / "out")
    for lock in (False, True):
        work = (tmp_path / "out").rename(tmp_path / ".out.partial")
        if lock:
            (work / ".lock").touch()
        assert "nothing to do" in prepare(tmp_path, "--out", tmp_path / "out")
        assert _contents(tmp_path / "out") == before
        assert not list(tmp_path.glob(".out*"))


def test_link_to_the_output_stays_a_link(tmp_path, prepare):
    write_csv(tmp_path, items())
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    prepare(tmp_path, "--out", tmp_path / "out")
    prepare(tmp_path, "--out", tmp_path / "out", "--seed", 9, "--force")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "meta.json").is_file()
    assert not list(tmp_path.glob(".*"))


def test_other_splits_are_named(tmp_path, prepare):
    source = write_parquet(tmp_path, items())
    source.with_name("test-00000-of-00001.parquet").write_bytes(source.read_bytes())
    assert "not read: 1 shards of other splits (test-00000-of-00001.parquet)" in prepare(tmp_path, "--check")
