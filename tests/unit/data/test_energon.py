"""Energon loader: exact resume, exact epochs, bad data, the same batches whatever the workers' timing."""

import hashlib
import json
import pickle
import random
import resource
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megatron_internvlx.data.decode_pil import load_tiles
from megatron_internvlx.data.energon_loader import (
    EnergonBatches,
    LoaderSettings,
    check_same,
    redistribute,
    workers_for,
)
from megatron_internvlx.data.packing import Budget
from megatron_internvlx.data.plan import PlanSettings
from megatron_internvlx.data.prepare import PrepareSettings, prepare
from megatron_internvlx.data.rejects import RejectLog, TooManyRejects
from tests.unit.data.conftest import DiskSet, record

BUDGET = Budget(400, 600, 12)


def decode(blob, image, rng):
    return load_tiles(blob, image.cols, image.rows, tile_size=32, thumbnail=image.thumbnail, jpeg_augment=rng)


def meta_file(folder, sets, *, seed=0):
    """`sets`: name -> (records, other entries of meta.json); sizes and answers of random length."""
    rng = np.random.default_rng(seed)
    disk = DiskSet(folder)
    for name, (count, entry) in sets.items():
        records = []
        for i in range(count):
            image = None if i % 7 == 3 else disk.image(f"{name}{i}.png", *map(int, rng.integers(12, 120, 2)))
            records.append(record(image, f"What is {i}?", "word " * int(rng.integers(1, 30)) + "."))
        disk.add(name, records, **entry)
    disk.manifest()
    return folder / "meta.json"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """37 records twice and 26 one and a half times: epochs of 74 + 39 samples, with a text-only seventh."""
    folder = tmp_path_factory.mktemp("energon")
    meta = meta_file(folder, {"a": (37, {"repeat_time": 2}), "b": (26, {"repeat_time": 1.5})})
    prepare(meta, folder / "out", PrepareSettings())
    return folder / "out"


@pytest.fixture
def loader(encoder):
    opened = []

    def make(directory, *, log=None, budget=BUDGET, ahead=0, late=0.0, decoder=decode, **settings):
        tool = encoder(tokens_per_tile=16, shallow_tokens_per_tile=4, max_length=600, budget=budget)
        given = {"pack_buffer": 16, "shuffle_buffer": 4, "sequence": 4, "seed": 3, **settings}
        batches = EnergonBatches(
            directory,
            tool,
            PlanSettings(2, 4),
            LoaderSettings(**given),
            reject_log=log or RejectLog(None, None),
            decode=decoder,
            ahead=ahead,
        )
        if late:
            first = batches._loader.worker_init_fn
            batches._loader.worker_init_fn = lambda worker: (time.sleep(late * worker), first(worker))
        opened.append(batches)
        return batches

    yield make
    for batches in opened:
        batches.close()


def digest(batch):
    plan = batch.plan
    parts = [
        json.dumps(batch.keys).encode(),
        plan.tokens.tobytes(),
        plan.targets.tobytes(),
        plan.deep.cu_seqlens.tobytes(),
        batch.tiles.numpy().tobytes(),
    ]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, pytest.param(4, marks=pytest.mark.heavy)])
def test_resume_at_ten_random_steps_gives_the_same_batches(prepared, loader, workers, world):
    steps = 30
    at = sorted(random.Random(f"{workers}/{world}").sample(range(steps - 3), 10))
    for rank in range(world):
        share = {"rank": rank, "world": world, "workers": workers}
        unbroken, states, whole = loader(prepared, **share), {}, []
        for step in range(steps):
            if step in at:
                states[step] = pickle.dumps(unbroken.save_state())
            whole.append(digest(next(unbroken)))
        unbroken.close()
        for step in at[rank::world]:
            resumed = loader(prepared, **share)
            resumed.restore(pickle.loads(states[step]))
            # Right after a restore, before any batch: the state is the one restored.
            again = pickle.dumps(resumed.save_state())
            assert [digest(next(resumed)) for _ in range(3)] == whole[step : step + 3]
            resumed.close()
            if step == at[rank]:
                second = loader(prepared, **share)
                second.restore(pickle.loads(again))
                assert digest(next(second)) == whole[step]
                second.close()


