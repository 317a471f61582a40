"""Each TP rank of the first stage cuts exactly the tiles that it encodes, from files that only these ranks get."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from megatron_internvlx.data.dali_pipeline import TilePipeline
from megatron_internvlx.data.encoded import EncodedImage, PackImage, Wanted
from megatron_internvlx.data.plan import IGNORE, PlanSettings, SequencePlan, build_plan
from megatron_internvlx.parallel.batch import BatchChannel, HostBatch
from megatron_internvlx.parallel.tiles import pack_parts, split_images, unpack_parts
from tests.distributed import Pool

SIZE = 16


def image(number: int, cols: int, rows: int, turn: int = 1) -> EncodedImage:
    pixels = np.random.default_rng(number).integers(0, 255, (30, 40, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, ("JPEG", "PNG", "WEBP")[number % 3])
    return EncodedImage(file.getvalue(), cols, rows, True, turn)


def pixels(number: int, tiles: int) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(number).integers(0, 255, (tiles, 3, SIZE, SIZE), dtype=np.uint8)
    )


def packs() -> list[list[PackImage]]:
    """Images that lie in two and in four shares, tiles of Pillow between them, text only, one tile."""
    return [
        [image(0, 3, 2), image(1, 1, 1), pixels(2, 4), image(3, 2, 1, turn=6)],
        [],
        [image(4, 1, 1)],
        [pixels(5, 5)],
        [pixels(6, 1), image(7, 4, 3)],
        [image(8, 3, 4, turn=3), pixels(9, 3)],
    ]


def plan_of(images: list[PackImage], ranks: int) -> SequencePlan:
    tiles = sum(one.num_tiles if isinstance(one, EncodedImage) else len(one) for one in images)
    visual = np.arange(4 + 4 * tiles) >= 4
    ids = np.where(visual, 0, 1)
    labels = np.where(np.arange(len(ids)) == 3, 1, IGNORE)
    return build_plan([ids], [labels], [visual], PlanSettings(low_grid=1, high_grid=2, tile_multiple=ranks))


def share_of_rank(ranks: int) -> tuple[list[np.ndarray], list[int]]:
    """This rank's tiles of every pack, and numbers of tiles that it cut."""
    group = dist.new_group(list(range(ranks)), backend="gloo") if ranks > 1 else None
    pipeline = TilePipeline(None, SIZE, threads=1)
    channel = BatchChannel([list(range(ranks))], group, group, SIZE, pipeline=pipeline)

    def loader() -> Iterator[HostBatch]:
        while True:
            for number, images in enumerate(packs()):
                yield HostBatch(plan_of(images, ranks), None, images, number)

    source, got, cut = loader() if channel.is_source else None, [], []
    for number in range(len(packs())):
        tiles = channel.receive(source).tiles
        assert tiles is not None
        got.append(tiles.numpy())
        if channel.is_source:  # the next one is on its way
            assert channel.pending_keys == [(number + 1) % len(packs())]
        cut.append(pipeline.images)
    assert channel.files is not None
    for work, _ in channel.files._sending:
        work.wait()
    pipeline.close()
    return got, cut


def reference(ranks: int) -> list[np.ndarray]:
    """Tiles of every pack, padded to its capacity."""
    pipeline, found = TilePipeline(None, SIZE, threads=1), []
    for images in packs():
        parts = [pipeline.cut([Wanted.whole(i)]) if isinstance(i, EncodedImage) else i for i in images]
        blank = plan_of(images, ranks).tile_capacity - sum(map(len, parts))
        found.append(torch.cat([*parts, torch.zeros((blank, 3, SIZE, SIZE), dtype=torch.uint8)]).numpy())
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_cuts_its_own_share(pool: Pool, ranks: int) -> None:
    """In one run DALI gives an image's tiles alike whatever is beside it and whichever of them are wanted."""
    results = pool.run(ranks, share_of_rank, ranks)
    for number, wanted in enumerate(reference(ranks)):
        found = np.concatenate([tiles[number] for tiles, _ in results])
        np.testing.assert_array_equal(found, wanted)
    # Of the first pack: three files, and one more decoding for each that lies in several shares.
    cut = [counts[0] for _, counts in results]
    assert sum(cut) == {1: 3, 2: 3, 4: 4}[ranks], cut


def test_shares_are_equal_and_in_order() -> None:
    images = [image(0, 3, 2), pixels(1, 3), image(2, 2, 2)]
    dealt = split_images(images, 4, 4)
    sizes = [[part.count if isinstance(part, Wanted) else len(part) for part in parts] for parts in dealt]
    assert sizes == [[4], [3, 1], [2, 2], [3]]
    assert [(p.first, p.count) for parts in dealt for p in parts if isinstance(p, Wanted)] == [
        (0, 4),
        (4, 3),
        (0, 2),
        (2, 3),
    ]


def test_a_message_holds_files_and_pixels() -> None:
    parts = [Wanted(image(0, 3, 2, turn=8), 2, 4), pixels(1, 2), Wanted(image(2, 1, 1), 0, 1)]
    back = unpack_parts(pack_parts(parts), SIZE)
    assert [part for part in back if isinstance(part, Wanted)] == [parts[0], parts[2]]
    assert torch.equal(back[1], parts[1])
    assert unpack_parts(pack_parts([]), SIZE) == []
