"""What is filtered out of Megatron's output, and what must not be."""

import argparse
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_internvlx import files
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
    assert not log_filter.should_show(text)
    assert logs._Filter(on_cpu=False).should_show(text)


def test_apex_of_foreign_models_is_no_news(log_filter: logs._Filter) -> None:
    """Megatron's other models ask for it when imported; on GPUs Transformer Engine has what it is for."""
    foreign = logs._Filter(on_cpu=False)
    assert not foreign.should_show("Apex is not installed. Falling back to Torch Norm")
    assert foreign.should_show("Apex is too old. Falling back to Torch Norm")


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
        "sharded_state_dict metadata loaded from the checkpoint: {'singleton_local_shards': False}",
        "Checkpoint file not found in load directory None attempting to finetune with checkpoint in /x",
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


WEIGHTS_ALONE = [
    "could not find arguments in the checkpoint ...",
    "WARNING: TP size not found in checkpoint args, using 1 as default.",
    "WARNING: PP size not found in checkpoint args, using 1 as default.",
    "(TP, PP) mismatch after resume ((2, 1) vs (1, 1) from checkpoint): RNG state will be ignored",
    "Job sharding has changed: Rerun state will be ignored",
]


@pytest.mark.parametrize("line", WEIGHTS_ALONE)
def test_what_weights_alone_do_not_have_is_news_of_other_checkpoints(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from megatron.training import global_vars

    for name, newest in (("imported", "release"), ("trained", "700")):
        (tmp_path / name).mkdir()
        (tmp_path / name / files.TRACKER).write_text(newest)
    imported, trained = str(tmp_path / "imported"), str(tmp_path / "trained")
    for settings in (
        argparse.Namespace(finetune=True, load=None),
        argparse.Namespace(finetune=False, load=imported),
    ):
        monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", settings)
        logs._quiet_print(line)
        assert capsys.readouterr().out == ""
    others = [argparse.Namespace(finetune=False, load=load) for load in (None, trained, "nowhere")]
    for settings in (None, *others):
        monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", settings)
        logs._quiet_print(line)
        assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize("out_of_time", [False, True])
def test_an_evaluation_that_was_cut_short_is_told_from_a_whole_one(out_of_time: bool) -> None:
    seen: list = []
    training = argparse.Namespace(
        evaluate=lambda: (None, None, True) if out_of_time else ({"loss": 2}, None, False),
        print_rank_last=print,
        is_last_rank=lambda: False,
    )
    evaluation = logs._with_eval_line(
        training, lambda prefix: training.evaluate(), lambda *given: seen.append(given)
    )
    evaluation("iteration 4")
    assert seen == [("iteration 4", None if out_of_time else {"loss": 2.0})]


def test_the_last_evaluation_is_not_made_twice() -> None:
    made: list[str] = []

    def evaluate(prefix: str) -> None:
        made.append(prefix)

    training = argparse.Namespace(evaluate=lambda: None, print_rank_last=print, is_last_rank=lambda: False)
    timed: list[float] = []
    evaluation = logs._with_eval_line(training, evaluate, lambda prefix, values: None, timed.append)
    ends = ["iteration 40", "iteration 40 on validation set", "iteration 40 on test set"]
    for prefix in ["iteration 4", *ends]:
        evaluation(prefix)
    assert made == ["iteration 4", "iteration 40", "iteration 40 on test set"]
    assert len(timed) == 3
    evaluation("iteration 50 on validation set")  # the last step was not one of --eval-interval
    assert made[-1] == "iteration 50 on validation set"
