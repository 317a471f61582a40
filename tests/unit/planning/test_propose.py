"""Proposals against answers known by hand and against every split."""

from dataclasses import replace

import pytest

from megatron_internvlx import platform

platform.setup()

from megatron_internvlx.model.internvit_config import PRESETS  # noqa: E402
from megatron_internvlx.model.sizes import ModelSizes  # noqa: E402
from megatron_internvlx.planning import propose  # noqa: E402
from megatron_internvlx.planning.costs import Cost, LayerCosts, StageMemory  # noqa: E402
from megatron_internvlx.planning.propose import (  # noqa: E402
    layouts,
    propose_expansions,
    propose_parallelism,
    with_expansion,
)
from megatron_internvlx.planning.search import evaluate  # noqa: E402
from megatron_internvlx.planning.simulate import Schedule  # noqa: E402

FREE = Cost(0.0, 0.0)
SCHEDULE = Schedule(2, 1, 4)


def model(layers: int, injections: tuple[int, ...] = ()) -> ModelSizes:
    return ModelSizes(layers, 32, 4, 4, 8, 48, 64, 64, PRESETS["internvit_tiny"], 2, 4, injections)


def layer_costs(seconds: list[float]) -> LayerCosts:
    """A third of a layer's seconds forward, the rest backward; nothing else costs anything."""
    costs = tuple(Cost(x / 3, 2 * x / 3) for x in seconds)
    return LayerCosts(costs, FREE, FREE, (FREE,) * (len(costs) + 1))


def by_depth(shape: ModelSizes) -> LayerCosts:
    """A shallow layer 1 s, a deep one 3 s."""
    return layer_costs([1.0 if i < shape.shallow_layers else 3.0 for i in range(shape.layers)])


def test_layouts_by_hand() -> None:
    assert set(layouts(model(4), 8, 8, 8)) == {
        *[(1, 1, 1, 8), (1, 2, 1, 4), (1, 2, 2, 4), (1, 4, 1, 2)],
        *[(2, 1, 1, 4), (2, 2, 1, 2), (2, 2, 2, 2), (2, 4, 1, 1)],
        *[(4, 1, 1, 2), (4, 2, 1, 1), (4, 2, 2, 1)],
    }
    # DP 4 and 8 do not divide 6 micro-batches, and 3 neither fill 4 ranks nor make groups of 2.
    uneven = {(2, 2, 1, 2), (2, 4, 1, 1), (4, 1, 1, 2), (4, 2, 1, 1), (4, 2, 2, 1)}
    assert set(layouts(model(4), 8, 8, 6)) == uneven


def test_layouts_use_all_gpus_and_divide_heads() -> None:
    for gpus in (8, 12, 64):
        found = list(layouts(model(16), gpus, 8, 96))
        assert found and all(tensor * pipeline * data == gpus for tensor, pipeline, _, data in found)
    for shape, per_node, most in (
        (model(4), 2, 2),
        (replace(model(4), kv_groups=2), 8, 2),
        (replace(model(4), heads=6), 8, 2),
        (replace(model(4), heads=16, kv_groups=16), 8, 8),
    ):
        assert max(tensor for tensor, *_ in layouts(shape, 8, per_node, 8)) == most


# 4 layers of 3 s, 4 micro-batches, 4 GPUs. 1F1B takes (M + P - 1) times a stage's seconds, and
# communication of 0.6 s per further tensor-parallel rank and micro-batch grows with it.
STEPS = {
    (1, 1, 1, 4): 12.0,  # 1 x 12
    (2, 1, 1, 2): 13.2,  # 2 x (6 + 0.6)
    (2, 2, 1, 1): 16.5,  # 5 x (3 + 0.3)
    (1, 2, 1, 2): 18.0,  # 3 x 6
    (4, 1, 1, 1): 19.2,  # 4 x (3 + 1.8)
    (1, 4, 1, 1): 21.0,  # 7 x 3
}


def sizes(found: list[propose.Parallelism]) -> list[tuple[int, int, int, int]]:
    return [(x.tensor, x.pipeline, x.chunks, x.data) for x in found]


def proposals(limit: float = float("inf"), layer: float = 3.0, move: float = 0.6):
    def memory(tensor: int, pipeline: int, data: int) -> StageMemory:
        return StageMemory((1 / tensor,) * 4, (0.0,) * 4, limit=limit)

    return propose_parallelism(
        model(4),
        sorted(STEPS, reverse=True),
        4,
        lambda tensor: layer_costs([layer / tensor] * 4),
        memory,
        lambda tensor: move * (tensor - 1),
    )


