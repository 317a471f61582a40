"""The plan against one written out row by row, with every row named instead of numbered."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_internvlx.data.plan import (
    IGNORE,
    PhasePlan,
    PlanSettings,
    SequencePlan,
    build_plan,
    pack_plan,
    unpack_plan,
)

PAD = ("padding",)


@dataclass
class Rows:
    """A micro-batch as named rows: ("text", sample, token) and ("visual", tile, cell)."""

    samples: list[list[tuple]]

    @classmethod
    def of(cls, described: list[list[tuple[int, bool] | int]], cells: int) -> "Rows":
        """From samples of (token id, supervised) pairs and of numbers of tiles."""
        samples, tile = [], 0
        for sample, parts in enumerate(described):
            rows: list[tuple] = []
            for part in parts:
                if isinstance(part, tuple):
                    rows.append(("text", sample, part))
                    continue
                for _ in range(part):
                    rows += [("visual", tile, cell) for cell in range(cells)]
                    tile += 1
            samples.append(rows)
        return cls(samples)

    @property
    def flat(self) -> list[tuple]:
        return [row for rows in self.samples for row in rows]

    def arrays(self) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """What the loader delivers: ids, labels and the visual mask of every sample."""
        text = [[row[2] if row[0] == "text" else (999, False) for row in rows] for rows in self.samples]
        ids = [np.array([token for token, _ in rows]) for rows in text]
        labels = [np.array([token if asked else IGNORE for token, asked in rows]) for rows in text]
        return ids, labels, [np.array([row[0] == "visual" for row in rows]) for rows in self.samples]


def planned(described: list, chosen: PlanSettings, numbers: list[int] | None = None) -> SequencePlan:
    return build_plan(*Rows.of(described, chosen.high_grid**2).arrays(), chosen, numbers)


token = st.tuples(st.integers(1, 50), st.booleans())
sample = st.lists(st.one_of(token, st.integers(0, 2)), max_size=8).map(lambda parts: [(7, False), *parts])
batches = st.lists(sample, min_size=1, max_size=4)


@st.composite
def some_settings(draw) -> PlanSettings:
    lvtc = draw(st.booleans())
    low = draw(st.sampled_from([1, 2]))
    return PlanSettings(
        low_grid=low if lvtc else 2 * low,
        high_grid=low * draw(st.sampled_from([2, 3])) if lvtc else 2 * low,
        lvtc=lvtc,
        alignment=draw(st.sampled_from([1, 4, 16])),
        tile_multiple=draw(st.sampled_from([1, 2, 4])),
        supervised_budget=draw(st.sampled_from([None, 64])),
    )


def check_phase(phase: PhasePlan, rows: Rows, alignment: int) -> list[tuple]:
    """Compares one phase with its named rows; returns them, padding included."""
    named = rows.flat
    padding = -len(named) % alignment
    assert phase.length == len(named) + padding
    lengths = [len(sample) for sample in rows.samples] + ([padding] if padding else [])
    assert list(phase.segment_lengths) == lengths
    assert phase.position_ids.tolist() == [i for n in lengths for i in range(n)]
    assert phase.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert phase.max_seqlen == max(lengths)
    assert phase.visual_rows.tolist() == [i for i, row in enumerate(named) if row[0] == "visual"]
    return named + [PAD] * padding


@given(batches, some_settings())
@settings(max_examples=150, deadline=None)
def test_every_index_names_the_right_row(described: list, chosen: PlanSettings) -> None:
    plan = planned(described, chosen)
    deep_rows = Rows.of(described, chosen.high_grid**2)
    shallow_rows = Rows.of(described, chosen.low_grid**2)
    deep = check_phase(plan.deep, deep_rows, chosen.alignment)
    shallow = check_phase(plan.shallow, shallow_rows, chosen.alignment) if chosen.lvtc else deep
    assert (plan.entry is plan.shallow) and (chosen.lvtc or plan.shallow is plan.deep)

    tiles = sum(part for parts in described for part in parts if isinstance(part, int))
    assert (plan.num_tiles, plan.encoded_tiles) == (tiles, max(tiles, 1))
    assert plan.tile_capacity == -(-max(tiles, 1) // chosen.tile_multiple) * chosen.tile_multiple

    entry_cells = chosen.low_grid**2
    projected = [("visual", tile, cell) for tile in range(tiles) for cell in range(entry_cells)]
    embedded = [row if row[0] == "text" else PAD for row in shallow]
    assert [(embedded + projected)[i] for i in plan.merge_index] == shallow
    assert plan.tokens.tolist() == [row[2][0] if row[0] == "text" else 0 for row in embedded]

    if not chosen.lvtc:
        assert plan.expand_index is None
        return
    upsampled = [("visual", tile, cell) for tile in range(tiles) for cell in range(chosen.high_grid**2)]
    taken = [(shallow + upsampled)[i] for i in plan.expand_index]
    real = len(deep_rows.flat)
    assert taken[:real] == deep[:real]
    # Padding comes from padding if there is any to take, else from the first row.
    assert set(taken[real:]) <= {PAD if PAD in shallow else shallow[0]}


@given(batches, some_settings())
@settings(max_examples=100, deadline=None)
def test_supervision(described: list, chosen: PlanSettings) -> None:
    """Row i predicts row i+1 of the same sample; a new answer starts after every unsupervised token."""
    plan = planned(described, chosen)
    rows = Rows.of(described, chosen.high_grid**2)
    expected, answer, start = [], -1, 0
    for number, sample_rows in enumerate(rows.samples):
        inside = False
        for i in range(len(sample_rows) - 1):
            following = sample_rows[i + 1]
            asked = following[0] == "text" and following[2][1]
            if asked:
                answer += not inside
                expected.append((start + i, following[2][0], answer, number))
            inside = asked
        start += len(sample_rows)
    found = zip(plan.loss_rows, plan.targets, plan.answer_ids, plan.sample_of_loss_row, strict=True)
    assert [tuple(int(x) for x in row) for row in found] == expected


def same(a: SequencePlan, b: SequencePlan) -> bool:
    def equal(x, y) -> bool:
        if isinstance(x, PhasePlan):
            return all(equal(getattr(x, f.name), getattr(y, f.name)) for f in fields(x))
        return np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y

    return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


@given(batches, some_settings(), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_packing_is_lossless(described: list, chosen: PlanSettings, longer: int) -> None:
    plan = planned(described, chosen, [1000 + i for i in range(len(described))])
    flat = pack_plan(plan)
    assert flat.dtype == np.int32 and flat.ndim == 1
    assert same(unpack_plan(np.concatenate([flat, np.full(longer, -1, np.int32)])), plan)


def test_sample_numbers() -> None:
    chosen = PlanSettings(1, 2)
    assert planned([[(1, False)], [(2, True)]], chosen).sample_ids.tolist() == [0, 1]
    assert planned([[(1, False)], [(2, True)]], chosen, [70, 3]).sample_ids.tolist() == [70, 3]


# One sample of 3 text rows and 2 tiles: 5 shallow and 11 deep rows.
TWO_TILES = [[(1, False), 2, (2, False), (3, True)]]


def test_static_budgets() -> None:
    """Whatever the samples, the lengths are the budgets."""
    chosen = PlanSettings(1, 2, shallow_length=8, deep_length=12, tile_budget=3, alignment=4)
    for described in (TWO_TILES, [[(1, False), (2, True)]], [[(5, False), 1], [(6, False)]]):
        plan = planned(described, chosen)
        assert (plan.shallow.length, plan.deep.length, plan.tile_capacity) == (8, 12, 3)
        assert sum(plan.shallow.segment_lengths) == 8
        assert sum(plan.deep.segment_lengths) == 12
        assert len(plan.merge_index) == len(plan.tokens) == 8
        assert len(plan.expand_index) == 12


def test_rows_of_the_output_layer() -> None:
    """All that enter layer 0, or the budget's; with variable boundaries the supervised ones."""
    static = PlanSettings(1, 2, shallow_length=8, deep_length=12, tile_budget=3, sample_budget=2)
    for described in (TWO_TILES, [[(1, False), (2, True), (3, True)]]):
        count = len(planned(described, PlanSettings(1, 2)).loss_rows)
        assert planned(described, PlanSettings(1, 2)).supervised_capacity == count
        assert planned(described, static).supervised_capacity == 8
        few = planned(described, replace(static, supervised_budget=2))
        assert few.supervised_capacity == unpack_plan(pack_plan(few)).supervised_capacity == 2
        assert len(few.loss_rows) == count


def test_exactly_full() -> None:
    plan = planned(TWO_TILES, PlanSettings(1, 2, shallow_length=5, deep_length=11, tile_budget=2))
    assert plan.shallow.segment_lengths == (5,)
    assert plan.deep.segment_lengths == (11,)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"shallow_length": 4}, "a micro-batch has 5 shallow rows, over the static budget of 4"),
        ({"deep_length": 10}, "a micro-batch has 11 deep rows, over the static budget of 10"),
        ({"tile_budget": 1}, "a micro-batch has 2 tiles, over the static budget of 1"),
        ({"sample_budget": 0}, "a micro-batch has 1 samples, over the static budget of 0"),
        ({"supervised_budget": 0}, "a micro-batch has 1 supervised tokens, over the static budget of 0"),
    ],
)
def test_over_a_static_budget(budget: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(TWO_TILES, PlanSettings(1, 2, **budget))


def test_torn_tile() -> None:
    ids = [np.array([1, 2]), np.array([0, 0, 0, 3])]
    visual = [np.array([False, False]), np.array([True, True, True, False])]
    with pytest.raises(ValueError, match=r"sample 1 of the micro-batch has 3 visual rows.*tiles of 4"):
        build_plan(ids, ids, visual, PlanSettings(1, 2))
