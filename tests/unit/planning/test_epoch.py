"""Time of an epoch: how many steps a number of pictures makes, and how a duration is written."""

import pytest

from megatron_internvlx.planning.epoch import Epoch, duration
from megatron_internvlx.planning.workload import Workload


def test_samples_of_one_picture_each() -> None:
    work = Workload(seq_length=2048, image_tiles=7, micro_batch_size=2, global_batch_size=32)
    epoch = Epoch.of(10_001, work, step_seconds=3.0)
    assert (epoch.micro_batches, epoch.steps) == (5001, 313)
    assert epoch.seconds == pytest.approx(5001 / 16 * 3.0)
    assert epoch.line(400e12) == (
        "epoch of 10,001 pictures: 15 min 38 s, 313 steps, at 7 tiles per picture "
        "(computed at 400 TFLOP/s per device, not measured)"
    )


def test_packs_are_full() -> None:
    """24 tiles a pack and 13 a picture: smaller pictures fill the other 11."""
    work = Workload(8192, image_tiles=13, global_batch_size=128, max_tiles_per_pack=24)
    epoch = Epoch.of(10_000, work, step_seconds=1.0)
    assert (epoch.micro_batches, epoch.steps) == (5417, 43)
    assert "at 13 tiles" in epoch.line(50e9) and "50 GFLOP/s" in epoch.line(50e9)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"), (59.7, "1 min 0 s"), (490, "8 min 10 s"), (3_599, "59 min 59 s"), (7_505, "2 h 5 min"),
        (86_400 * 2 + 3_600 * 3, "2 d 3 h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
