"""Text of the log lines, and the values for trackers, from typed figures."""

import dataclasses
from typing import Any

from tests import single  # noqa: F401  # isort: skip  (sets Megatron up)
import pytest

from megatron_internvlx.platform import LogRecord
from megatron_internvlx.reporting.interval import IntervalTotals
from megatron_internvlx.reporting.lines import tracked_values, training_line, validation_line
from megatron_internvlx.reporting.time_left import Left
from megatron_internvlx.training.validation import ValidationCounts

RECORD = LogRecord(
    iteration=20,
    train_iters=1000,
    losses={"loss": 1.25},
    learning_rate=2e-5,
    grad_norm=0.5,
    loss_scale=1.0,
    skipped=0,
    nan=0,
    seconds=0.5,
    consumed_samples=160,
)
TOTALS = IntervalTotals(
    seconds=0.5,
    tokens_per_s=12345.0,
    tflops=321.4,
    mfu=0.325,
    padding=0.04,
    wait=0.01,
    memory=40.5,
    rejects={},
    cut_tiles=0.0,
    cut_tokens=0.0,
)
LINE = (
    "step   20/1000 | loss 1.2500 | grad norm 0.500 | lr 2.00e-05 | 12,345 tokens/s | 500 ms/step | left - | "
    "321 TFLOP/s | MFU 32.5% | padding 4.0% | data wait 1.0% | memory 40.50 GiB"
)


def line(record: dict[str, Any] | None = None, **totals: Any) -> str:
    return training_line(dataclasses.replace(RECORD, **record or {}), dataclasses.replace(TOTALS, **totals))


def test_the_line_of_an_ordinary_interval() -> None:
    assert line() == LINE


@pytest.mark.parametrize(
    ("totals", "more"),
    [
        ({"images_per_s": 1500.0, "packs_ready": 3.0}, "1,500 images/s, 3 packs ready"),
        ({"packs_ready": 0.0}, "0 images/s, 0 packs ready"),
        ({"fallbacks": {"cmyk": 1, "size": 4}}, "images cut by Pillow 5 (size 4, cmyk 1)"),
        ({"blank_images": 2}, "black images 2"),
        ({"rejects": {"missing": 1, "broken": 2}}, "unusable samples 3 (broken 2, missing 1)"),
        ({"cut_tiles": 7.0, "cut_tokens": 0.0}, "cut to fit 7 tiles, 0 tokens"),
        ({"cut_tiles": 0.0, "cut_tokens": 9.0}, "cut to fit 0 tiles, 9 tokens"),
    ],
)
def test_what_is_out_of_the_ordinary_follows(totals: dict[str, Any], more: str) -> None:
    assert line(**totals) == f"{LINE} | {more}"


def test_the_time_left() -> None:
    assert training_line(RECORD, TOTALS, Left(490.0, complete=True)) == LINE.replace(
        "left -", "left 8 min 10 s"
    )
    assert "| left > 8 min 10 s |" in training_line(RECORD, TOTALS, Left(490.0, complete=False))
    assert tracked_values(RECORD, TOTALS, 1, Left(490.0, complete=True))["seconds_left"] == 490.0


def test_skipped_steps_follow() -> None:
    assert line({"skipped": 2, "nan": 1}) == f"{LINE} | skipped 2 nan 1"


def test_unknown_values_are_dashes() -> None:
    """Ranks without the last stage have no loss, the CPU no peak; a skipped step has no norm."""
    text = line({"losses": {}, "grad_norm": None, "learning_rate": None}, mfu=None, tflops=0.0123)
    assert "| loss - | grad norm - | lr - |" in text
    assert "| 0.012 TFLOP/s | MFU - |" in text
    assert "| loss - |" in line({"losses": {"loss": float("nan")}})


def test_the_validation_line() -> None:
    values = {"loss": 0.75, "accuracy": 0.875}
    plain = "validation at step 40 | loss 0.7500 | answers right 87.5% | 16 records"
    assert validation_line(40, values, ValidationCounts(records=16)) == plain
    counts = ValidationCounts(16, {"missing": 2, "broken": 3}, 4, 5)
    assert validation_line(40, values, counts) == (
        f"{plain} | unusable 5 (broken 3, missing 2) | cut to fit 4 tiles, 5 tokens"
    )
    assert "| loss - | answers right - |" in validation_line(40, {}, ValidationCounts())


def test_the_values_for_trackers() -> None:
    totals = dataclasses.replace(
        TOTALS, rejects={"missing": 1, "broken": 2}, fallbacks={"size": 4}, packs_ready=3.0, images_per_s=8.0
    )
    record = dataclasses.replace(RECORD, skipped=2)
    assert tracked_values(record, totals, world_size=4) == {
        "loss": 1.25,
        "learning_rate": 2e-5,
        "grad_norm": 0.5,
        "step_seconds": 0.5,
        "seconds_left": None,
        "tokens_per_s": 12345.0,
        "tflops": 321.4,
        "mfu": 0.325,
        "padding": 0.04,
        "data_wait": 0.01,
        "memory": 40.5,
        "rejects": 3.0,
        "rejects_missing": 1.0,
        "rejects_broken": 2.0,
        "skipped_steps": 2.0,
        "consumed_samples": 160.0,
        "teraflop_per_step": 321.4 * 0.5 * 4,  # of all devices
        "images_per_s": 8.0,
        "images_cut_by_pillow": 4.0,
        "black_images": 0.0,
        "packs_ready": 3.0,
    }
    unknown = tracked_values(dataclasses.replace(RECORD, losses={}), dataclasses.replace(TOTALS, mfu=None), 4)
    assert (unknown["loss"], unknown["mfu"], unknown["packs_ready"]) == (None, None, None)
