"""Output of a run: one line per interval, a progress bar, answers, the picture."""

from __future__ import annotations

import argparse
import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_internvlx import platform
from megatron_internvlx.config import DataSettings, settings_from
from megatron_internvlx.data.plan import SequencePlan
from megatron_internvlx.planning.metrics import StepMeter, peak_flops
from megatron_internvlx.reporting.answers import AnswerBook
from megatron_internvlx.reporting.interval import interval_totals, validation_totals
from megatron_internvlx.reporting.lines import tracked_values, training_line, validation_line
from megatron_internvlx.reporting.progress import ProgressBar
from megatron_internvlx.reporting.report import Report
from megatron_internvlx.reporting.tracking import Trackers
from megatron_internvlx.training.provider import DataProvider
from megatron_internvlx.training.step import ForwardStep


class TrainingLog:
    """Replaces Megatron's log lines: counts, prints, tracks and draws at each interval and evaluation.

    Args:
        args: parsed arguments.
        data: the dataset provider, for reject counts and the validation records.
        step: the forward step, which counts what the ranks do.
        trackers: MLflow and its like.
    """

    def __init__(
        self, args: argparse.Namespace, data: DataProvider, step: ForwardStep, trackers: Trackers
    ) -> None:
        settings = settings_from(args, DataSettings)
        self.args, self.data, self.step, self.trackers = args, data, step, trackers
        self.book = AnswerBook(args, data) if settings.valid_data else None
        self.report = Report(args, settings.report_file, self.book, writes=_is_last(args))
        self.bar = ProgressBar() if _is_last(args) and sys.stderr.isatty() else None
        self._files = [path for path in (settings.predictions_file, settings.report_file) if path]
        self._logged = 0
        step.on_answers = self.record_answers
        step.meter = StepMeter.from_args(args)
        platform.install_log_line(self.train_line, self.eval_line)

    def record_answers(self, plan: SequencePlan, predicted: torch.Tensor) -> None:
        """Record the answers of one evaluation micro-batch; called on the last stage."""
        if self.book is not None and mpu.get_tensor_model_parallel_rank() == 0:
            self.book.add(plan, predicted)

    def train_line(self, record: platform.LogRecord) -> str | None:
        """The line of one log interval, None if it was printed above the bar; called on every rank."""
        self._logged = self._logged or self.args.iteration  # what a checkpoint had reached
        steps, self._logged = max(record.iteration - self._logged, 1), record.iteration
        # The peak is that of the type of most matrix products.
        peak = peak_flops(platform.device_name(), "fp8" if self.args.fp8 else "bf16")
        totals = interval_totals(self.step, self.data, seconds=record.seconds, steps=steps, peak=peak)
        loss = record.losses.get("loss")
        if loss is not None:
            self.report.curve.losses.append((record.iteration, loss))
        self.trackers.metrics(record.iteration, tracked_values(record, totals, dist.get_world_size()))
        line = training_line(record, totals)
        if self.bar is None:
            return line
        self.bar.write(line)
        self.bar.update(
            record.iteration,
            record.train_iters,
            loss=loss,
            tokens_per_s=totals.tokens_per_s,
            accuracy=self.report.accuracy,
        )
        return None

    def eval_line(self, prefix: str, values: dict[str, float] | None) -> str:
        """The line of one evaluation, `values` None if the time limit cut it short; called on every rank."""
        self.step.take()
        iteration = int("".join(c for c in prefix.split(" on ")[0] if c.isdigit()) or 0)
        if values is None:
            if self.book is not None:
                self.book.discard()
            return (
                f"validation at step {iteration} | cut short by the time limit, its results are not reported"
            )
        if self.book is not None:
            self.book.finish()
        counts = validation_totals(self.data)
        if "accuracy" in values:
            self.report.curve.accuracies.append((iteration, values["accuracy"]))
        self.report.draw()
        self.trackers.metrics(iteration, {f"validation_{name}": value for name, value in values.items()})
        self.trackers.artifacts(self._files)
        return validation_line(iteration, values, counts)

    def close(self) -> None:
        """Print the summary, write the picture and end the progress bar; after `pretrain`."""
        if self.bar is not None:
            self.bar.close()
        if not (self.report.writes and self.report.curve.losses):
            return
        if self.book is not None and self.book.last:
            print(self.book.summary())
        if self.report.draw():
            print(f"picture: {self.report.path}")
            self.trackers.artifacts([str(self.report.path)])


def _is_last(args: argparse.Namespace) -> bool:
    """Whether this rank prints: Megatron's choice, on the last pipeline stage, where losses are known."""
    return args.rank == args.world_size - 1
