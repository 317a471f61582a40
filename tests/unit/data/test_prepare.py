"""Prepared directories: what they hold, restarts, broken input, object stores, statistics."""

import json
import os

import pytest

from megatron_internvlx.commands import prepare_data
from megatron_internvlx.data import prepare as module
from megatron_internvlx.data.decode_pil import image_size
from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.data.prepare import PrepareSettings, prepare
from megatron_internvlx.data.prepared import MARK, prepared_sets, size_table
from tests.unit.data.conftest import record


@pytest.fixture
def meta(disk):
    """Two sets: one clean; one with a blank line, a malformed line, a broken image and an EXIF-turned one."""
    from PIL import Image

    clean = [record(disk.image(f"a{i}.png", 20 + i, 30), f"What {i}?", "It.") for i in range(20)]
    exif = Image.Exif()
    exif[0x0112] = 6
    disk.image("turned.jpg", 80, 40, exif=exif)
    (disk.folder / "cut.png").write_bytes(b"\x89PNG")
    rest = [
        record("turned.jpg", "What?", "A."),
        "{malformed",
        "",
        record("cut.png", "Q?", "A."),
        record(None, "Q?", "A."),
    ]
    disk.add("clean", clean, repeat_time=2.25).add("dirty", rest)
    disk.manifest()
    return disk.folder / "meta.json"


def test_annotations_are_linked_images_measured_and_broken_things_listed(meta, tmp_path):
    out = tmp_path / "out"
    clean, dirty = prepare(meta, out, PrepareSettings())
    assert (clean.train, clean.images, clean.broken_images) == (20, 20, 0)
    assert (dirty.train, dirty.images, dirty.broken_images, dirty.broken_records) == (3, 2, 1, 1)
    link = out / "clean" / "records.jsonl"
    assert link.is_symlink()
    assert not os.path.isabs(os.readlink(link))  # the two may move together
    assert [part.repetitions for part in clean.parts] == [2, 1]
    assert clean.parts[1].records == 5
    broken = [json.loads(line) for line in (out / "broken.jsonl").read_text().splitlines()]
    found = {(row["key"], row["cause"]) for row in broken}
    assert found == {("dirty.jsonl:2", "malformed_json"), ("dirty.jsonl:4", "unreadable_image")}
    table = size_table(out, "dirty")
    assert table.size("turned.jpg", apply_exif=True) == (40, 80) == image_size(meta.parent / "turned.jpg")
    assert table.size("turned.jpg", apply_exif=False) == (80, 40)
    assert table.size("nowhere.jpg", apply_exif=True) is None


def test_a_second_run_does_nothing_and_a_stopped_one_goes_on(meta, tmp_path, monkeypatch):
    out, calls = tmp_path / "out", []
    measure = module.measure
    monkeypatch.setattr(module, "measure", lambda *a: (calls.append(a[1]), measure(*a))[1])
    prepare(meta, out, PrepareSettings())
    assert len(calls) == 22
    first = (out / "metadataset.yaml").read_bytes()
    prepare(meta, out, PrepareSettings())
    assert calls[22:] == ["cut.png"]  # may have been mended
    assert (out / "metadataset.yaml").read_bytes() == first
    (out / "clean" / "done.json").unlink()  # as if it had been stopped there: sizes are kept
    prepare(meta, out, PrepareSettings())
    assert calls[22:] == ["cut.png"] * 2
    (meta.parent / "clean.jsonl").write_text(json.dumps(record("a3.png", "What?", "It.")) + "\n")
    (report, _) = prepare(meta, out, PrepareSettings())
    assert report.train == 1


def test_validation_records_are_kept_out_of_training(meta, tmp_path, encoder):
    out = tmp_path / "out"
    clean, _ = prepare(meta, out, PrepareSettings(validation=0.2))
    assert (clean.train, clean.validation) == (16, 4)
    manifest = Manifest(out / "validation" / "meta.json")
    samples = [encoder().encode(manifest.record(i)) for i in range(4)]
    assert [os.path.basename(sample.images[0].path) for sample in samples] == [
        f"a{i}.png" for i in range(16, 20)
    ]


