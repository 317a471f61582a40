"""Adapters in the figures of the dry run, by hand: parameters, FLOPs, memory and checkpoints."""

import dataclasses

import pytest

from megatron_internvlx import platform

platform.setup()

from megatron_internvlx.lora_settings import TARGETS  # noqa: E402
from megatron_internvlx.model.internvit_config import PRESETS  # noqa: E402
from megatron_internvlx.model.presets import preset  # noqa: E402
from megatron_internvlx.model.sizes import ModelSizes, model_sizes  # noqa: E402
from megatron_internvlx.parallel.layout import StageLayers  # noqa: E402
from megatron_internvlx.planning.activations import MemoryModel, chunk_activations  # noqa: E402
from megatron_internvlx.planning.adapters import all_adapters  # noqa: E402
from megatron_internvlx.planning.costs import Machine, boundary_costs  # noqa: E402
from megatron_internvlx.planning.flops import (  # noqa: E402
    BackwardSettings,
    PlanStats,
    forward_flops,
    training_flops,
)
from megatron_internvlx.planning.memory import Layout, StateBytes  # noqa: E402
from megatron_internvlx.planning.parameters import parameters  # noqa: E402
from megatron_internvlx.planning.trained import trained_lines, trained_parameters  # noqa: E402

VIT = dataclasses.replace(PRESETS["internvit_tiny"], patch_size=7)  # 8 x 8 patches
PLAIN = ModelSizes(4, 128, 4, 2, 32, 352, 512, 512, VIT, 2, 4, (2, 3))
RANK = 4
# Of one decoder layer: three A of 128, B of 128 + 2 * 64 rows; A and B of 128.
ATTENTION = RANK * (3 * 128 + 256) + RANK * (128 + 128)
# Gate and up: two A of 128, B of 2 * 352 rows; down.
MLP = RANK * (2 * 128 + 704) + RANK * (352 + 128)
STATS = PlanStats(3, 3, 3, 40, 500, 70, 1500, 20)
BF16 = StateBytes(2, 0, 4, 12, distributed=False)


def with_adapters(*targets: str, **changes) -> ModelSizes:
    return dataclasses.replace(PLAIN, lora_rank=RANK, lora_targets=frozenset(targets), **changes)


def memory(sizes: ModelSizes, *, tensor: int = 1, **backward) -> MemoryModel:
    parts = frozenset(TARGETS[target] for target in sizes.lora_targets)
    layout = Layout(tensor, 1, 1, stages=((StageLayers(0, 4),),))
    return MemoryModel(sizes, layout, BackwardSettings(adapted=parts, **backward), BF16, local=False)


