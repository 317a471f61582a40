"""What is filtered out of Megatron's output, and what must not be."""

import logging
import warnings
from collections.abc import Iterator

import pytest

from megatron_internvlx.platform import logs


@pytest.fixture
def log_filter(monkeypatch: pytest.MonkeyPatch) -> Iterator[logs._Filter]:
    monkeypatch.setattr(logs, "_seen", set())
    monkeypatch.setenv("RANK", "0")
    yield logs._Filter(on_cpu=True)


def _record(level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord("megatron.core.x", level, __file__, 1, text, None, None)


def test_a_cause_is_told_once(log_filter: logs._Filter) -> None:
    assert log_filter.filter(_record(logging.WARNING, "Fused kernel is missing. Falling back to A"))
    assert not log_filter.filter(_record(logging.WARNING, "Fused kernel is missing. Falling back to B"))
    assert log_filter.filter(_record(logging.WARNING, "Something else"))


def test_other_ranks_tell_errors_only(log_filter: logs._Filter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert not log_filter.filter(_record(logging.WARNING, "something"))
    assert log_filter.filter(_record(logging.ERROR, "something"))
    assert log_filter.filter(_record(logging.ERROR, "something"))


def test_missing_apex_is_news_on_cuda_only(log_filter: logs._Filter) -> None:
    text = "Transformer Engine and Apex are not installed. Falling back to Torch optimizers."
    assert not log_filter.keeps(text)
    assert logs._Filter(on_cpu=False).keeps(text)


def test_warnings_of_others_pass() -> None:
    logs.quiet_logs(on_cpu=True)
    with pytest.warns(UserWarning, match="mine"):
        warnings.warn("mine", stacklevel=1)


@pytest.mark.parametrize(
    "line",
    [
        "[after megatron is initialized] datetime: 2026-11-21 11:55:39.883545 ",
        "> setting random seeds to 1234 ...",
        " > number of parameters on (tensor, pipeline) model parallel rank (0, 0): 22656",
        "[Rank 0] (after 2 iterations) memory (MB) | allocated: 1.0",
        "time to initialize megatron (seconds): 1.978",
        "WARNING: Setting args.overlap_p2p_comm and args.align_param_gather to False since non-interleaved",
    ],
)
def test_chatter_is_dropped(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs._quiet_print(line)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "line",
    [
        "WARNING: could not find the metadata file /x/latest_checkpointed_iteration.txt",
        "    will not load any checkpoints and will start from random",
        "  successfully loaded checkpoint from /x [ t 1/1, p 1/1 ] at iteration 2",
        "exiting program at iteration 7",
        "ERROR: Invalid metadata file",
        "anything that a later version says",
    ],
)
def test_the_rest_passes(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs._quiet_print(line)
    assert capsys.readouterr().out == line + "\n"
