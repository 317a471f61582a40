"""`pretrain_vlm.py` run in a rank of the pool, as torchrun would start it."""

import contextlib
import io
import sys
from multiprocessing import resource_tracker
from typing import Any

from megatron_internvlx import platform

platform.setup()

import pretrain_vlm  # noqa: E402
from megatron_internvlx.reporting import log  # noqa: E402


def run_as_started(arguments: list[str]) -> dict[str, Any]:
    """`run` as torchrun's process would: a rank of the pool has Python's resource tracker from the pool."""
    resource_tracker._resource_tracker = tracker = resource_tracker.ResourceTracker()
    resource_tracker.ensure_running, resource_tracker.getfd = tracker.ensure_running, tracker.getfd
    resource_tracker.register, resource_tracker.unregister = tracker.register, tracker.unregister
    return run(arguments)


def run(arguments: list[str]) -> dict[str, Any]:
    """Exit code, what was printed, and the exact losses that the log saw, by iteration."""
    losses: dict[int, float] = {}
    evaluations: list[tuple[str, dict[str, float]]] = []
    train_line, eval_line = log.TrainingLog.train_line, log.TrainingLog.eval_line

    def kept_train(self: log.TrainingLog, record: platform.LogRecord) -> str | None:
        losses.update({record.iteration: record.losses["loss"]} if record.losses else {})
        return train_line(self, record)

    def kept_eval(self: log.TrainingLog, prefix: str, values: dict[str, float]) -> str:
        evaluations.append((prefix, values))
        return eval_line(self, prefix, values)

    log.TrainingLog.train_line, log.TrainingLog.eval_line = kept_train, kept_eval  # type: ignore[method-assign]
    saved, sys.argv = sys.argv, ["pretrain_vlm.py", *arguments]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = pretrain_vlm.main()
    finally:
        sys.argv = saved
        log.TrainingLog.train_line, log.TrainingLog.eval_line = train_line, eval_line  # type: ignore[method-assign]
    return {
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "losses": losses,
        "evaluations": evaluations,
    }
