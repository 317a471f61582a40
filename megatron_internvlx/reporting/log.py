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
from megatron_internvlx.megatron_settings import Batches, CheckpointFiles, Execution, Parallelism, Progress
from megatron_internvlx.planning.metrics import StepMeter, peak_flops
from megatron_internvlx.reporting.answers import AnswerBook
from megatron_internvlx.reporting.interval import interval_totals, validation_totals
from megatron_internvlx.reporting.lines import tracked_values, training_line, validation_line
from megatron_internvlx.reporting.phases import StartPhases
from megatron_internvlx.reporting.progress import ProgressBar
from megatron_internvlx.reporting.report import Report
from megatron_internvlx.reporting.time_left import TimeLeft
from megatron_internvlx.reporting.tracking import Trackers
from megatron_internvlx.training.provider import DataProvider
from megatron_internvlx.training.step import ForwardStep


class TrainingLog:
    """Replaces Megatron's log lines: counts, prints, tracks and draws at each interval and evaluation.

    Args:
        args: parsed arguments, in which Megatron notes its progress.
        data: the dataset provider, for reject counts and the validation records.
        step: the forward step, which counts the work of this rank.
        trackers: MLflow and its like.
        start: phases of the start, the last of which ends with the first step.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        data: DataProvider,
        step: ForwardStep,
        trackers: Trackers,
        start: StartPhases,
    ) -> None:
        settings, checkpoints = settings_from(args, DataSettings), settings_from(args, CheckpointFiles)
        prints = settings_from(args, Parallelism).is_last_rank
        self.data, self.step, self.trackers, self.progress = data, step, trackers, Progress(args)
        self.start, batches = start, settings_from(args, Batches)
        self.time_left = TimeLeft(
            eval_interval=batches.eval_interval if batches.eval_iters else None,
            save_interval=checkpoints.save_interval if checkpoints.save else None,
        )
        # The peak of the device is that of the type of most matrix products.
        self._product_type = "fp8" if settings_from(args, Execution).fp8 else "bf16"
        self.book = AnswerBook(settings.predictions_file, data) if settings.valid_data else None
        self.report = Report(
            self.progress, checkpoints.save_folder, settings.report_file, self.book, writes=prints
        )
        self.bar = ProgressBar() if prints and sys.stderr.isatty() else None
        self._files = [path for path in (settings.predictions_file, settings.report_file) if path]
        self._logged = 0
        step.on_answers = self.record_answers
        data.on_build = lambda: start.enter("data")
        step.meter = StepMeter.from_args(args)
        platform.install_log_line(
            self.train_line,
            self.eval_line,
            first_step=self.first_step_ended,
            evaluated=self.time_left.evaluated,
        )

    def record_answers(self, plan: SequencePlan, predicted: torch.Tensor) -> None:
        """Record the answers of one evaluation micro-batch; called on the last stage."""
        if self.book is not None and mpu.get_tensor_model_parallel_rank() == 0:
            self.book.add(plan, predicted)

    def first_step_ended(self) -> None:
        """End the start; called on every rank after the first step of this process."""
        self.start.finish()
        self.time_left.first_step_ended(self.progress.loaded_step + 1)
        self.trackers.metrics(self.progress.loaded_step, self.start.tracked_values())

    def saved(self, seconds: float) -> None:
        """Keep the curve with a checkpoint, which took `seconds`; called on every rank."""
        self.time_left.saved(seconds)
        self.report.save_curve()

    def train_line(self, record: platform.LogRecord) -> str | None:
        """Format the line of a log interval; None if it was printed above the bar. Called on every rank."""
        self._logged = self._logged or self.progress.loaded_step
        steps, self._logged = max(record.iteration - self._logged, 1), record.iteration
        peak = peak_flops(platform.device_name(), self._product_type)
        totals = interval_totals(self.step, self.data, seconds=record.seconds, steps=steps, peak=peak)
        self.time_left.interval_ended(record.iteration, record.seconds)
        left = self.time_left.after(record.iteration, record.train_iters)
        self.report.left = str(left) if left and record.iteration < record.train_iters else ""
        loss = record.losses.get("loss")
        if loss is not None:
            self.report.curve.losses.append((record.iteration, loss))
        self.trackers.metrics(record.iteration, tracked_values(record, totals, dist.get_world_size(), left))
        line = training_line(record, totals, left)
        if self.bar is None:
            return line
        self.bar.write(line)
        self.bar.update(
            record.iteration,
            record.train_iters,
            loss=loss,
            tokens_per_s=totals.tokens_per_s,
            accuracy=self.report.accuracy,
            left=self.report.left,
        )
        return None

    def eval_line(self, prefix: str, values: dict[str, float] | None) -> str:
        """Format the line of an evaluation; `values` is None if the time limit ended it. Called on every rank."""
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
