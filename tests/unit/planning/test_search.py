"""The planner's splits against every possible split, and its strings against Megatron's parser."""

import itertools
import math
import re

import numpy as np
import pytest

from megatron_internvlx import platform

platform.setup()

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout  # noqa: E402

from megatron_internvlx.model.internvit_config import PRESETS  # noqa: E402
from megatron_internvlx.model.sizes import ModelSizes  # noqa: E402
from megatron_internvlx.parallel.layout import StageLayers, check_layout, layout_counts  # noqa: E402
from megatron_internvlx.planning.activations import MemoryModel, rank_activations  # noqa: E402
from megatron_internvlx.planning.costs import (  # noqa: E402
    Cost,
    LayerCosts,
    Machine,
    Profile,
    StageMemory,
    costs_from_flops,
    costs_from_profile,
    stage_memory,
)
from megatron_internvlx.planning.flops import (  # noqa: E402
    BackwardSettings,
    PlanStats,
    forward_flops,
    training_flops,
)
from megatron_internvlx.planning.memory import Layout, StateBytes  # noqa: E402
from megatron_internvlx.planning.search import (  # noqa: E402
    FRONTIER,
    Problem,
    _enumerate,
    evaluate,
    find_plan,
    layout_string,
    uniform_counts,
)
from megatron_internvlx.planning.simulate import Schedule, least_seconds  # noqa: E402

BRUTE_FORCE = 300_000  # splits at most; above that the search must prove its result by bounds
PROVING = 1_500_000  # partial splits kept at once; the default cuts PP 8, VPP 2 with 10 layers
# The search is cut here, and says so: the share of its time that a better split could save at most.
# With more stages than layers, nearly all splits are nearly equal.
CUT = {(8, 2, 13): 0.10, (8, 2, 14): 0.03}


def tiny(layers: int) -> ModelSizes:
    """Expansion at layer 2, one more injection at layer 4."""
    return ModelSizes(layers, 32, 4, 4, 8, 48, 64, 64, PRESETS["internvit_tiny"], 2, 4, (2, 4))


def depth_aware(layers: int, seed: int) -> LayerCosts:
    """Shallow layers cheap, a heavier expansion, an encoder and a loss; frozen encoder in odd cases."""
    rng = np.random.default_rng([layers, seed])
    expand = int(rng.integers(0, layers + 1))
    costs = [Cost(0.3, 0.6) if i < expand else Cost(1.0, 2.0) for i in range(layers)]
    if expand < layers:
        costs[expand] = Cost(1.5, 3.0)
    vision = float(rng.uniform(0.2, 4))
    move = [Cost(0.02, 0.02) if i > expand else Cost(0.05, 0.01) for i in range(layers + 1)]
    first = Cost(vision, 0 if seed % 2 else 2 * vision)
    return LayerCosts(tuple(costs), first, Cost(0.5, float(rng.uniform(0.5, 2))), tuple(move))


def every_split(layers: int, stages: int) -> np.ndarray:
    """Ends of the stages of all splits, empty stages included: [N, S]."""
    inner = itertools.combinations_with_replacement(range(layers + 1), stages - 1)
    flat = np.fromiter(itertools.chain.from_iterable(inner), np.int64)
    inner_ends = flat.reshape(-1, stages - 1) if stages > 1 else np.zeros((1, 0), np.int64)
    return np.concatenate([inner_ends, np.full((len(inner_ends), 1), layers)], axis=1)


def schedules(pipeline: int, chunks: int) -> Schedule:
    # As many micro-batches as ranks, or more, alternating over the cases.
    return Schedule(pipeline, chunks, pipeline * (1 + (pipeline + chunks) % 2), overlap=bool(pipeline % 3))


CASES = [(p, v) for p in range(1, 9) for v in (1, 2) if p > 1 or v == 1]


@pytest.mark.parametrize("pipeline,chunks", CASES)
def test_no_split_is_faster(pipeline: int, chunks: int) -> None:
    """All of PP <= 8, VPP <= 2, L <= 16 but CUT: 212 of the 240 cases against every split there is."""
    schedule = schedules(pipeline, chunks)
    for layers in range(1, 17):
        if (pipeline, chunks, layers) in CUT:
            continue
        costs = depth_aware(layers, seed=pipeline)
        plan = find_plan(
            costs, schedule, frontier=PROVING if (pipeline, chunks, layers) == (8, 2, 10) else FRONTIER
        )
        assert plan.proven
        if math.comb(layers + schedule.stages - 1, schedule.stages - 1) <= BRUTE_FORCE:
            everything = Problem(costs, schedule).seconds(every_split(layers, schedule.stages))
            assert plan.seconds == pytest.approx(everything.min(), rel=1e-12)


