"""Order, split, resume and replacement of bad samples in the simple data path."""

import hashlib
import itertools
import json
import subprocess
import sys
from collections import Counter
from functools import partial

import pytest
import torch

from megatron_internvlx.data.decode import TileDecoder
from megatron_internvlx.data.decode_pil import load_tiles
from megatron_internvlx.data.encoded import EncodedImage
from megatron_internvlx.data.order import ConversationDataset, batches, held_out_batches, plan_micro_batch
from megatron_internvlx.data.plan import FILLER, PlanSettings, pack_plan
from megatron_internvlx.data.rejects import BadSample, RejectLog, TooManyRejects
from megatron_internvlx.data.sample import ImageTiles, filler_sample
from tests.unit.data.conftest import record

GOOD, BAD = 13, 4
BAD_KEYS = {f"a.jsonl:{GOOD + 1 + i}" for i in range(BAD)}


@pytest.fixture
def dataset(disk, encoder):
    """17 records with 0 to 3 tiles, four of them bad; the training set asks for JPEG augmentation."""
    sizes = [(90, 30), (30, 60), (30, 30)]
    names = [disk.image(f"{i}.jpg", *sizes[i % 3]) for i in range(8)]
    records = [record(names[i] if i < 8 else None, f"What is {i}?", f"It is {i}.") for i in range(GOOD)]
    broken = disk.folder / disk.image("cut.jpg", 200, 200)
    broken.write_bytes(broken.read_bytes()[:900])
    records += [
        record("cut.jpg", "What?", "A"),
        record("gone.png", "What?", "A"),
        record(None, "<image>", "A"),
        "{malformed",
    ]
    return ConversationDataset(disk.add("a", records, data_augment=True).manifest(), encoder(), seed=5)


def take(dataset, *, start=0, size=2, rank=0, ranks=1, workers=0, limit=10, log=None):
    return list(
        batches(
            dataset,
            start=start,
            micro_batch_size=size,
            dp_rank=rank,
            dp_size=ranks,
            num_workers=workers,
            reject_log=log or RejectLog(None, None),
            limit=limit,
        )
    )


def digest(batch):
    """Everything that training sees of a micro-batch."""
    parts = []
    for sample, tiles in batch:
        parts += [
            sample.key.encode(),
            sample.input_ids.tobytes(),
            sample.labels.tobytes(),
            tiles.numpy().tobytes(),
        ]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_items_are_samples_with_tiles_or_say_why_not(dataset):
    items = [dataset[position] for position in range(len(dataset))]
    bad = [item for item in items if isinstance(item, BadSample)]
    causes = {item.key: item.cause for item in bad}
    assert causes == {
        "a.jsonl:14": "truncated_image",
        "a.jsonl:15": "missing_image",
        "a.jsonl:16": "placeholder_mismatch",
        "a.jsonl:17": "malformed_json",
    }
    for sample, tiles in (item for item in items if not isinstance(item, BadSample)):
        assert tiles.shape == (sample.num_tiles, 3, 32, 32)


def test_every_epoch_holds_each_record_once_in_another_order(dataset):
    def epoch(number):
        items = [dataset[number * len(dataset) + i] for i in range(len(dataset))]
        return [item.key if isinstance(item, BadSample) else item[0].key for item in items]

    first, second = epoch(0), epoch(1)
    assert sorted(first) == sorted(second)
    assert len(set(first)) == len(dataset) == GOOD + BAD
    assert first != second


def test_unshuffled_order_is_that_of_the_file(dataset):
    plain = ConversationDataset(dataset.manifest, dataset.encoder, seed=0, shuffle=False)
    assert [plain[i][0].key for i in (0, 1, 17)] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:1"]


def test_workers_change_nothing(dataset):
    def run(workers):
        log = RejectLog(None, None)
        return [digest(batch) for batch in take(dataset, workers=workers, log=log)], log.counts

    assert run(0) == run(2)


def test_ranks_cover_every_position_once_and_bad_samples_disturb_nobody(dataset):
    alone = [pair[0].key for batch in take(dataset, size=2, ranks=1, limit=18) for pair in batch]
    split = [take(dataset, size=2, rank=rank, ranks=3, limit=6) for rank in range(3)]
    woven = [pair[0].key for step in zip(*split, strict=True) for batch in step for pair in batch]
    assert woven == alone
    for position, key in enumerate(alone):
        item = dataset[position]
        assert key == item[0].key if not isinstance(item, BadSample) else key not in BAD_KEYS


