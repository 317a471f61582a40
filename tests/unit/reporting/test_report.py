"""The curve and the picture of a run: when they are written, and by whom."""

from pathlib import Path
from typing import Any

from tests import single  # noqa: F401  # isort: skip  (sets Megatron up)
import pytest

from megatron_internvlx.megatron_settings import Progress
from megatron_internvlx.reporting import picture
from megatron_internvlx.reporting.curve import FILE, Curve
from megatron_internvlx.reporting.report import Report
from tests.namespaces import parsed


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was drawn."""
    pictures: list[dict[str, Any]] = []
    monkeypatch.setattr(picture, "write_report", lambda path, **what: pictures.append({"path": path} | what))
    return pictures


def report(folder: Path, *, path: str | None = "report.png", writes: bool = True, **args: Any) -> Report:
    made = Report(Progress(parsed(**args)), folder, path and str(folder / path), None, writes=writes)
    made.curve.losses.append((4, 1.5))
    return made


def test_the_picture(tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    made = report(tmp_path)
    assert made.accuracy is None
    made.curve.losses.append((8, 1.0))
    made.curve.accuracies.append((8, 0.25))
    assert made.accuracy == 0.25
    assert made.draw()
    (only,) = drawn
    assert only["path"] == tmp_path / "report.png"
    assert only["losses"] == [(4, 1.5), (8, 1.0)]
    assert only["caption"] == "loss 1.500 -> 1.000, held-out answers right 25.0%"
    assert only["title"] == "InternVL-X: 8 steps"


def test_where_there_is_no_picture(tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    before_the_first_interval = report(tmp_path)
    before_the_first_interval.curve.losses.clear()
    for made in (before_the_first_interval, report(tmp_path, path=None), report(tmp_path, writes=False)):
        assert not made.draw()
    assert drawn == []


def test_a_full_disk_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(picture, "write_report", full)
    assert report(tmp_path).draw() is False
    assert f"{tmp_path / 'report.png'} could not be written: [Errno 28]" in capsys.readouterr().err


def test_the_curve_begins_with_that_of_the_loaded_checkpoint(tmp_path: Path) -> None:
    Curve([(1, 3.0), (2, 2.0), (3, 9.0)], [(2, 0.5)]).save(tmp_path)
    made = report(tmp_path / "later", load=str(tmp_path), iteration=2)
    assert (made.curve.losses, made.accuracy) == ([(1, 3.0), (2, 2.0), (4, 1.5)], 0.5)
    made.save_curve()
    assert (tmp_path / "later" / FILE).is_file()
    for args in ({"load": str(tmp_path), "iteration": 0}, {"load": None, "iteration": 2}):
        assert report(tmp_path, **args).curve.losses == [(4, 1.5)]
    assert report(tmp_path, load=str(tmp_path), iteration=2, writes=False).curve.losses == [(4, 1.5)]


def test_only_the_rank_that_writes_keeps_the_curve(tmp_path: Path) -> None:
    report(tmp_path, writes=False).save_curve()
    assert list(tmp_path.iterdir()) == []
    elsewhere = Report(Progress(parsed()), None, None, None, writes=True)  # --save is a URL, or not given
    elsewhere.save_curve()
    assert list(tmp_path.iterdir()) == []