def test_verify_decodes_every_image(disk, tmp_path):
    disk.image("big.jpg", 300, 200)
    data = (disk.folder / "big.jpg").read_bytes()
    (disk.folder / "big.jpg").write_bytes(data[: len(data) // 2])
    disk.add("a", [record("big.jpg", "What?", "It."), record(None, "What?", "It.")]).manifest()
    meta = disk.folder / "meta.json"
    assert prepare(meta, tmp_path / "headers", PrepareSettings())[0].broken_images == 0
    assert prepare(meta, tmp_path / "pixels", PrepareSettings(verify=True))[0].broken_images == 1


def test_object_store_urls_are_read_through_the_storage_client(disk, tmp_path, monkeypatch, encoder):
    """A profile of the storage client that is a local folder stands for a bucket."""
    names = [disk.image(f"{i}.png", 30 + i, 40) for i in range(4)]
    disk.add("a", [record(name, "What?", "It.") for name in names])
    config = tmp_path / "msc.json"
    provider = {"type": "file", "options": {"base_path": str(disk.folder)}}
    config.write_text(json.dumps({"profiles": {"bucket": {"storage_provider": provider}}}))
    monkeypatch.setenv("MSC_CONFIG", str(config))
    disk.meta["a"] |= {"root": "msc://bucket/", "annotation": "msc://bucket/a.jsonl"}
    (disk.folder / "meta.json").write_text(json.dumps(disk.meta))
    (report,) = prepare(disk.folder / "meta.json", tmp_path / "out", PrepareSettings())
    assert (report.train, report.images, report.broken_images) == (4, 4, 0)
    assert report.parts[0].flavors.root == "msc://bucket/"
    from megatron_internvlx.data.images import FolderImages

    assert FolderImages("msc://bucket/").read("2.png") == (disk.folder / "2.png").read_bytes()


def test_mistakes_are_named(meta, tmp_path, capsys):
    assert prepare_data.main([str(tmp_path / "none.json"), str(tmp_path / "out")]) == 2
    assert "none.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not a prepared data set"):
        prepared_sets(tmp_path)
    with pytest.raises(ValueError, match="--validation 1"):
        PrepareSettings(validation=1)


def test_tool_reports_and_draws_statistics(meta, tmp_path, capsys, tokenizer):
    out, png = tmp_path / "out", tmp_path / "stats.png"
    assert prepare_data.main([str(meta), str(out)]) == 0
    printed = capsys.readouterr()
    assert "clean: 20 records x 2.25" in printed.out
    assert "2 broken images and lines" in printed.err
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    options = ["--tokenizer-model", str(folder), "--image-size", "28", "--seq-length", "400"]
    options += ["--max-tiles-per-pack", "8", "--model-preset", "internvlx_8b", "--png", str(png)]
    options += ["--low-ratio", "0.5", "--high-ratio", "1"]
    assert prepare_data.main(["stats", str(out), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines[-4:-1]}
    assert any(line.startswith("supervised tokens (edge): ") for line in lines)
    assert rows.keys() == {"off", "area", "edge"}
    assert float(rows["area"][1]) < float(rows["off"][1])
    assert rows["off"][-2] == "0.0%,"
    assert 0 < float(rows["area"][-1].rstrip("%")) < 100
    assert png.stat().st_size > 10_000


def test_images_that_appear_later_are_measured_and_a_wrong_root_is_an_error(disk, tmp_path, capsys):
    names = [f"{i}.png" for i in range(3)]
    disk.add("a", [record(name, "What?", "It.") for name in names]).manifest()
    command = [str(disk.folder / "meta.json"), str(tmp_path / "out")]
    assert prepare_data.main(command) == 2
    assert "none of its 3 images found" in capsys.readouterr().err
    assert len((tmp_path / "out" / "broken.jsonl").read_text().splitlines()) == 3
    for name in names[:2]:
        disk.image(name, 30, 40)
    for broken in (1, 1):  # the second run finds nothing new
        assert prepare_data.main(command) == 0
        assert f"3 images, {broken} of them broken" in capsys.readouterr().out


def test_damaged_marks_and_tables_are_made_again_or_named(disk, tmp_path, capsys):
    disk.add("a", [record(disk.image("0.png", 30, 40), "What?", "It.")]).manifest()
    out = tmp_path / "out"
    command = [str(disk.folder / "meta.json"), str(out)]
    assert prepare_data.main(command) == 0
    (out / "a" / "done.json").write_text("{half")
    assert prepare_data.main(command) == 0
    (out / MARK).write_text("")
    with pytest.raises(ValueError, match=r"prepared\.json is damaged"):
        prepared_sets(out)
    (out / "a" / "done.json").unlink()
    (out / "a" / "media" / ".nv-meta" / "index.sqlite").write_text("no table")
    assert prepare_data.main(command) == 2
    assert "index.sqlite: file is not a database: delete it" in capsys.readouterr().err


def test_a_run_with_other_settings_takes_the_marks_away_first(disk, tmp_path, monkeypatch):
    disk.add("a", [record(disk.image(f"{i}.png", 30 + i, 40), "What?", "It.") for i in range(4)]).manifest()
    meta, out = disk.folder / "meta.json", tmp_path / "out"
    prepare(meta, out, PrepareSettings())

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_index_set", killed)
    assert prepare_data.main([str(meta), str(out), "--validation", "0.5"]) == 130
    with pytest.raises(ValueError, match="not a prepared data set"):
        prepared_sets(out)
    assert not (out / "a" / "done.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-length", "100"], "--seq-length 100 is too small for one tile of 256 tokens"),
        (["--shallow-seq-length", "4096"], "need --seq-length"),
        (["--max-supervised-tokens-per-pack", "64"], "need --seq-length"),
        (["--image-size", "450"], "--image-size 450 must be a multiple of --patch-size 14"),
        (["--png", "/proc/none.png"], "/proc/none.png"),
    ],
)
def test_statistics_refuse_what_means_nothing(disk, tmp_path, tokenizer, capsys, options, message):
    disk.add("a", [record(disk.image("0.png", 30, 40), "What?", "It.")]).manifest()
    prepare(disk.folder / "meta.json", tmp_path / "out", PrepareSettings())
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = ["stats", str(tmp_path / "out"), "--tokenizer-model", str(tmp_path / "tokenizer"), *options]
    assert prepare_data.main(command) == 2
    assert message in capsys.readouterr().err


