"""The fullest micro-batch, by hand: tiles of 16 deep and 4 shallow tokens."""

import pytest

from megatron_internvlx import platform

platform.setup()

from megatron_internvlx.model.presets import preset  # noqa: E402
from megatron_internvlx.model.sizes import model_sizes  # noqa: E402
from megatron_internvlx.planning.flops import PlanStats  # noqa: E402
from megatron_internvlx.planning.workload import Workload  # noqa: E402

FLAGS = preset("internvlx_tiny") | {"seq_length": 100, "micro_batch_size": 2, "global_batch_size": 8}
SIZES = model_sizes(FLAGS)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Two images of 3 tiles and a thumbnail; of 9 tiles and a thumbnail, 6 fit into each sample.
        ({"max_tiles": 3}, PlanStats(8, 8, 8, 104, 104**2, 200, 200**2, 72)),
        ({"max_tiles": 9}, PlanStats(12, 12, 12, 56, 56**2, 200, 200**2, 8)),
        ({"max_tiles": 1}, PlanStats(2, 2, 2, 176, 176**2, 200, 200**2, 168)),
        # A pack is one row.
        ({"max_tiles_per_pack": 5}, PlanStats(5, 5, 5, 40, 40**2, 100, 100**2, 20)),
        # Static boundaries send every row that enters layer 0 to the output layer.
        (
            {"max_tiles_per_pack": 5, "boundary": "static", "shallow_seq_length": 64},
            PlanStats(5, 5, 5, 64, 64**2, 100, 100**2, 64),
        ),
        (
            {
                "max_tiles_per_pack": 5,
                "boundary": "static",
                "shallow_seq_length": 64,
                "max_supervised_tokens_per_pack": 9,
            },
            PlanStats(5, 5, 5, 64, 64**2, 100, 100**2, 9),
        ),
    ],
)
def test_full_micro_batch(changes: dict, expected: PlanStats) -> None:
    work = Workload.from_args(FLAGS | changes)
    assert work.packs == 4
    assert work.full_micro_batch(SIZES) == expected


def test_without_lvtc_there_is_no_shallow_phase() -> None:
    flags = FLAGS | {"max_tiles": 1, "expand_layer": None}
    stats = Workload.from_args(flags).full_micro_batch(model_sizes(flags))
    assert (stats.upsampled_tiles, stats.shallow_rows, stats.deep_rows) == (0, 0, 200)
    static = Workload.from_args(flags | {"boundary": "static", "max_tiles_per_pack": 5})
    assert static.full_micro_batch(model_sizes(flags)).output_rows == 100


def test_no_tile_fits() -> None:
    with pytest.raises(ValueError, match="--seq-length 15 holds no tile of 16 tokens"):
        Workload(15, 1).full_micro_batch(SIZES)