@pytest.mark.parametrize("pipeline,chunks", CASES)
def test_no_split_is_faster_in_a_second_draw(pipeline: int, chunks: int) -> None:
    schedule = schedules(pipeline, chunks)
    for layers in range(1, 9):
        costs = depth_aware(layers, seed=pipeline + 9)
        plan = find_plan(costs, schedule)
        assert plan.proven
        if math.comb(layers + schedule.stages - 1, schedule.stages - 1) <= 20_000:
            everything = Problem(costs, schedule).seconds(every_split(layers, schedule.stages))
            assert plan.seconds == pytest.approx(everything.min(), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("case", CUT)
def test_cut_searches_are_near_the_best(case: tuple[int, int, int]) -> None:
    """The bounds drop every split that would take less than the plan by more than the stated share."""
    pipeline, chunks, layers = case
    costs, schedule = depth_aware(layers, seed=pipeline), schedules(pipeline, chunks)
    plan = find_plan(costs, schedule)
    assert not plan.proven
    assert plan.seconds <= evaluate(costs, schedule, uniform_counts(layers, schedule.stages)).seconds
    faster, complete = _enumerate(Problem(costs, schedule), plan.seconds * (1 - CUT[case]), PROVING)
    assert complete and not len(faster)


def test_a_cut_search_says_so() -> None:
    plan = find_plan(depth_aware(10, seed=8), schedules(8, 2), frontier=1_000)
    assert not plan.proven


@pytest.mark.parametrize("pipeline,chunks", [case for case in CASES if case[0] > 1])
def test_bounds_never_exceed_the_simulation(pipeline: int, chunks: int) -> None:
    """With this, a search that drops only splits above the best one known drops no better one."""
    schedule, rng = schedules(pipeline, chunks), np.random.default_rng(pipeline)
    for layers in (5, 16):
        costs = depth_aware(layers, seed=chunks)
        problem = Problem(costs, schedule)
        inner = np.sort(rng.integers(0, layers + 1, (300, schedule.stages - 1)))
        ends = np.concatenate([inner, np.full((300, 1), layers)], axis=1)
        seconds = problem.seconds(ends)
        for ranks in range(1, pipeline + 1):
            # What is not decided must not matter: later ends are wiped.
            known = ends.copy()
            undecided = [s for s in range(schedule.stages) if ranks <= s % pipeline < pipeline - 1]
            known[:, undecided] = 0
            partial = problem.partial_costs(known, ranks)
            assert (least_seconds(schedule, ranks, partial) <= seconds * (1 + 1e-12)).all()
            for limit in (np.median(seconds), seconds.max() * 1.01):
                bound = problem.quick_bound(partial, ranks, float(limit))
                assert (bound <= seconds * (1 + 1e-12))[seconds < limit].all()


def test_plan_beats_even_layers() -> None:
    layers = [Cost(0.3, 0.6)] * 6 + [Cost(1.0, 2.0)] * 10
    costs, schedule = (
        LayerCosts(tuple(layers), Cost(2, 4), Cost(1, 2), (Cost(0.05, 0.05),) * 17),
        Schedule(4, 1, 8),
    )
    plan, even = find_plan(costs, schedule), evaluate(costs, schedule, uniform_counts(16, 4))
    assert plan.seconds < even.seconds and plan.bubble < even.bubble and plan.imbalance < even.imbalance


def test_memory_limits_the_split() -> None:
    costs, schedule = depth_aware(12, seed=2), Schedule(3, 1, 6)
    memory = StageMemory((1.0,) * 12, (0.5,) * 12, 2.0, 1.0, 2.0, 0.0)
    free = find_plan(costs, schedule, memory)
    assert free.memory is not None
    first = free.counts[0]
    assert free.memory[0] == first * 1.0 + 2.0 + 3 * (first * 0.5 + 1.0)  # three micro-batches in flight
    tight = StageMemory(
        *(vars(memory)[name] for name in list(vars(memory))[:6]), limit=max(free.memory) - 0.1
    )
    limited = find_plan(costs, schedule, tight)
    assert (
        limited.memory is not None and max(limited.memory) <= tight.limit and limited.seconds >= free.seconds
    )
    with pytest.raises(ValueError, match="no split found that fits"):
        find_plan(costs, schedule, StageMemory((1.0,) * 12, (0.5,) * 12, limit=1.0))


@pytest.mark.parametrize("ends", [(3, 5, 8), (1, 2, 4, 5, 7, 8)])
def test_memory_of_a_split_is_that_of_the_dry_run(ends: tuple[int, ...]) -> None:
    """Carried features and what recomputation brings back count once per stage, not per layer.

    With virtual stages the ranks are at their fullest when their heavier chunks are in flight, not always at the
    end of the warm-up.
    """
    stats = PlanStats(4, 4, 4, 256, 256**2, 448, 448**2, 192)
    chunks = [StageLayers(a, b) for a, b in itertools.pairwise((0, *ends))]
    layout = Layout(1, 3, 1, stages=tuple(tuple(chunks[rank::3]) for rank in range(3)))
    per_parameter = StateBytes(weight=2, fp8_copies=0, gradient=4, optimizer=12, distributed=True)
    for full in (frozenset(range(8)), frozenset()):
        model = MemoryModel(tiny(8), layout, BackwardSettings(full_layers=full), per_parameter, local=False)
        schedule = layout.schedule(6)
        plan = evaluate(depth_aware(8, 1), schedule, layout.counts, stage_memory(model, stats, float("inf")))
        for rank in range(3):
            parts, working, _ = rank_activations(model, rank, stats, schedule)
            assert plan.memory is not None
            assert plan.memory[rank] == model.state(rank).total + sum(parts.values()) + working


@pytest.mark.parametrize(
    ("layout", "pipeline", "message"),
    [
        ("Ett|ttL", 2, "has 4 layers (2 + 2) and the model 5; ivlx plan"),
        ("Ett|ttt|L", 2, "has 3 stages, which --pipeline-model-parallel-size 2 does not divide"),
        ("Ett|tttL", 1, "has 2 stages and --pipeline-model-parallel-size is 1"),
        ("tt|tttL", 2, "must begin with E"),
        ("Exx|tttL", 2, "Invalid layer character: x"),
    ],
)
def test_layouts_that_do_not_fit(layout: str, pipeline: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_layout(layout, pipeline=pipeline, layers=5)
    check_layout("Ett|tttL", pipeline=2, layers=5)


@pytest.mark.parametrize("counts", [(3, 2, 2, 1), (0, 4, 0, 4), (8, 0, 0, 0)])
def test_layouts_are_read_by_megatron(counts: tuple[int, ...]) -> None:
    layout = layout_string(counts)
    assert layout_counts(layout) == counts
    for pipeline in (2, 4):
        parsed = PipelineParallelLayerLayout(layout, pipeline)
        parsed.validate_layer_layout(sum(counts), None)
        for stage, count in enumerate(counts):
            row = parsed.layout[stage % pipeline][stage // pipeline]
            assert sum(kind.name == "decoder" for kind in row) == count


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="must begin with E"):
        layout_counts("tt|tt")
    with pytest.raises(ValueError, match="the model has 4 layers"):
        evaluate(depth_aware(4, 0), Schedule(2, 1, 2), (1, 2))


def test_profile_gives_every_layer_its_kind(tmp_path) -> None:
    sizes = tiny(6)
    kinds = {"shallow": Cost(1, 2), "expand": Cost(4, 5), "deep": Cost(2, 3), "inject": Cost(3, 4)}
    Profile(Cost(9, 9), Cost(8, 8), kinds, {"model": "x"}).save(tmp_path / "p.json")
    profile = Profile.load(tmp_path / "p.json")
    boundaries = (Cost(0.1, 0.1),) * 7
    costs = costs_from_profile(profile, sizes, boundaries)
    assert [c.forward for c in costs.layers] == [1, 1, 4, 2, 3, 2]
    assert costs.first == Cost(9, 9) and costs.boundaries == boundaries
    with pytest.raises(ValueError, match="no inject layers"):
        costs_from_profile(
            Profile(Cost(1, 1), Cost(1, 1), {k: v for k, v in kinds.items() if k != "inject"}, {}), sizes, ()
        )


def test_costs_from_flops_add_up() -> None:
    sizes = tiny(6)
    stats = PlanStats(3, 3, 3, 40, 1600, 76, 76**2, 20)
    machine, settings = Machine(1e9, 1e9, 1e-3), BackwardSettings(freeze_vision=True)
    costs = costs_from_flops(sizes, stats, settings, machine, tensor_parallel=2)
    training = training_flops(forward_flops(sizes, stats), settings)
    assert costs.total == pytest.approx(training.hardware / 2e9)
    # In front of layer 2 the rows are shallow and features travel, whose gradient nobody wants.
    features = 3 * sizes.features_per_tile
    assert costs.boundaries[2].forward == pytest.approx(1e-3 + (40 * 32 + features) * 2 / 2 / 1e9)
    assert costs.boundaries[2].backward == pytest.approx(1e-3 + 40 * 32 * 2 / 2 / 1e9)
    assert costs.boundaries[5].forward == pytest.approx(1e-3 + 76 * 32 * 2 / 2 / 1e9)
