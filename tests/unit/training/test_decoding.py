"""Decoders that DALI lacks on a first stage: named once, and no run starts where DALI does not work."""

from typing import Any

import pytest

from megatron_internvlx.data.rejects import UnusableData
from megatron_internvlx.training.decoding import missing_decoders


class Lacking:
    """Pipeline that finds these kinds missing, or does not work."""

    def __init__(self, found: frozenset[tuple[str, str]] | Exception) -> None:
        self.found = found

    def missing_decoders(self) -> frozenset[tuple[str, str]]:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_missing_kinds_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline: Any = Lacking(frozenset({("WEBP", "RGB"), ("PNG", "P")}))
    assert missing_decoders(pipeline, None) == pipeline.found
    assert "Pillow cuts in the loader processes: PNG P, WEBP RGB" in capsys.readouterr().out
    nothing: Any = Lacking(frozenset())
    assert missing_decoders(nothing, None) == frozenset() and capsys.readouterr().out == ""


def test_dali_that_does_not_work_ends_the_run_with_a_remedy() -> None:
    pipeline: Any = Lacking(RuntimeError("\nno device\nstack"))
    with pytest.raises(UnusableData, match=r"first stage: no device.*--decode-at loader"):
        missing_decoders(pipeline, None)