def test_parameters_of_every_target() -> None:
    c, f = VIT.hidden_size, VIT.ffn_hidden_size
    vision = RANK * ((3 * c + 3 * c) + (c + c) + (c + f) + (f + c))
    branch = 4 * RANK * (128 + 128) + 3 * RANK * (128 + 512)

    def projector(grid: int) -> int:
        return RANK * ((8 // grid) ** 2 * c + 128) + 2 * RANK * (c + 128) + 2 * branch

    assert all_adapters(with_adapters(*TARGETS)) == {
        "decoder_attention": 4 * ATTENTION,
        "decoder_mlp": 4 * MLP,
        "vision": VIT.num_layers * vision,
        "projectors": projector(2) + 2 * projector(4),
    }
    assert all_adapters(PLAIN) == {}
    sizes = with_adapters("decoder_attention")
    assert parameters(sizes) == parameters(PLAIN) | {"adapters": 4 * ATTENTION}
    experts = with_adapters("decoder_attention", "decoder_mlp", experts=8, expert_layers=(1, 3))
    assert all_adapters(experts) == {"decoder_attention": 4 * ATTENTION, "decoder_mlp": 2 * MLP}
    mlp = with_adapters("projectors", projector="mlp")
    assert all_adapters(mlp) == {
        "projectors": sum(RANK * ((8 // g) ** 2 * c + 128 + 128 + 128) for g in (2, 4, 4))
    }


def test_tensor_parallel_ranks_share_one_side_of_an_adapter() -> None:
    """Column-parallel layers divide B, row-parallel ones A; the vision encoder's are whole on every rank."""
    sizes = with_adapters("decoder_attention", "decoder_mlp")
    parts = {part.name: part for part in memory(sizes, tensor=2).state(0).parts}
    column = RANK * (3 * 128 + 256 // 2 + 2 * 128 + 704 // 2)
    row = RANK * (128 // 2 + 128 + 352 // 2 + 128)
    assert parts["decoder_adapters"].count == 4 * (column + row)
    vision = with_adapters("vision")
    counts = [next(p.count for p in memory(vision, tensor=t).state(0).parts if p.adapters) for t in (1, 2)]
    assert counts[0] == counts[1]


def test_only_adapters_and_whole_parts_have_gradients_and_optimizer_state() -> None:
    sizes = with_adapters("decoder_attention", "decoder_mlp")
    own = 4 * (ATTENTION + MLP)
    projectors = sum(n for part, n in parameters(PLAIN).items() if "project" in part or "injection" in part)
    state = memory(sizes, freeze_vision=True).state(0)
    assert state.trainable == own + projectors
    assert state.weights == 2 * (sum(parameters(PLAIN).values()) + own)
    assert (state.gradients, state.optimizer) == (4 * state.trainable, 12 * state.trainable)
    frozen = memory(sizes, freeze_vision=True, freeze_projectors=True)
    assert frozen.state(0).trainable == trained_parameters(frozen) == own
    fp8 = dataclasses.replace(frozen, per_parameter=dataclasses.replace(BF16, fp8_copies=2))
    layers = sum(n for part, n in parameters(PLAIN).items() if part in ("shallow", "deep"))
    assert fp8.state(0).weights - frozen.state(0).weights == 2 * layers  # adapters stay in bf16


def test_operations() -> None:
    """Adapters cost three times their forward pass; the weights beside them have no gradient."""
    sizes = with_adapters("decoder_attention", "decoder_mlp")
    plain, forward = forward_flops(PLAIN, STATS).by_part(), forward_flops(sizes, STATS).by_part()
    added = {part: forward[part] - plain[part] for part in plain}
    layer = 2 * (ATTENTION + MLP)
    assert added.pop("shallow_linear") == 2 * 40 * layer and added.pop("deep_linear") == 2 * 70 * layer
    assert not any(added.values())
    settings = BackwardSettings(freeze_vision=True, freeze_projectors=True, adapted=frozenset({"llm"}))
    trained = training_flops(forward_flops(sizes, STATS), settings)
    assert trained.by_part["deep_linear"] == 2 * plain["deep_linear"] + 3 * 2 * 70 * layer
    assert trained.by_part["deep_attention"] == 3 * plain["deep_attention"]
    assert trained.by_part["output"] == 2 * plain["output"]
    assert trained.by_part["vision"] == plain["vision"]
    assert trained.by_part["entry_projector"] == plain["entry_projector"]
    again = dataclasses.replace(settings, full_layers=frozenset({0}))
    more = training_flops(forward_flops(sizes, STATS), again).hardware - trained.hardware
    assert more == forward_flops(sizes, STATS).by_layer()[0]
    mlp = dataclasses.replace(settings, modules=frozenset({"mlp"}))
    more = training_flops(forward_flops(sizes, STATS), mlp).hardware - trained.hardware
    assert more == (2 * 40 + 2 * 70) * 2 * (3 * 128 * 352 + MLP)


def test_adapters_of_the_vision_encoder_make_gradients_pass() -> None:
    sizes = with_adapters("vision")
    settings = BackwardSettings(freeze_projectors=True, freeze_llm=True, adapted=frozenset({"vision"}))
    assert all(settings.reaches(part) for part in ("vision", "projectors", "llm"))
    assert not any(settings.trains(part) for part in ("vision", "projectors", "llm"))
    plain, forward = forward_flops(PLAIN, STATS), forward_flops(sizes, STATS)
    own = forward.by_part()["vision"] - plain.by_part()["vision"]
    kinds = {w.kind: w.flops for w in plain.works if w.owner == "vision"}
    trained = training_flops(forward, settings).by_part["vision"]
    assert trained == kinds["patches"] + 2 * kinds["linear"] + 3 * kinds["products"] + 3 * own
    features = boundary_costs(PLAIN, STATS, settings, Machine(latency=0))
    without = boundary_costs(PLAIN, STATS, BackwardSettings(freeze_vision=True), Machine(latency=0))
    assert features[1].backward == features[1].forward and without[1].backward < without[1].forward
    assert memory(sizes, freeze_projectors=True, freeze_llm=True).vision(2) > 0


def test_kept_activations() -> None:
    """Against a frozen decoder behind trained projectors: inputs of adapted layers, and the rows between A and B."""
    chunk = StageLayers(0, 4)

    def deep(sizes: ModelSizes, **more) -> int:
        model = dataclasses.replace(memory(sizes, freeze_vision=True, **more))
        return chunk_activations(model, chunk, STATS, first=True, last=True).parts["deep"]

    frozen = deep(PLAIN, freeze_llm=True)
    attention = deep(with_adapters("decoder_attention"))
    # Two deep layers of 70 rows in bf16: the norm's output of 128, three times 4 and 4 between A and B.
    assert attention - frozen == 2 * 70 * 2 * (128 + 3 * RANK + RANK)
    mlp = deep(with_adapters("decoder_mlp"))
    assert mlp - frozen == 2 * 70 * 2 * (128 + 352 + 2 * RANK + RANK)
    both = deep(with_adapters("decoder_attention", "decoder_mlp"))
    assert deep(PLAIN) - both == -2 * 70 * 2 * 7 * RANK  # a trained decoder keeps the same inputs
    dropped = memory(with_adapters("decoder_attention"), freeze_vision=True)
    more = dataclasses.replace(dropped, dropped=True).attention(70) - dropped.attention(70)
    assert more == 70 * (128 + 128)  # masks of two inputs
    projectors = memory(with_adapters("projectors"), freeze_vision=True, freeze_llm=True)
    trained = memory(PLAIN, freeze_vision=True, freeze_llm=True)
    # Queries, MLP and outputs have 16 rows per tile, keys and values 64.
    between = 16 + 1 + 64 + 2 * (16 + 64 + 64 + 16 + 16 + 16 + 16)
    assert projectors.projector(4, 3) - trained.projector(4, 3) == 3 * 2 * RANK * between


def test_lines_of_the_dry_run() -> None:
    sizes = with_adapters("decoder_attention")
    own, base = 4 * ATTENTION, sum(parameters(PLAIN).values())
    model = memory(sizes, freeze_vision=True, freeze_projectors=True)
    first, second = trained_lines(model, "bf16")
    assert first == (
        f"trained      {own / 1e6:.1f} M = {own / base:.2%} of the base: adapters of rank 4 on decoder_attention "
        f"{own / 1e6:.1f} M; bf16"
    )
    assert second.startswith("checkpoint   ") and f"= {own / base:.2%} of the base's weights" in second
    whole = trained_lines(memory(sizes, freeze_vision=True), "bf16")[0]
    assert whole.endswith("; whole: projectors; bf16")
    assert trained_lines(memory(PLAIN, freeze_vision=True), "bf16") == ["trained      all but vision; bf16"]


@pytest.mark.parametrize(
    ("targets", "share"), [(("decoder_attention", "decoder_mlp"), 0.00429), (tuple(TARGETS), 0.00605)]
)
def test_adapters_of_8b_are_small(targets: tuple[str, ...], share: float) -> None:
    """Rank 16: below 2 % of the model."""
    plain = model_sizes(preset("internvlx_8b"))
    sizes = dataclasses.replace(plain, lora_rank=16, lora_targets=frozenset(targets))
    found = sum(all_adapters(sizes).values()) / sum(parameters(plain).values())
    assert found == pytest.approx(share, rel=0.01) and found < 0.02
