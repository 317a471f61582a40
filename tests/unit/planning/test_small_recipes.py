"""The recipes for one GPU, one node and a laptop: they can run, and need what their heads say."""

import re
from pathlib import Path

from tests.single import single  # noqa: F401  # isort: skip  (sets Megatron up)
import pytest

from megatron_internvlx.planning import dryrun
from tests.unit.planning.test_dryrun import clean, dry  # noqa: F401  (`clean` is a fixture)

FOLDER = Path(__file__).parents[3] / "examples" / "recipes" / "small"
RECIPES = sorted(FOLDER.glob("*.yaml"))
ON_GPUS = [path for path in RECIPES if "gpu" in path.stem]
ENERGON = ("--loader", "energon", "--image-decoder", "dali")


def stated(recipe: Path, pattern: str) -> float:
    """Number in a recipe's head."""
    found = re.search(pattern, recipe.read_text())
    assert found is not None, pattern
    return float(found[1].replace(",", ""))


def test_there_is_a_recipe_for_every_size_and_machine() -> None:
    names = {f"finetune_{size}_{gpus}gpu" for size in ("2b", "8b") for gpus in (1, 8)}
    assert {path.stem for path in RECIPES} == names | {"finetune_demo_cpu"}


@pytest.mark.parametrize("recipe", ON_GPUS, ids=lambda path: path.stem)
def test_recipe_needs_what_its_head_says(monkeypatch: pytest.MonkeyPatch, recipe: Path) -> None:
    plan = dryrun.check(dry(monkeypatch, recipe))
    assert plan.parallel.world_size == stated(recipe, r"--ranks (\d+)")
    needed = plan.fullest.total / dryrun.GIB + dryrun.RESERVE_GIB
    assert needed == pytest.approx(stated(recipe, r"Needs: (\d+) GiB"), abs=0.5)
    assert plan.epoch is not None
    assert plan.epoch.pictures == 10_000 and plan.epoch.steps == 157
    assert plan.epoch.seconds / 60 == pytest.approx(stated(recipe, r"Takes: (\d+) min"), abs=1, rel=0.05)
    assert f"pictures of {plan.epoch.tiles} tiles" in recipe.read_text()
    state = plan.stages[0].state
    assert state.trainable == state.parameters or "the language model is frozen" in recipe.read_text()
    # bf16 weights of all parts, and three fp32 numbers per trained weight; TP 2 halves both.
    whole = (2 * state.parameters + 12 * state.trainable) * plan.model.layout.tensor
    assert whole / 1e9 == pytest.approx(stated(recipe, r"checkpoints of (\d+) GB"), rel=0.05)
    assert 2 * state.parameters * plan.model.layout.tensor / 1e9 == pytest.approx(
        stated(recipe, r"weights (\d+) GB"), abs=1
    )
    assert stated(recipe, r"(\d+) GB of host memory") > whole / 1e9


@pytest.mark.parametrize("recipe", ON_GPUS, ids=lambda path: path.stem)
def test_recipe_can_run_with_energon(monkeypatch: pytest.MonkeyPatch, recipe: Path) -> None:
    assert dryrun.run(dry(monkeypatch, recipe, *ENERGON)) == 0


def test_all_of_8b_does_not_fit_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = FOLDER / "finetune_8b_1gpu.yaml"
    with pytest.raises(ValueError, match=r"needs (\d+)") as refused:
        dryrun.check(dry(monkeypatch, recipe, "--without", "freeze_llm"))
    needed = re.search(r"needs ([\d.]+)", str(refused.value))
    assert needed is not None
    assert float(needed[1]) == pytest.approx(stated(recipe, r"would need (\d+) GiB"), abs=0.5)


def test_the_model_of_the_demo_on_one_process_and_on_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = FOLDER / "finetune_demo_cpu.yaml"
    for processes in ("1", "2"):
        assert dryrun.run(dry(monkeypatch, recipe, "--dry-run-world-size", processes)) == 0
        assert "epoch of 100 pictures: " in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ON_GPUS, ids=lambda path: path.stem)
def test_import_of_an_internvl_makes_the_model_of_the_recipe(
    monkeypatch: pytest.MonkeyPatch, recipe: Path
) -> None:
    args = dry(monkeypatch, recipe)
    assert args.expand_layer == stated(recipe, r"--expand-layer (\d+)")
    assert args.inject_layers == [stated(recipe, r"--inject-layers (\d+)")]
    assert "--init-missing\n" in recipe.read_text()
