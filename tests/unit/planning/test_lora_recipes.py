"""The LoRA recipes: they can run, and need what their heads say."""

import re
from pathlib import Path

from tests.single import single  # noqa: F401  # isort: skip  (sets Megatron up)
import pytest

from megatron_internvlx.planning import dryrun
from megatron_internvlx.planning.parameters import parameters
from megatron_internvlx.planning.trained import trained_parameters
from tests.unit.planning.test_dryrun import clean, dry  # noqa: F401  (`clean` is a fixture)
from tests.unit.planning.test_small_recipes import stated

FOLDER = Path(__file__).parents[3] / "examples" / "recipes" / "lora"
RECIPES = sorted(FOLDER.glob("*_*b_*gpu.yaml"))
BIG = FOLDER / "lora_78b_8gpu.yaml"
ROOM = ("--gpu-memory-gib", "500")


def needed(plan: dryrun.Plan) -> float:
    return plan.fullest.total / dryrun.GIB + dryrun.RESERVE_GIB


def test_there_is_a_recipe_for_every_size_and_machine() -> None:
    assert {path.stem for path in RECIPES} == {
        "lora_2b_1gpu",
        "lora_8b_1gpu",
        "lora_8b_8gpu",
        "lora_78b_8gpu",
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_needs_what_its_head_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    args = dry(monkeypatch, recipe)
    assert dryrun.run(args) == 0
    text = capsys.readouterr().out
    assert "adapters of rank 16 on decoder_attention" in text and "\ncheckpoint   " in text
    plan = dryrun.check(args)
    assert plan.parallel.world_size == stated(recipe, r"--ranks (\d+)")
    assert needed(plan) == pytest.approx(stated(recipe, r"Needs: (\d+) GiB"), abs=0.5)
    assert plan.epoch is not None and plan.epoch.steps == 157
    assert plan.epoch.seconds / 60 == pytest.approx(stated(recipe, r"Takes: (\d+) min"), abs=0.5, rel=0.02)
    assert f"pictures of {plan.epoch.tiles} tiles" in recipe.read_text()
    weights = 2 * sum(parameters(plan.model.sizes).values()) / 1e9
    assert weights == pytest.approx(stated(recipe, r"weights (\d+) GB"), abs=0.6)
    # bf16 weights and three fp32 numbers of what is trained.
    saved = 14 * trained_parameters(plan.model) / 1e9
    assert saved == pytest.approx(stated(recipe, r"checkpoints of (\d+) GB"), abs=0.5)
    assert stated(recipe, r"(\d+) GB of disk") == pytest.approx(weights + 2 * saved, abs=1)
    assert args.expand_layer == stated(recipe, r"--expand-layer (\d+)")
    assert args.inject_layers == [stated(recipe, r"--inject-layers (\d+)")]


def test_other_layouts_of_78b_need_what_the_head_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(tensor: int, pipeline: int, *changes: str) -> dryrun.Plan:
        sizes = ("--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(pipeline))
        return dryrun.check(dry(monkeypatch, BIG, *ROOM, *sizes, *changes))

    whole = ("--without", "lora_targets")
    for found, gib, minutes in (
        (plan(2, 1), r"two would need (\d+) GiB", None),
        (plan(2, 2), r"PP 2 takes (\d+) GiB", r"GiB and (\d+) min\. Projectors"),
        (plan(4, 1, *whole), r"need (\d+) GiB with TP 4", None),
        (plan(8, 1, *whole), r"TP 8 (\d+) GiB", r"GiB and (\d+) min: without"),
    ):
        assert needed(found) == pytest.approx(stated(BIG, gib), abs=0.5), gib
        if minutes:
            assert found.epoch is not None
            assert found.epoch.seconds / 60 == pytest.approx(stated(BIG, minutes), abs=0.5)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_new_projectors_can_learn_first(monkeypatch: pytest.MonkeyPatch, recipe: Path) -> None:
    """Step 2 of the head."""
    step = re.search(r"command of step 3 with(.*)\n#(.*) --lr", recipe.read_text())
    assert step is not None
    args = dry(monkeypatch, recipe, *step[1].split(), *step[2].split())
    assert args.lora_rank is None and dryrun.run(args) == 0


def test_adapters_on_the_projectors_of_8b(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = FOLDER / "lora_8b_1gpu.yaml"
    targets = ("--lora-targets", "decoder_attention", "decoder_mlp", "projectors")
    plan = dryrun.check(dry(monkeypatch, recipe, *targets))
    assert needed(plan) == pytest.approx(stated(recipe, r"lora_78b_8gpu.yaml: (\d+) GiB"), abs=0.5)
    saved = 14 * trained_parameters(plan.model) / 1e9
    assert saved == pytest.approx(stated(recipe, r"checkpoints of (0\.\d) GB"), abs=0.05)


def test_the_demo_learns_on_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dryrun.check(dry(monkeypatch, FOLDER / "lora_demo_cpu.yaml"))
    assert plan.parallel.world_size == 2
    # Adapters in four layers of the decoder, and projectors.
    assert {part.name for part in plan.stages[0].state.parts if part.adapters} == {"decoder_adapters"}
