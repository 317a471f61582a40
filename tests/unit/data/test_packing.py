"""Packs obey all budgets at once, hold every sample once, are full, and even across ranks."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_internvlx.data.packing import Budget, Cost, fill, pack, tile_spread
from megatron_internvlx.data.rejects import BadSample
from tests.unit.data.conftest import record

LOW, HIGH = 64, 256


def long_tailed(count, seed=0, budget=None):
    """Text lognormal (median 200 tokens, sigma 1, at most 4,000); a fifth of the samples without an image,
    the others with geometric(0.18) tiles, at most 13; two thirds of the text are supervised; a sample over a budget
    loses text."""
    rng = np.random.default_rng(seed)
    text = np.clip(rng.lognormal(5.3, 1.0, count), 16, 4000).astype(int) + 20
    tiles = np.where(rng.random(count) < 0.2, 0, np.clip(rng.geometric(0.18, count), 1, 13))
    costs = np.stack([text + tiles * LOW, text + tiles * HIGH, tiles, text * 2 // 3], 1)
    return np.minimum(costs, budget.limits()) if budget else costs


@st.composite
def problems(draw):
    budget = Budget(
        draw(st.integers(1, 60)),
        draw(st.integers(1, 200)),
        draw(st.none() | st.integers(1, 20)),
        supervised=draw(st.none() | st.integers(1, 40)),
    )
    sample = st.builds(
        Cost,
        st.integers(1, budget.shallow),
        st.integers(1, budget.deep),
        st.integers(0, budget.tiles if budget.tiles else 30),
        st.integers(0, budget.supervised if budget.supervised else 60),
    )
    return draw(st.lists(sample, max_size=60)), budget


@settings(max_examples=150, deadline=None)
@given(problems())
def test_every_sample_is_in_one_pack_and_no_pack_is_over_a_budget(problem):
    costs, budget = problem
    packs = pack(costs, budget)
    assert sorted(int(i) for rows in packs for i in rows) == list(range(len(costs)))
    for rows in packs:
        assert len(rows)
        assert budget.fits(Cost(*(sum(costs[i][k] for i in rows) for k in range(4))))
    again = pack(costs, budget)
    assert [list(rows) for rows in packs] == [list(rows) for rows in again]
    tiles = [sum(costs[i].tiles for i in rows) for rows in packs]
    assert tiles == sorted(tiles, reverse=True)


def test_a_sample_over_a_budget_is_named_with_both_numbers():
    with pytest.raises(ValueError, match="sample 1 has 9 tiles, must be at most 8"):
        pack([Cost(1, 1, 8), Cost(1, 1, 9)], Budget(10, 10, 8))
    with pytest.raises(ValueError, match="sample 0 has 5 supervised tokens, must be at most 4"):
        pack([Cost(6, 6, 0, 5)], Budget(10, 10, supervised=4))


def test_supervised_tokens_without_a_budget_change_no_pack():
    for budget in (Budget(4096, 8192, 24), Budget(3000, 8192)):
        costs = long_tailed(1000, 5, budget)
        without = costs * [1, 1, 1, 0]
        for ours, theirs in zip(pack(costs, budget), pack(without, budget), strict=True):
            assert ours.tolist() == theirs.tolist()


def test_shares_of_a_budget():
    assert Budget(100, 200, 8, supervised=17).share(4) == Budget(25, 50, 2, supervised=4)
    with pytest.raises(ValueError, match="packing budget of supervised tokens is 0"):
        Budget(100, 200, 8, supervised=3).share(4)


@pytest.mark.parametrize(
    ("budget", "binding"),
    [
        (Budget(4096, 8192, 32), "deep tokens"),
        (Budget(4096, 8192, 24), "tiles"),
        (Budget(3000, 8192, 100), "shallow tokens"),
    ],
)
def test_20000_long_tailed_samples_fill_the_binding_budget(budget, binding):
    costs = long_tailed(20_000, budget=budget)
    start = time.process_time()
    packs = pack(costs, budget)
    per_sample = (time.process_time() - start) / len(costs)
    filled = fill(costs, packs, budget)
    assert filled.binding == binding
    assert filled.best >= 0.95
    assert per_sample < 1e-3


def test_a_buffer_of_1000_is_as_full():
    for seed, most in enumerate((None, None, 1024)):
        budget = Budget(4096, 8192, 32, supervised=most)
        costs = long_tailed(1000, seed, budget)
        filled = fill(costs, pack(costs, budget), budget)
        assert filled.best >= 0.95 and (filled.binding == "supervised tokens") == (most is not None)


def test_ranks_get_similar_tiles_at_the_same_step():
    budget, ranks = Budget(4096, 8192, 32), 8
    packed, in_order = [], []
    for rank in range(ranks):
        costs = long_tailed(1000, 100 + rank, budget)
        packed.append([int(costs[rows, 2].sum()) for rows in pack(costs, budget)])
        # what a loader without lookahead does: fill one pack after the other
        tiles, room = [0], budget.limits()
        for cost in costs:
            if (cost > room).any():
                tiles.append(0)
                room = budget.limits()
            room = room - cost
            tiles[-1] += int(cost[2])
        in_order.append(tiles)
    assert tile_spread(packed) < 0.1 < 0.25 < tile_spread(in_order)


def test_budgets_below_one_are_refused():
    with pytest.raises(ValueError, match="packing budget of tiles is 0"):
        Budget(1, 1, 0)


def packed_encoder(encoder, **budget):
    given = {"shallow": 10_000, "deep": 10_000, "tiles": 100, **budget}
    return encoder(shallow_tokens_per_tile=1, max_length=None, budget=Budget(**given))


def test_a_sample_over_the_budget_gives_up_tiles_before_text(disk, encoder):
    entry = record(disk.image("a.png", 150, 90), "What?", "A thing.")
    manifest = disk.add("a", [entry]).manifest()
    free = packed_encoder(encoder).encode(manifest.record(0))
    assert (free.num_tiles, free.dropped_tiles) == (7, 0)
    text = len(free.input_ids) - 7 * 4
    # 3x2 and its thumbnail, then 2x1, then one tile: what RVTC chooses for 150x90 under a falling maximum
    for budget, tiles in (({"tiles": 6}, 3), ({"deep": text + 11}, 1), ({"shallow": text + 6}, 3)):
        tool = packed_encoder(encoder, **budget)
        sample = tool.encode(manifest.record(0))
        assert (sample.num_tiles, sample.dropped_tiles, sample.dropped_tokens) == (tiles, 7 - tiles, 0)
        supervised = int((sample.labels != -100).sum())
        assert tool.cost(sample) == Cost(text + tiles, text + 4 * tiles, tiles, supervised)
        assert tool.settings.budget.fits(tool.cost(sample))


def test_text_is_cut_after_a_whole_answer_and_never_inside_an_image(disk, encoder):
    rounds = ["<image>\nWhat?", "A thing."] + ["And this?", "Another thing, and much more of it."] * 20
    manifest = disk.add("a", [record(disk.image("a.png", 150, 90), *rounds)]).manifest()
    whole = packed_encoder(encoder).encode(manifest.record(0))
    text = len(whole.input_ids) - 7 * 4
    for limit in (text - 10, text // 2):
        tool = packed_encoder(encoder, deep=limit + 4)
        sample = tool.encode(manifest.record(0))
        assert sample.num_tiles == 1
        assert sample.dropped_tokens > 0
        assert int(sample.is_visual.sum()) == 4
        assert tool.settings.budget.fits(tool.cost(sample))
        assert sample.labels[-1] != -100 or sample.labels[-2] != -100  # ends with an answer
    with pytest.raises(BadSample, match=r"image_truncated|answer_truncated"):
        packed_encoder(encoder, deep=10).encode(manifest.record(0))


def test_answers_over_the_budget_are_cut_and_no_tile_is(disk, encoder):
    rounds = ["<image>\nWhat?", "A thing."] + ["And this?", "Another thing, and much more of it."] * 20
    manifest = disk.add("a", [record(disk.image("a.png", 150, 90), *rounds)]).manifest()
    whole = packed_encoder(encoder).encode(manifest.record(0))
    answers = packed_encoder(encoder).cost(whole).supervised
    tool = packed_encoder(encoder, supervised=answers // 2)
    sample = tool.encode(manifest.record(0))
    cost = tool.cost(sample)
    # Less than one more answer would fit.
    assert answers // 2 - 20 < cost.supervised <= answers // 2
    assert (sample.num_tiles, sample.dropped_tiles) == (7, 0)
    assert sample.dropped_tokens == len(whole.input_ids) - len(sample.input_ids) > 0
    assert sample.labels[-1] != -100 or sample.labels[-2] != -100  # ends with an answer
    assert packed_encoder(encoder, supervised=answers).encode(manifest.record(0)).dropped_tokens == 0
    with pytest.raises(BadSample, match="answer_truncated") as error:
        packed_encoder(encoder, supervised=2).encode(manifest.record(0))
    assert f"({answers} supervised tokens, of which 2 fit); raise --max-supervised" in str(error.value)


def test_no_tile_is_given_up_for_text_that_is_cut_with_its_answers(disk, encoder):
    """Its supervised tokens are cut first; tiles only for what is left."""
    rounds = ["<image>\nWhat?", "A thing."] + ["And this?", "Another thing, and much more of it."] * 20
    manifest = disk.add("a", [record(disk.image("a.png", 150, 90), *rounds)]).manifest()
    few = {
        "supervised": packed_encoder(encoder)
        .cost(packed_encoder(encoder).encode(manifest.record(0)))
        .supervised
        // 2
    }
    alone = packed_encoder(encoder, **few).encode(manifest.record(0))
    sample = packed_encoder(encoder, deep=len(alone.input_ids), **few).encode(manifest.record(0))
    assert (sample.num_tiles, sample.dropped_tiles, sample.dropped_tokens) == (7, 0, alone.dropped_tokens)
    tight = packed_encoder(encoder, deep=len(alone.input_ids) - 1, **few).encode(manifest.record(0))
    assert tight.num_tiles == 7 - tight.dropped_tiles < 7


def test_costs_of_other_columns_are_refused() -> None:
    """Read as rows of four, samples would be lost."""
    with pytest.raises(
        ValueError, match=r"shape \(8, 3\), must be \[n, 4\]: shallow tokens, .*supervised tokens"
    ):
        pack(np.ones((8, 3), int), Budget(4, 4))
    assert pack([], Budget(4, 4)) == []


def test_more_images_than_tiles_in_a_pack_is_a_bad_sample(disk, encoder):
    names = [disk.image(f"{i}.png", 40 + i, 30) for i in range(3)]
    manifest = disk.add("a", [record(names, "<image><image><image>Which?", "This.")]).manifest()
    with pytest.raises(BadSample, match="too_many_images"):
        packed_encoder(encoder, tiles=2).encode(manifest.record(0))


def test_no_pack_has_more_samples_than_allowed() -> None:
    """Many short samples: their packs are cut, every sample stays in one."""
    costs = [Cost(2, 2, 0)] * 50 + [Cost(30, 60, 3)]
    packs = pack(costs, Budget(100, 100, 4, samples=8))
    assert max(map(len, packs)) == 8
    assert sorted(i for rows in packs for i in rows) == list(range(51))
    assert max(map(len, pack(costs, Budget(100, 100, 4)))) > 8