def test_fastest_first() -> None:
    found = proposals()
    assert sizes(found) == list(STEPS)
    assert [x.seconds for x in found] == pytest.approx(list(STEPS.values()))
    assert [x.micro_batches for x in found] == [1, 2, 4, 2, 4, 4]


def test_what_does_not_fit_is_left_out() -> None:
    # The fullest rank holds 4 / (TP x PP).
    assert sizes(proposals(limit=1.5)) == [(2, 2, 1, 1), (4, 1, 1, 1), (1, 4, 1, 1)]
    assert proposals(limit=0.9) == []


def test_communication_makes_tensor_parallelism_slower() -> None:
    found = proposals(layer=1e-6)
    seconds = dict(zip(sizes(found), (x.seconds for x in found), strict=True))
    one, two, four = (seconds[size] for size in ((1, 1, 1, 4), (2, 1, 1, 2), (4, 1, 1, 1)))
    assert one < two < four
    assert (two, four) == pytest.approx((2 * 0.6, 4 * 1.8), rel=1e-4)
    free = {x.seconds for x in proposals(move=0) if x.pipeline == 1}
    assert max(free) == pytest.approx(min(free))


def test_expansion_by_hand() -> None:
    """At layer 3, 5 + 3 layers are 9 s and 9 s; 4 and 5 leave 7 and 9, 8 and 6."""
    found = propose_expansions(model(8, (4, 6)), SCHEDULE, by_depth)
    assert {x.layer for x in found} == {3, 4, 5}
    assert found[0].layer == 3 and found[0].plan.counts == (5, 3)
    assert found[0].plan.seconds == pytest.approx(45) and found[0].efficiency == pytest.approx(0.8)
    assert found[0].work == pytest.approx(18 / 16)
    assert not any(x.mark for x in found)


@pytest.mark.parametrize("here", [1, 7, 11, 15])
def test_best_expansion_of_all(here: int) -> None:
    shape = model(16, (here,))
    found = propose_expansions(shape, SCHEDULE, by_depth)
    allowed = range(max(here - 2, 1), min(here + 2, 15) + 1)
    bubbles = {}
    for layer in allowed:
        costs = by_depth(with_expansion(shape, layer))
        plans = [evaluate(costs, SCHEDULE, (n, 16 - n)) for n in range(17)]
        bubbles[layer] = min(plans, key=lambda plan: plan.seconds).bubble
    assert {x.layer: x.plan.bubble for x in found} == pytest.approx(bubbles)
    assert [x.plan.bubble for x in found] == pytest.approx(sorted(bubbles.values()))


def test_injections_move_along() -> None:
    shape = model(8, (4, 6))
    assert with_expansion(shape, 3).injection_layers == (3, 5)
    assert with_expansion(shape, 7).injection_layers == (7,)
    with pytest.raises(ValueError, match="LVTC is off"):
        with_expansion(model(8), 3)


def test_expansions_that_do_not_fit_are_last_and_marked() -> None:
    """A deep layer takes 2, a shallow one 1: 13 in all at layer 3, 12 at 4 (6 + 6 as 5 + 3 layers)."""

    def memory(shape: ModelSizes) -> StageMemory:
        state = tuple(1.0 if i < shape.shallow_layers else 2.0 for i in range(8))
        return StageMemory(state, (0.0,) * 8, limit=6.4)

    found = propose_expansions(model(8, (4, 6)), SCHEDULE, by_depth, memory=memory)
    assert [(x.layer, x.mark) for x in found] == [(4, ""), (5, ""), (3, "does not fit")]
    assert [x.fits for x in found] == [True, True, False]
    assert found[0].plan.memory == (6, 6) and found[2].plan.counts == (5, 3)


def test_a_cut_search_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, schedule = model(16, (8,)), Schedule(4, 2, 8)
    costs = by_depth(shape)
    uncut = propose_expansions(shape, schedule, by_depth, layers=[8])
    wide = StageMemory((1.0,) * 16, (0.0,) * 16)
    arguments = (shape, [(1, 4, 2, 1)], 8, lambda tensor: costs, lambda *_: wide, lambda _: 0.0)
    assert [x.mark for x in uncut] + [x.mark for x in propose_parallelism(*arguments)] == ["", ""]
    monkeypatch.setattr(propose, "_FRONTIER", 1)
    cut = propose_expansions(shape, schedule, by_depth, layers=[8])
    assert [x.mark for x in cut] + [x.mark for x in propose_parallelism(*arguments)] == ["not proven"] * 2