@pytest.mark.heavy
def test_a_state_saved_while_workers_still_start_is_right(prepared, loader, monkeypatch):
    """Energon's command thread may answer before its worker has begun, which skipped that worker's first pack.

    Here it always does: the worker waits after starting the thread, as it may on a busy machine.
    """
    start = threading.Thread.start

    def slow(self):
        start(self)
        if self.name == "command_thread":
            time.sleep(0.4)

    plain = loader(prepared, workers=4)
    expected = [digest(next(plain)) for _ in range(10)]
    monkeypatch.setattr(threading.Thread, "start", slow)
    # Worker i starts i x 0.3 s late, so that the last ones are not there when the first pack is.
    for taken in (1, 2):
        batches = loader(prepared, workers=4, late=0.3)
        assert [digest(next(batches)) for _ in range(taken)] == expected[:taken]
        state = pickle.loads(pickle.dumps(batches.save_state()))
        resumed = loader(prepared, workers=4, late=0.3)
        resumed.restore(state)
        again = pickle.loads(pickle.dumps(resumed.save_state()))
        assert digest(next(resumed)) == expected[taken]
        after = pickle.loads(pickle.dumps(resumed.save_state()))  # restored workers still start, too
        for position, kept in ((taken, again), (taken + 1, after)):
            third = loader(prepared, workers=4)
            third.restore(kept)
            assert [digest(next(third)) for _ in range(5)] == expected[position : position + 5]


def test_packs_that_a_thread_has_on_their_way_come_again(prepared, loader):
    """A thread ahead of training changes no batch, and its lead is part of the state."""
    plain = loader(prepared, workers=2)
    expected = [digest(next(plain)) for _ in range(14)]
    batches = loader(prepared, workers=2, ahead=3)
    assert [digest(next(batches)) for _ in range(6)] == expected[:6]
    state = pickle.loads(pickle.dumps(batches.save_state()))
    assert [digest(next(batches)) for _ in range(3)] == expected[6:9]
    resumed = loader(prepared, workers=2, ahead=3)
    resumed.restore(state)
    assert [digest(next(resumed)) for _ in range(8)] == expected[6:]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 1)])
def test_three_epochs_hold_every_record_as_often_as_its_weight_says(tmp_path, loader, world, workers):
    meta = meta_file(
        tmp_path, {"a": (16, {"repeat_time": 2}), "b": (16, {"repeat_time": 1.5}), "c": (8, {})}, seed=1
    )
    prepare(meta, tmp_path / "out", PrepareSettings())
    counts = Counter()
    per_rank = (16 * 2 + 24 + 8) // world
    for rank in range(world):
        # a buffer that divides the epoch, so that no pack crosses its end
        batches = loader(
            tmp_path / "out", rank=rank, world=world, workers=workers, pack_buffer=16, shuffle_buffer=0
        )
        taken = 0
        while taken < 3 * per_rank:
            keys = next(batches).keys
            taken += len(keys)
            counts.update(keys)
        assert taken == 3 * per_rank
        batches.close()
    assert {counts[f"a.jsonl:{i + 1}"] for i in range(16)} == {6}
    assert {counts[f"c.jsonl:{i + 1}"] for i in range(8)} == {3}
    assert Counter(counts[f"b.jsonl:{i + 1}"] for i in range(16)) == {3: 8, 6: 8}


@pytest.mark.parametrize("workers", [0, 2])
def test_two_runs_give_the_same_hash_of_all_batches(prepared, loader, workers):
    def run():
        batches = loader(prepared, workers=workers)
        hashes = [digest(next(batches)) for _ in range(25)]
        batches.close()
        return hashes

    assert run() == run()


def test_packs_keep_the_budgets_and_ranks_share_the_data(prepared, loader):
    seen = []
    for rank in range(2):
        batches = loader(prepared, rank=rank, world=2)
        keys = set()
        for _ in range(40):
            batch = next(batches)
            assert batch.plan.shallow.length <= BUDGET.shallow
            assert batch.plan.deep.length <= BUDGET.deep
            assert batch.plan.num_tiles == len(batch.tiles) <= BUDGET.tiles
            keys.update(batch.keys)
        seen.append(keys)
    assert seen[0] and seen[1]
    # one slice each; only the records of the fractional repeat may lie in both
    assert all(key.startswith("b.") for key in seen[0] & seen[1])