def test_resume_continues_exactly_also_on_other_ranks(dataset):
    whole = [digest([pair]) for batch in take(dataset, limit=20) for pair in batch]
    assert [digest([pair]) for batch in take(dataset, start=14, limit=13) for pair in batch] == whole[14:]
    resumed = [take(dataset, start=14, size=1, rank=rank, ranks=2, limit=13) for rank in range(2)]
    woven = [digest(batch) for step in zip(*resumed, strict=True) for batch in step]
    assert woven == whole[14:]


def test_tiles_arrive_as_uint8_tensors(dataset):
    for sample, tiles in itertools.chain(*take(dataset, limit=5)):
        assert tiles.dtype == torch.uint8
        assert tiles.shape == (sample.num_tiles, 3, 32, 32)


def test_rejects_are_counted_once_however_often_they_come(dataset, tmp_path):
    log = RejectLog(tmp_path / "rejects.jsonl", None)
    take(dataset, limit=40, log=log)
    assert log.total == BAD == len((tmp_path / "rejects.jsonl").read_text().splitlines())


def test_training_stops_after_the_allowed_number(dataset):
    with pytest.raises(TooManyRejects, match="3 bad records, 2 are allowed"):
        take(dataset, limit=40, log=RejectLog(None, 2))


def test_a_data_set_without_a_good_record_stops(disk, encoder):
    hopeless = disk.add("b", [record("gone.png", "What?", "A")]).manifest()
    said = r"64 tries in a row .* \(different records bad so far: missing_image 1; no image .*`root`"
    with pytest.raises(TooManyRejects, match=said):
        take(ConversationDataset(hopeless, encoder(), seed=0), limit=1)


@pytest.mark.parametrize(("start", "size", "rank", "ranks"), [(-1, 1, 0, 1), (0, 0, 0, 1), (0, 1, 2, 2)])
def test_impossible_splits_are_refused(dataset, start, size, rank, ranks):
    with pytest.raises(ValueError, match="micro_batch_size"):
        take(dataset, start=start, size=size, rank=rank, ranks=ranks)


def test_workers_never_import_megatron():
    code = "import sys, megatron_internvlx.data.order; print('megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_micro_batches_are_planned_in_the_worker(dataset):
    """The plan is that of the samples; one that does not fit is a plain ValueError, whoever noticed it."""
    split = {"start": 0, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1, "limit": 5}
    settings = PlanSettings(1, 2)
    first = RejectLog(None, None)
    expected = [plan_micro_batch(items, settings) for items in take(dataset, limit=5, log=first)]
    assert first.total > 0
    for workers in (0, 2):
        finish = partial(plan_micro_batch, settings=settings)
        log = RejectLog(None, None)
        found = list(batches(dataset, num_workers=workers, reject_log=log, finish=finish, **split))
        for (plan, tiles, _), (other, others, _) in zip(found, expected, strict=True):
            assert torch.equal(tiles, others) and len(tiles) == plan.num_tiles
            assert plan.tokens.tolist() == other.tokens.tolist()
            assert plan.targets.tolist() == other.targets.tolist()
        assert log.total == first.total
        finish = partial(plan_micro_batch, settings=PlanSettings(1, 2, shallow_length=8, deep_length=8))
        with pytest.raises(ValueError, match="over the static budget of 8") as caught:
            list(batches(dataset, num_workers=workers, reject_log=log, finish=finish, **split))
        assert "Traceback" not in str(caught.value)