def test_an_unwritable_directory_is_one_line(disk, capsys):
    disk.add("a", [record(None, "What?", "It.")]).manifest()
    assert prepare_data.main([str(disk.folder / "meta.json"), "/proc/out"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_hostile_records_are_listed_and_the_others_prepared(disk, tmp_path):
    """Half a surrogate pair, a key given twice, a null byte and a path of 10,000 characters."""
    good = record(disk.image("0.png", 30, 40), "What? \u00e9", "It.")
    half = json.dumps(record(None, "What?", "\ud800"))
    twice = '{"conversations": [], "conversations": []}'
    odd = [{"image": name, **record(None, "<image>", "A")} for name in ("a\x00.png", "x" * 10_000)]
    disk.add("a", [good, half, twice, *map(json.dumps, odd)], max_dynamic_patch=4).manifest()
    out = tmp_path / "out"
    (report,) = prepare(disk.folder / "meta.json", out, PrepareSettings())
    assert (report.train, report.broken_records, report.broken_images) == (3, 2, 2)
    broken = [json.loads(line) for line in (out / "broken.jsonl").read_text().splitlines()]
    assert [(row["key"], row["cause"]) for row in broken] == [
        ("a.jsonl:2", "bad_message"),
        ("a.jsonl:3", "malformed_json"),
        ("a.jsonl:4", "missing_image"),
        ("a.jsonl:5", "missing_image"),
    ]
    source = (disk.folder / "a.jsonl").read_bytes().splitlines()
    copied = (out / "a" / "records.jsonl").read_bytes().splitlines()
    assert copied == [source[0], *source[3:]]  # byte for byte


def test_held_out_records_keep_the_tile_limit_of_their_set(meta, tmp_path, disk):
    disk.add("few", [record(None, f"{i}?", "A.") for i in range(4)], max_dynamic_patch=3).manifest()
    prepare(disk.folder / "meta.json", tmp_path / "out", PrepareSettings(validation=0.5))
    manifest = Manifest(tmp_path / "out" / "validation" / "meta.json")
    limits = {entry.name: entry.max_tiles for entry in manifest.entries}
    assert limits == {"clean": None, "dirty": None, "few": 3}
