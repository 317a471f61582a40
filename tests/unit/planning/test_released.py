"""The recipes of examples/recipes/released: they can run, and have the values of the released shells."""

from pathlib import Path

import pytest

from tests.unit.planning.test_dryrun import clean, dry, dryrun  # noqa: F401

FOLDER = Path(__file__).parents[3] / "examples" / "recipes" / "released"
RECIPES = [
    FOLDER / f"internvlx_{size}_{stage}.yaml"
    for size in ("2b", "8b")
    for stage in ("pretrain", "2nd_finetune", "2nd_finetune_hd")
]
# Values of all four shells, then those that Hugging Face's Trainer has by default.
SHELLS = {
    "lr": 4e-5, "global_batch_size": 128, "micro_batch_size": 4, "weight_decay": 0.01, "lr_warmup_fraction": 0.03,
    "lr_decay_style": "cosine", "seq_length": 4096, "freeze_vision": True, "freeze_llm": False,
    "freeze_projectors": False, "vision_drop_path": 0.1, "pixel_shuffle_version": "v2", "high_ratio": 0.5,
    "select_layer": None, "image_size": 448, "conversation_template": "internlm2-chat", "bf16": True, "epochs": 1,
    "save_interval": 200, "log_interval": 1, "use_distributed_optimizer": True, "loader_workers": 4,
    "min_lr": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8, "clip_grad": 1.0,
    "loss_weighting": "token", "loss_average": "micro-batch", "projector_drop_path": 0.1, "packing": False,
}  # fmt: skip
PRETRAINING = {
    "freeze_vision": True, "freeze_llm": True, "freeze_projectors": False, "lr": 2e-4, "global_batch_size": 512,
    "weight_decay": 0.0, "static_image_size": True,
}  # fmt: skip
HD = {"static_image_size": False, "max_tiles": 6, "min_tiles": 1, "no_thumbnail": False, "rvtc": "edge"}


def test_nothing_else_is_there() -> None:
    assert sorted(FOLDER.iterdir()) == sorted(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_can_run(monkeypatch, capsys, recipe: Path) -> None:
    args = dry(monkeypatch, recipe)
    assert dryrun.run(args) == 0, capsys.readouterr().err
    assert args.world_size == 8
    layers = {24: (8, [12]), 32: (10, [16])}[args.num_layers]
    assert (args.projector, args.expand_layer, args.inject_layers) == ("pvtc", *layers)
    if "finetune" in recipe.stem:
        assert {name: getattr(args, name) for name in SHELLS} == SHELLS
    else:
        assert {name: getattr(args, name) for name in PRETRAINING} == PRETRAINING
    if recipe.stem.endswith("hd"):
        assert {name: getattr(args, name) for name in HD} == HD
    else:
        assert args.static_image_size


def test_the_released_model_without_lvtc(monkeypatch) -> None:
    without = ("--model-preset", "internvlx_2b_released", "--without", "expand_layer", "inject_layers")
    args = dry(monkeypatch, RECIPES[1], *without)
    assert (args.expand_layer, args.inject_layers, args.projector) == (None, None, "pvtc")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (("--train-iters", "7"), "--epochs, --train-iters and --train-samples: set only one"),
        (("--train-samples", "7"), "--epochs, --train-iters and --train-samples: set only one"),
        (("--packing",), "--epochs and --packing: a step takes packs"),
        (("--epochs", "0"), "--epochs 0.0: must be"),
        (("--epochs", "nan"), "--epochs nan: must be"),
        (("--without", "global_batch_size"), "--epochs needs --global-batch-size"),
    ],
)
def test_what_an_epoch_is_not(monkeypatch, changes: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        dry(monkeypatch, RECIPES[1], *changes)