def held_out(dataset, *, size=2, ranks=1, micro_batches=None, log=None, workers=0):
    """Per rank, what one evaluation gives."""
    needed = -(-len(dataset) // (size * ranks))
    return [
        list(
            held_out_batches(
                dataset,
                micro_batches=micro_batches or needed,
                micro_batch_size=size,
                dp_rank=rank,
                dp_size=ranks,
                num_workers=workers,
                reject_log=log or RejectLog(None, None),
            )
        )
        for rank in range(ranks)
    ]


@pytest.mark.parametrize(("size", "ranks", "more"), [(1, 1, 0), (2, 1, 3), (3, 2, 0), (1, 4, 0), (5, 4, 2)])
def test_an_evaluation_sees_every_record_once(dataset, size, ranks, more):
    plain = ConversationDataset(dataset.manifest, dataset.encoder, seed=0, shuffle=False)
    log = RejectLog(None, None)
    count = -(-(GOOD + BAD) // (size * ranks)) + more
    given = held_out(plain, size=size, ranks=ranks, micro_batches=count, log=log)
    assert all(len(rank) == count for rank in given)
    samples = [sample for rank in given for batch in rank for sample, _ in batch]
    real = [sample for sample in samples if sample.number != FILLER]
    assert sorted(sample.key for sample in real) == sorted(f"a.jsonl:{i + 1}" for i in range(GOOD))
    assert sorted(sample.number for sample in real) == list(range(GOOD))
    assert (log.good, log.total, log.bad) == (GOOD, BAD, BAD)
    for rank in given:
        for batch in rank:  # a filler only where nothing else is
            assert len(batch) == 1 or all(sample.number != FILLER for sample, _ in batch)


def test_an_evaluation_can_be_of_some_records_spread_evenly(dataset):
    def plain(records):
        return ConversationDataset(dataset.manifest, dataset.encoder, seed=0, shuffle=False, records=records)

    (given,) = held_out(plain(5))
    assert [sample.key for batch in given for sample, _ in batch] == [
        *(f"a.jsonl:{i}" for i in (1, 4, 7, 11)),
        "filler",  # the fifth, a.jsonl:14, is a bad one
    ]
    assert len(plain(1000)) == GOOD + BAD
    with pytest.raises(ValueError, match="2 micro-batches of 2 on 1 ranks are too few for 5 records"):
        held_out(plain(5), micro_batches=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_held_out_files_travel_with_the_plans_and_verdicts_of_pillow(disk, encoder, workers):
    """One has an odd format, one is broken, one has text only; the last micro-batch is the filler."""
    names = [disk.image(name, 70, 40) for name in ("a.jpg", "b.png", "c.gif", "d.jpg")]
    records = [record(name, "What?", "It.") for name in (*names, None)]
    (disk.folder / "broken.jpg").write_bytes((disk.folder / "a.jpg").read_bytes()[:500])
    records.append(record("broken.jpg", "What?", "It."))
    manifest, tool = disk.add("a", records).manifest(), encoder()
    decoder = TileDecoder("dali", tile_size=tool.settings.tile_size, travel=True)
    found, logs, counts = [], [RejectLog(None, None), RejectLog(None, None)], Counter()
    for decode, log in zip((None, decoder), logs, strict=True):
        data = ConversationDataset(manifest, tool, seed=0, shuffle=False, decode=decode)
        finish = partial(plan_micro_batch, settings=PlanSettings(1, 2))
        split = {"micro_batches": 4, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1}
        found.append(
            list(
                held_out_batches(
                    data, num_workers=workers, reject_log=log, finish=finish, fallbacks=counts, **split
                )
            )
        )
    for (plan, tiles, nothing), (other, none, images) in zip(*found, strict=True):
        assert pack_plan(plan).tobytes() == pack_plan(other).tobytes()
        assert nothing is None and none is None and len(tiles) == plan.num_tiles
        cut = [image.num_tiles if isinstance(image, EncodedImage) else len(image) for image in images]
        places = torch.tensor([0, *cut]).cumsum(0)
        for image, first, end in zip(images, places, places[1:], strict=False):
            if isinstance(image, EncodedImage):
                grid = (image.cols, image.rows)
                image = torch.from_numpy(
                    load_tiles(image.data, *grid, tile_size=32, thumbnail=image.thumbnail)
                )
            assert torch.equal(tiles[first:end], image)
    travelled = [isinstance(image, EncodedImage) for _, _, images in found[1] for image in images]
    assert travelled == [True, True, False, True]
    assert counts == {"format GIF": 1}
    assert logs[0].counts == logs[1].counts == {"truncated_image": 1}


def test_a_file_that_is_gone_when_it_is_read_is_a_reject(tmp_path):
    """Its size was read a moment ago."""
    decoder = TileDecoder("dali", tile_size=32, travel=True)
    with pytest.raises(BadSample) as caught:
        decoder(str(tmp_path / "gone.jpg"), ImageTiles("gone.jpg", 70, 40, 2, 1, True), None)
    assert caught.value.cause == "missing_image" and "No such file" in caught.value.detail


def test_a_filler_can_be_planned(dataset):
    """The last micro-batches of an evaluation may have no record; they have a plan all the same."""
    sample, tiles = filler_sample(), torch.empty((0, 3, 32, 32), dtype=torch.uint8)
    for settings in (PlanSettings(1, 2), PlanSettings(1, 2, shallow_length=8, deep_length=16, tile_budget=2)):
        plan, cut, _ = plan_micro_batch([(sample, tiles)], settings)
        assert (plan.num_tiles, len(cut), plan.sample_ids.tolist(), len(plan.loss_rows)) == (
            0,
            0,
            [FILLER],
            1,
        )


def test_what_samples_give_up_is_counted_in_the_order_of_the_batches(disk, encoder):
    records = [record(None, "What?", "It is. ", "And?", f"That too, {'very ' * (8 * i)}.") for i in range(6)]
    short = ConversationDataset(disk.add("a", records).manifest(), encoder(max_length=180), seed=5)
    lost = [short[position][0].dropped_tokens for position in range(6)]
    assert 0 in lost and sum(lost) > 50
    for workers in (0, 2):
        log, seen = RejectLog(None, None), []
        options = {"micro_batch_size": 1, "dp_rank": 0, "dp_size": 1, "num_workers": workers, "limit": 6}
        for _ in batches(short, start=0, reject_log=log, **options):
            seen.append(log.cut_tokens)
        assert seen == list(itertools.accumulate(lost))


NASTY = [
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "\ud83d"}]},
    {"conversations": [{"from": "human", "value": "\x00"}, {"from": "gpt", "value": "\x00"}]},
    {"image": "a\x00b.png", **record(None, "<image>", "A")},
    {"image": "../" * 3000, **record(None, "<image>", "A")},
    {"image": ".", **record(None, "<image>", "A")},
    {"image": ["x"] * 3000, **record(None, "<image>" * 3000, "A")},
    {"conversations": {"from": "human"}},
    {"conversations": [[], {}]},
    {"conversations": [{"from": ["human"], "value": "a"}]},
    {"conversations": [{"from": {"a": 1}, "value": {"b": 2}}]},
    {"conversations": []},
    {"conversations": None, "image": {"a": 1}},
    {"conversations": [{"from": "gpt", "value": "<image>"}], "image": ""},
    record(None, "<|im_end|>", "A"),
    record(None, "a", "B" * 200_000),
    {**record(None, "a", "A"), "kinds": "odd", "kind": [1]},
    "[]",
    "null",
    "1e999",
    "[" * 20_000,
    '{"conversations": 1, "conversations": 2}',
    "\ufeff{}",
]


def test_no_record_ends_the_run(disk, encoder):
    """Each either trains or is named; nothing that a record holds gets out as another exception."""
    lines = [json.dumps(entry) if isinstance(entry, dict) else entry for entry in NASTY]
    dataset = ConversationDataset(disk.add("a", lines).manifest(), encoder(), seed=0, shuffle=False)
    items = [dataset[number] for number in range(len(lines))]
    bad = {item.key for item in items if isinstance(item, BadSample)}
    assert bad == {f"a.jsonl:{i + 1}" for i in range(len(lines))} - {"a.jsonl:2", "a.jsonl:16"}


def test_an_unforeseen_error_costs_its_own_record_only(dataset, monkeypatch):
    encode = dataset.encoder.encode

    def odd(record):
        if record.key == "a.jsonl:3":
            raise ZeroDivisionError("a codec's own idea")
        return encode(record)

    log = RejectLog(None, None)
    monkeypatch.setattr(dataset.encoder, "encode", odd)
    given = take(dataset, size=1, limit=34, log=log)
    assert "a.jsonl:3" not in {sample.key for batch in given for sample, _ in batch}
    assert log.counts["unexpected_error"] == 1 and log.total == BAD + 1
