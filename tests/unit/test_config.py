"""Every combination of settings that cannot work is refused with a message that names the flag."""

import re
from typing import get_args, get_type_hints

import pytest

from megatron_internvlx.config import (
    CompressionSettings,
    DataSettings,
    TrainSettings,
    check_compression,
    check_decoding,
    check_projector,
    check_static_budgets,
    check_supervised_budget,
    grid_side,
)
from megatron_internvlx.data.conversation import TEMPLATES


def test_the_templates_that_are_offered_are_there() -> None:
    assert set(get_args(get_type_hints(DataSettings)["conversation_template"])) == set(TEMPLATES)


@pytest.mark.parametrize(("ratio", "side"), [(1.0, 32), (0.5, 16), (0.25, 8), (1 / 32, 1), (1 / 16, 2)])
def test_grid_side(ratio: float, side: int) -> None:
    assert grid_side(32, ratio, "--high-ratio") == side


@pytest.mark.parametrize("ratio", [0.0, -0.5, 0.3, 2.0, 1 / 3, 1 / 64])
def test_grid_side_of_a_bad_ratio(ratio: float) -> None:
    message = (
        f"--low-ratio {ratio} does not fit 32x32 patches per tile: it must be 1/n with n a divisor of 32"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        grid_side(32, ratio, "--low-ratio")


def test_a_ratio_of_a_third() -> None:
    assert grid_side(24, 1 / 3, "--high-ratio") == 8


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"high_ratio": 1.0},
        {"expand_layer": 1},
        {"expand_layer": 7},
        {"expand_layer": 3, "inject_layers": [7, 4]},
        {"expand_layer": 3, "inject_layers": []},
        {"expand_layer": 3, "low_ratio": 0.125},
    ],
)
def test_compression_that_works(settings: dict) -> None:
    check_compression(CompressionSettings(**settings), patches=32, num_layers=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"high_ratio": 0.3}, "--high-ratio 0.3 does not fit 32x32 patches"),
        ({"expand_layer": 3, "low_ratio": 0.3}, "--low-ratio 0.3 does not fit 32x32 patches"),
        (
            {"inject_layers": [4]},
            "--inject-layers [4] needs --expand-layer: injections add to visual rows that are already expanded",
        ),
        (
            {"expand_layer": 3, "low_ratio": 0.5},
            "--low-ratio 0.5 gives a 16x16 grid and --high-ratio 0.5 16x16: the deep side must be a multiple "
            "of the shallow side, and larger",
        ),
        ({"expand_layer": 3, "low_ratio": 1.0}, "--low-ratio 1.0 gives a 32x32 grid"),
        (
            {"expand_layer": 0},
            "--expand-layer 0 must be between 1 and 7 (the model has 8 layers); leave it unset to switch LVTC off",
        ),
        ({"expand_layer": 8}, "--expand-layer 8 must be between 1 and 7"),
        (
            {"expand_layer": 3, "inject_layers": [2, 5, 3]},
            "--inject-layers [2, 3]: each must be above --expand-layer 3 and below 8",
        ),
        ({"expand_layer": 3, "inject_layers": [8]}, "--inject-layers [8]: each must be above"),
        ({"expand_layer": 3, "inject_layers": [5, 5]}, "--inject-layers [5, 5] names a layer twice"),
    ],
)
def test_compression_that_cannot_work(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_compression(CompressionSettings(**settings), patches=32, num_layers=8)


def test_grids_that_do_not_divide() -> None:
    settings = CompressionSettings(expand_layer=1, low_ratio=1 / 6, high_ratio=1 / 4)
    with pytest.raises(ValueError, match=r"--low-ratio .* gives a 4x4 grid and --high-ratio 0.25 6x6"):
        check_compression(settings, patches=24, num_layers=8)


def test_injection_layers_in_order() -> None:
    assert CompressionSettings().injection_layers() == ()
    assert CompressionSettings(expand_layer=3).injection_layers() == (3,)
    assert CompressionSettings(expand_layer=3, inject_layers=[7, 5]).injection_layers() == (3, 5, 7)
    assert CompressionSettings(expand_layer=3).lvtc
    assert not CompressionSettings().lvtc


def test_projector() -> None:
    check_projector(CompressionSettings(), hidden_size=48, tensor_parallel=8)
    with pytest.raises(ValueError, match="--hidden-size 40 is not a multiple of 16"):
        check_projector(CompressionSettings(), hidden_size=40, tensor_parallel=1)
    with pytest.raises(
        ValueError, match=r"cannot be divided by --tensor-model-parallel-size 3: use 1, 2, 4, 8"
    ):
        check_projector(CompressionSettings(), hidden_size=48, tensor_parallel=3)
    # InternVL's projector has no heads.
    check_projector(CompressionSettings(projector="mlp"), hidden_size=40, tensor_parallel=3)


# One image of 3 tiles with 4 shallow and 16 deep rows each: 12 and 48 rows.
BUDGETS = {
    "deep": 64,
    "alignment": 16,
    "samples": 1,
    "sample_tiles": 3,
    "low_rows": 4,
    "high_rows": 16,
    "lvtc": True,
}


def static(**changes: int | None) -> TrainSettings:
    sizes = {"shallow_seq_length": 32, "max_tiles_per_pack": 4, **changes}
    return TrainSettings(boundary="static", **sizes)  # type: ignore[arg-type]


def test_static_budgets_that_work() -> None:
    check_static_budgets(static(), **BUDGETS)
    check_static_budgets(static(max_tiles_per_pack=3, shallow_seq_length=64), **BUDGETS)
    check_static_budgets(static(shallow_seq_length=None), **BUDGETS | {"lvtc": False})
    two = static(shallow_seq_length=64, max_tiles_per_pack=6)
    check_static_budgets(two, **BUDGETS | {"samples": 2, "deep": 128})


@pytest.mark.parametrize(
    ("train", "budgets", "message"),
    [
        (static(max_tiles_per_pack=None), {}, "--boundary static needs --max-tiles-per-pack:"),
        (
            static(max_tiles_per_pack=5),
            {"samples": 2, "deep": 128},
            "--max-tiles-per-pack 5 is too small for one image of 3 tiles for each of 2 samples of a micro-batch: "
            "raise it to 6",
        ),
        (
            static(max_tiles_per_pack=6),
            {"samples": 2, "deep": 96},
            "--seq-length 96 is too small for the 48 visual",
        ),
        (static(shallow_seq_length=None), {}, "--boundary static needs --shallow-seq-length:"),
        (
            static(max_tiles_per_pack=None, shallow_seq_length=None),
            {},
            "--boundary static needs --max-tiles-per-pack and --shallow-seq-length: it pads every "
            "micro-batch to fixed sizes; give them, or use --boundary variable",
        ),
        (static(), {"deep": 70}, "--seq-length 70 must be a multiple of 16"),
        (static(shallow_seq_length=33), {}, "--shallow-seq-length 33 must be a multiple of 16"),
        (static(shallow_seq_length=33), {}, "of this layout: use 48"),
        (
            static(max_tiles_per_pack=2),
            {},
            "--max-tiles-per-pack 2 is too small for one image of 3 tiles: raise it to 3, or lower --max-tiles",
        ),
        (
            static(),
            {"deep": 48},
            "--seq-length 48 is too small for the 48 visual rows of one image of 3 tiles",
        ),
        (static(), {"low_rows": 11}, "--shallow-seq-length 32 is too small for the 33 visual rows"),
        (static(shallow_seq_length=80), {}, "--shallow-seq-length 80 is more than --seq-length 64"),
    ],
)
def test_static_budgets_that_cannot_work(train: TrainSettings, budgets: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_static_budgets(train, **BUDGETS | budgets)


def test_supervised_budget() -> None:
    check_supervised_budget(static(), entry_rows=32, samples=4)
    check_supervised_budget(static(max_supervised_tokens_per_pack=32), entry_rows=32, samples=4)
    for most in (3, 33):
        with pytest.raises(ValueError, match=rf"-per-pack {most} must be at least 4 .* and at most 32"):
            check_supervised_budget(static(max_supervised_tokens_per_pack=most), entry_rows=32, samples=4)
    with pytest.raises(ValueError, match="-per-pack 9 needs --boundary static"):
        check_supervised_budget(TrainSettings(max_supervised_tokens_per_pack=9), entry_rows=32, samples=1)


def test_ranks_cut_images_only_if_their_files_reach_them():
    check_decoding(DataSettings(loader="energon", image_decoder="dali", decode_at="rank"))
    check_decoding(DataSettings(decode_at="loader"))
    for wrong in ({"loader": "energon"}, {"image_decoder": "dali"}):
        with pytest.raises(ValueError, match="--decode-at rank needs"):
            check_decoding(DataSettings(decode_at="rank", **wrong))