@pytest.mark.parametrize("budget", [None, BUDGET])
def test_without_packing_a_micro_batch_is_a_number_of_samples(prepared, loader, budget):
    """With static boundaries a sample has a budget, too."""
    batches = loader(prepared, packing=False, budget=budget, micro_batch_size=3)
    assert [len(next(batches).keys) for _ in range(12)] == [3] * 12


def test_workers_are_dealt_to_another_number_of_ranks(prepared, loader):
    """2 ranks x 2 workers go on as 1 rank x 4 and as 4 ranks x 1: every worker's samples, none lost."""

    def run(ranks, steps):
        return sorted(tuple(next(rank).keys) for _ in range(steps) for rank in ranks)

    first = [loader(prepared, rank=rank, world=2, workers=2) for rank in range(2)]
    run(first, 4)  # a whole round of each rank's two workers
    states = [pickle.loads(pickle.dumps(rank.save_state())) for rank in first]
    expected = run(first, 4)
    for world in (1, 4):
        dealt = redistribute(states, world)
        ranks = [loader(prepared, rank=i, world=world, workers=4 // world) for i in range(world)]
        for rank, state in zip(ranks, dealt, strict=True):
            rank.restore(state)
        assert run(ranks, 8 // world) == expected
    assert workers_for(2, 2, 3) is None
    with pytest.raises(ValueError, match="2 ranks with 2 loader workers cannot be distributed over 3 ranks"):
        redistribute(states, 3)


def test_a_state_of_other_settings_is_refused_with_both_values(prepared, loader):
    batches = loader(prepared)
    next(batches)
    state = batches.save_state()
    other = loader(prepared, pack_buffer=32)
    with pytest.raises(ValueError, match="pack_buffer: 16 -> 32"):
        other.restore(state)
    # A position of before: its rule has another name today, or is none of today's.
    state.made_with, kept = state.made_with | {"rvtc": "area"}, state.made_with
    with pytest.raises(ValueError, match="rvtc: area -> edge"):
        loader(prepared).restore(state)
    loader(prepared).restore(replace(state, version=1))
    state.made_with = kept
    # Before there was a budget of supervised tokens a position did not have one; to set it changes the packs.
    old = {name: value for name, value in kept["budget"].items() if name != "supervised"}
    loader(prepared).restore(replace(state, made_with=kept | {"budget": old}))
    set_now = kept | {"budget": kept["budget"] | {"supervised": 90}}
    with pytest.raises(ValueError, match="budget supervised: 90 -> None"):
        loader(prepared).restore(replace(state, made_with=set_now))
    with pytest.raises(ValueError, match="has started"):
        batches.restore(state)


def test_webdataset_shards_hold_the_same_samples(tmp_path, loader):
    meta = meta_file(tmp_path, {"a": (20, {"repeat_time": 1.5})}, seed=2)
    prepare(meta, tmp_path / "lines", PrepareSettings())
    prepare(meta, tmp_path / "tars", PrepareSettings(to_webdataset=True, shard_size=8))
    epochs = {}
    for kind in ("lines", "tars"):
        batches, found = loader(tmp_path / kind), {}
        while len(found) < 20:
            batch = next(batches)
            if len(batch.keys) == 1:
                found[batch.keys[0]] = batch.tiles.numpy().tobytes()
            else:
                found.update(dict.fromkeys(batch.keys, None))
        epochs[kind] = found
    assert epochs["lines"].keys() == epochs["tars"].keys()
    batches = loader(tmp_path / "tars")
    batches_again = loader(tmp_path / "tars")
    for _ in range(3):
        next(batches)
    batches_again.restore(pickle.loads(pickle.dumps(batches.save_state())))
    assert digest(next(batches_again)) == digest(next(batches))


def corrupt(folder, count):
    """Break `count` images below `folder` in seven ways; returns their names."""
    good = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    Image.fromarray(good).save(folder / "good.jpg", quality=90)
    data = (folder / "good.jpg").read_bytes()
    bomb = folder / "bomb.png"
    Image.new("1", (30_000, 30_000)).save(bomb, compress_level=1)
    names = []
    for i in range(count):
        path = folder / f"bad{i}.jpg"
        kind = i % 7
        if kind == 0:
            path.write_bytes(data[: len(data) // 3])
        elif kind == 1:  # bits flipped in the header, where they always show
            path.write_bytes(bytes(byte ^ 0x5A for byte in data[:64]) + data[64:])
        elif kind == 2:
            path.write_text("this is text, whatever its name says")
        elif kind == 3:
            path.write_bytes(b"")
        elif kind == 4:
            path.mkdir()
        elif kind == 5:
            path.symlink_to(bomb)
        else:
            path.symlink_to(folder / "nowhere.jpg")
        names.append(path.name)
    return names


def test_500_corrupted_files_are_each_reported_once_and_stop_nothing(tmp_path, loader):
    disk = DiskSet(tmp_path)
    bad = corrupt(tmp_path, 500)
    rng = random.Random(0)
    records = [record(disk.image(f"ok{i}.png", 30 + i, 40), f"What is {i}?", "It.") for i in range(100)]
    records += [record(name, "What?", "It.") for name in bad]
    rng.shuffle(records)
    disk.add("a", records).manifest()
    reports = prepare(tmp_path / "meta.json", tmp_path / "out", PrepareSettings())
    assert reports[0].images == 600
    log = RejectLog(tmp_path / "rejects.jsonl", None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batches, seen = loader(tmp_path / "out", log=log, workers=1, pack_buffer=100), Counter()
    while sum(seen.values()) < 250:  # more than two epochs
        seen.update(next(batches).keys)
    batches.close()
    grown = max(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - before,
    )
    assert grown < 300 * 1024  # kilobytes; the bomb alone would be 2.7 GB decoded
    expected = {f"a.jsonl:{i + 1}" for i, entry in enumerate(records) if entry["image"].startswith("bad")}
    listed = [json.loads(line)["key"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert Counter(listed) == dict.fromkeys(expected, 1)
    assert len(seen) == 100
    assert not expected & seen.keys()
    causes = log.counts
    assert causes["missing_image"] == 142  # directories and dangling links
    assert causes["bomb"] == 71
    assert causes["truncated_image"] + causes["unreadable_image"] == 287
    at_once = RejectLog(None, None, max_rate=0.5)
    with pytest.raises(TooManyRejects, match="samples are bad"):
        for _ in loader(tmp_path / "out", log=at_once, pack_buffer=100):
            pass


def test_an_unforeseen_error_costs_its_own_record_only(tmp_path, loader, monkeypatch):
    disk = DiskSet(tmp_path)
    records = [record(disk.image(f"{i}.png", 30 + i, 40), f"What is {i}?", "It.") for i in range(12)]
    disk.add("a", records).manifest()
    prepare(tmp_path / "meta.json", tmp_path / "out", PrepareSettings())
    log = RejectLog(None, None)

    def broken_codec(blob, image, rng):
        if image.path == "4.png":
            raise SystemError("a codec's own idea")
        return decode(blob, image, rng)

    batches, seen = loader(tmp_path / "out", log=log, decoder=broken_codec), Counter()
    encode = batches.encoder.encode

    def odd(entry, size_of):
        if entry.key == "a.jsonl:3":
            raise ZeroDivisionError("a tokenizer's own idea")
        return encode(entry, size_of)

    monkeypatch.setattr(batches.encoder, "encode", odd)
    while sum(seen.values()) < 30:
        seen.update(next(batches).keys)
    assert len(seen) == 10
    assert dict(log.counts) == {"unexpected_error": 2}


def test_a_changed_budget_is_named_by_what_differs() -> None:
    old = {"seed": 1, "budget": {"deep": 600, "supervised": 6}}
    with pytest.raises(ValueError, match=r"unknown: budget supervised: 6 -> 8; seed: 1 -> 2\. Use"):
        check_same(old, {"budget": {"deep": 600, "supervised": 8}, "seed": 2})
    with pytest.raises(ValueError, match=r"budget: None -> \{'deep': 600\}"):
        check_same({"budget": None}, {"budget": {"deep": 600}})
    check_same(old, dict(old))
