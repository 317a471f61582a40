"""Packs whose files travel: the plans, order and verdicts of packs that Pillow cuts, whatever the files are."""

import io
import json
import pickle
import random
import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_internvlx.data.dali_pipeline import TilePipeline
from megatron_internvlx.data.decode import TileDecoder
from megatron_internvlx.data.encoded import EncodedImage, Wanted
from megatron_internvlx.data.energon_loader import EnergonBatches, LoaderSettings
from megatron_internvlx.data.packing import Budget
from megatron_internvlx.data.plan import PlanSettings, pack_plan
from megatron_internvlx.data.prepare import PrepareSettings, prepare
from megatron_internvlx.data.rejects import RejectLog
from tests.unit.data.conftest import DiskSet, record
from tests.unit.data.test_decode_pil import png_bomb

SIZE, BROKEN = 32, 200


def written(form, mode="RGB", seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 255, (10, 14, 3)).astype(np.uint8)
    file = io.BytesIO()
    picture = Image.fromarray(pixels).resize((70 + seed % 7, 50))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 200)
    (picture if mode == "I;16" else picture.convert(mode)).save(file, form, **options)
    return file.getvalue()


def turned(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


# Good files of every kind, and why Pillow cuts some of them.
GOOD = {
    "a.jpg": (lambda seed: written("JPEG", seed=seed, exif=turned(1 + seed % 8)), None),
    "b.jpg": (lambda seed: written("JPEG", "L", seed, progressive=True), None),
    "c.png": (lambda seed: written("PNG", "RGBA", seed), None),
    "d.png": (lambda seed: written("PNG", "I;16", seed), "mode I;16"),
    "e.webp": (lambda seed: written("WEBP", seed=seed), None),
    "f.gif": (lambda seed: written("GIF", seed=seed), "format GIF"),
    "g.tiff": (lambda seed: written("TIFF", seed=seed, compression="tiff_lzw"), "TIFF of other kinds"),
    "h.bmp": (lambda seed: written("BMP", seed=seed), None),
}


def jpeg_with_wrong_table():
    data = bytearray(written("JPEG"))
    place = data.index(b"\xff\xc4")
    data[place + 5 : place + 21] = bytes([255] * 16)
    return bytes(data)


def flipped(data, share):
    cut = bytearray(data)
    for place in range(len(cut) // 3, len(cut), share):
        cut[place] ^= 0x55
    return bytes(cut)


# What each broken kind holds; its size can be read of most of them, so that they are packed and found out later.
HOSTILE = [
    lambda seed: written("JPEG", seed=seed)[: 300 + seed],
    lambda seed: written("PNG", seed=seed)[: 120 + seed],
    lambda seed: written("WEBP", seed=seed)[:200],
    lambda seed: written("GIF", seed=seed)[:90],
    lambda seed: b"",
    lambda seed: b"<html>404 not found</html>",
    lambda seed: png_bomb(30_000, 30_000 + seed),
    lambda seed: jpeg_with_wrong_table(),
    lambda seed: flipped(written("PNG", seed=seed), 97),
    lambda seed: written("BMP", seed=seed)[:500],
    lambda seed: written("TIFF", seed=seed)[:-4000],
    lambda seed: struct.pack(">I", seed) * 40 + zlib.compress(bytes(seed)),
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A prepared set of 96 good records and 200 broken ones, shuffled; names and keys of the broken."""
    folder = tmp_path_factory.mktemp("hostile")
    disk, records = DiskSet(folder), []
    for number in range(96):
        kind = list(GOOD)[number % len(GOOD)]
        (folder / f"{number}{kind}").write_bytes(GOOD[kind][0](number))
        records.append(record(f"{number}{kind}", f"What is {number}?", "It."))
    for number in range(BROKEN):
        (folder / f"bad{number}.jpg").write_bytes(HOSTILE[number % len(HOSTILE)](number))
        records.append(record(f"bad{number}.jpg", "What?", "It."))
    random.Random(0).shuffle(records)
    disk.add("a", records).manifest()
    prepare(folder / "meta.json", folder / "out", PrepareSettings())
    bad = {f"a.jsonl:{n + 1}" for n, entry in enumerate(records) if entry["image"].startswith("bad")}
    return folder / "out", bad


@pytest.fixture
def loader(encoder):
    opened = []

    def make(directory, decoder, *, log=None, **settings):
        tool = encoder(tokens_per_tile=16, shallow_tokens_per_tile=4, budget=Budget(400, 600, 12))
        batches = EnergonBatches(
            directory,
            tool,
            PlanSettings(2, 4),
            LoaderSettings(**{"pack_buffer": 32, "shuffle_buffer": 8, "seed": 3, **settings}),
            reject_log=log or RejectLog(None, None),
            decode=decoder,
            ahead=2 if settings.get("workers") else 0,
        )
        opened.append(batches)
        return batches

    yield make
    for batches in opened:
        batches.close()


def cut(pipeline, images):
    """Tiles of a pack in its order."""
    files = [Wanted.whole(image) for image in images if isinstance(image, EncodedImage)]
    tiles = iter(pipeline.cut(files).split([one.count for one in files]))
    parts = [next(tiles) if isinstance(image, EncodedImage) else image for image in images]
    return torch.cat([torch.empty((0, 3, SIZE, SIZE), dtype=torch.uint8), *parts])


def test_200_hostile_files_of_12_kinds_cost_themselves_and_nothing_else(hostile, loader, tmp_path):
    """Two epochs: the packs are those of Pillow, no file that DALI gets is broken, and each is counted once."""
    directory, bad = hostile
    logs = [RejectLog(tmp_path / f"{name}.jsonl", None) for name in ("pillow", "travel")]
    reference = loader(directory, TileDecoder("pillow", tile_size=SIZE), log=logs[0], workers=1)
    batches = loader(directory, TileDecoder("dali", tile_size=SIZE, travel=True), log=logs[1], workers=1)
    pipeline, samples, worst = TilePipeline(None, SIZE, threads=1), 0, []
    while samples < 2 * 96:
        wanted, found = next(reference), next(batches)
        assert (wanted.keys, wanted.rejects and [b.key for b in wanted.rejects]) == (
            found.keys,
            found.rejects and [b.key for b in found.rejects],
        )
        assert pack_plan(wanted.plan).tobytes() == pack_plan(found.plan).tobytes()
        assert wanted.images is None and found.tiles is None
        difference = (cut(pipeline, found.images).int() - wanted.tiles.int()).abs().float()
        worst.append((difference.mean(), difference.max()))
        samples += len(found.keys)
    # Tiles of 32 pixels from images of 70: 0.21 on average and 7 at most.
    assert max(mean for mean, _ in worst) < 0.5 and max(most for _, most in worst) <= 12
    assert (pipeline.fallbacks, pipeline.blank) == ({}, {})
    assert logs[0].counts == logs[1].counts and logs[1].total == BROKEN
    listed = {json.loads(line)["key"] for line in (tmp_path / "travel.jsonl").read_text().splitlines()}
    assert listed == bad
    assert set(batches.fallbacks) == {reason for _, reason in GOOD.values() if reason}
    assert set(reference.fallbacks) == set()
    pipeline.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_micro_batches_that_were_begun_come_again(hostile, loader, workers):
    directory, _ = hostile

    def contents(batch):
        images = [i if isinstance(i, EncodedImage) else i.numpy().tobytes() for i in batch.images]
        return batch.keys, pack_plan(batch.plan).tobytes(), images

    def fresh():
        return loader(directory, TileDecoder("dali", tile_size=SIZE, travel=True), workers=workers)

    running = fresh()
    taken = [next(running) for _ in range(9)]
    state = pickle.loads(pickle.dumps(running.save_state([batch.restore_key for batch in taken[7:]])))
    expected = [contents(batch) for batch in (*taken[7:], *(next(running) for _ in range(3)))]
    running.close()
    resumed = fresh()
    resumed.restore(state)
    assert [contents(next(resumed)) for _ in range(5)] == expected


def test_jpeg_augmentation_is_pillows_and_seeded(disk, loader):
    records = [record(disk.image(f"{i}.jpg", 40 + i, 40), "What?", "It.") for i in range(12)]
    disk.add("a", records, data_augment=True).manifest()
    prepare(disk.folder / "meta.json", disk.folder / "out", PrepareSettings())
    pillow = loader(disk.folder / "out", TileDecoder("pillow", tile_size=SIZE))
    travel = loader(disk.folder / "out", TileDecoder("dali", tile_size=SIZE, travel=True))
    for _ in range(6):
        assert torch.equal(next(pillow).tiles, torch.cat(next(travel).images))
    assert set(travel.fallbacks) == {"JPEG augmentation"}


def test_memory_is_flat_over_2000_batches():
    """One batch in 50 fails and starts a new pipeline; a leak of one decoded image a batch would be 16 MiB."""
    pipeline = TilePipeline(None, 16, threads=1)
    good = [EncodedImage(written("JPEG", seed=seed), 2, 1, True) for seed in range(3)]
    broken = EncodedImage(written("JPEG")[:300], 1, 1, True)
    seen = []
    for number in range(2000):
        images = [*good, broken] if number % 50 == 7 else good
        assert len(pipeline.cut([Wanted.whole(image) for image in images])) == sum(
            i.num_tiles for i in images
        )
        if number in (500, 1999):
            seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert seen[1] - seen[0] < 8 * 1024  # KiB
    assert sum(pipeline.blank.values()) == 40
    pipeline.close()
