"""What a person sees of a run: one line per interval, a progress bar, answers, the picture."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_internvlx import platform
from megatron_internvlx.config import DataSettings, settings_from
from megatron_internvlx.data.plan import SequencePlan
from megatron_internvlx.data.rejects import CAUSES
from megatron_internvlx.planning.metrics import TERA, StepMeter, mfu, peak_flops
from megatron_internvlx.reporting.answers import AnswerBook
from megatron_internvlx.reporting.curve import Curve
from megatron_internvlx.reporting.tracking import mark_failed, sinks
from megatron_internvlx.training.provider import DataProvider
from megatron_internvlx.training.step import ForwardStep
from megatron_internvlx.training.validation import ValidationCounts

GIB = 1 << 30


def _number(value: float | None, digits: str) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:{digits}}"


def _causes(rejects: Mapping[str, int]) -> str:
    """Unusable samples per cause, the most frequent first."""
    counts = sorted(rejects.items(), key=lambda item: -item[1])
    return ", ".join(f"{cause} {count}" for cause, count in counts)


def _cut(tiles: float, tokens: float) -> list[str]:
    """What samples gave up to fit --seq-length and the budgets, as a part of a log line; [] if nothing."""
    return [f"cut to fit {tiles:.0f} tiles, {tokens:.0f} tokens"] if tiles or tokens else []


class TrainingLog:
    """Replaces Megatron's log lines, and keeps what the report needs.

    Args:
        args: parsed arguments.
        data: the dataset provider, for reject counts and the validation records.
    """

    def __init__(self, args: argparse.Namespace, data: DataProvider) -> None:
        self.args, self.data = args, data
        # Losses are known on the last rank.
        self.sinks = sinks(args) if args.rank == args.world_size - 1 else []
        self.settings = settings_from(args, DataSettings)
        self.folder = Path(args.save or ".")
        """Where the files of the curve and of the MLflow run are."""
        self.curve: Curve | None = None
        self.bar: Any = None
        self.book = AnswerBook(args, data) if self.settings.valid_data else None
        self.step: ForwardStep | None = None
        self._logged = 0
        self.rejects: dict[str, int] = {}
        """Unusable samples so far over all ranks, per cause."""

    def install(self, step: ForwardStep) -> None:
        """Take over Megatron's output; before `pretrain`."""
        self.step = step
        step.meter = StepMeter.from_args(self.args)
        platform.install_log_line(self.train_line, self.eval_line)

    def answers(self, plan: SequencePlan, predicted: torch.Tensor) -> None:
        """Keep the answers of one evaluation micro-batch; on the last stage."""
        if self.book is not None and mpu.get_tensor_model_parallel_rank() == 0:
            self.book.add(plan, predicted)

    def train_line(self, record: platform.LogRecord) -> str | None:
        """The line of one log interval; called on every rank."""
        totals = self._totals(record)
        loss = record.losses.get("loss")
        if loss is not None:
            self._points().losses.append((record.iteration, loss))
        parts = [
            f"step {record.iteration:>{len(str(record.train_iters))}}/{record.train_iters}",
            f"loss {_number(loss, '.4f')}",
            f"grad norm {_number(record.grad_norm, '.3f')}",
            f"lr {_number(record.learning_rate, '.2e')}",
            f"{totals['tokens_per_s']:,.0f} tokens/s",
            f"{totals['seconds'] * 1000:.0f} ms/step",
            f"{totals['tflops']:.{3 if totals['tflops'] < 10 else 0}f} TFLOP/s",
            f"MFU {_number(totals['mfu'], '.1%')}",
            f"padding {totals['padding']:.1%}",
            f"data wait {totals['wait']:.1%}",
            f"memory {totals['memory']:.2f} GiB",
        ]
        if totals["rejects"]:
            parts.append(f"unusable samples {totals['rejects']:.0f} ({_causes(self.rejects)})")
        parts += _cut(totals["cut_tiles"], totals["cut_tokens"])
        if record.skipped or record.nan:
            parts.append(f"skipped {record.skipped} nan {record.nan}")
        for sink in self.sinks:
            sink.metrics(record.iteration, self._metrics(record, totals))
        return self._shown(" | ".join(parts), record, loss, totals["tokens_per_s"])

    def _points(self) -> Curve:
        """The curve so far; the first call comes when it is known which checkpoint was loaded."""
        if self.curve is None:
            self.curve = Curve()
            if self.args.load and self.args.iteration and is_last_rank():
                self.curve.take_over(Path(self.args.load), self.args.iteration)
        return self.curve

    def keep_curve(self) -> None:
        """Write the curve for a later start, which goes on from here; with every checkpoint."""
        if self.args.save and "://" not in self.args.save and is_last_rank():
            self._points().keep(self.folder)

    def _totals(self, record: platform.LogRecord) -> dict[str, Any]:
        """Figures of the interval over all ranks, one all-reduce."""
        assert self.step is not None
        counters = self.step.take()
        flops = self.step.meter.take().model_flops if self.step.meter else 0
        replicas = dist.get_world_size() // mpu.get_data_parallel_world_size()
        rejects = self.data.rejects
        counts = rejects.counts if rejects else {}
        sums = torch.tensor(
            [
                flops / TERA / replicas,
                counters.rows / replicas,
                counters.padding / replicas,
                *((rejects.cut_tiles, rejects.cut_tokens) if rejects else (0, 0)),
                *(counts.get(c, 0) for c in CAUSES),
            ],
            device=platform.device(),
        )
        dist.all_reduce(sums)
        wait = counters.data_wait if self.data.is_loading_rank else 0.0
        peaks = torch.tensor(
            [wait, platform.peak_memory() / GIB], dtype=torch.float32, device=platform.device()
        )
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        teraflop, rows, padding, cut_tiles, cut_tokens, *rejected = sums.tolist()
        self.rejects = {cause: int(count) for cause, count in zip(CAUSES, rejected, strict=True) if count}
        wait, memory = peaks.tolist()
        self._logged = self._logged or self.args.iteration  # what a checkpoint had reached
        steps = max(record.iteration - self._logged, 1)
        self._logged = record.iteration
        interval = max(record.seconds * steps, 1e-9)
        return {
            "seconds": record.seconds,
            "tokens_per_s": (rows - padding) / interval,
            "padding": padding / max(rows, 1),
            "wait": wait / interval,
            "memory": memory,
            "rejects": sum(rejected),
            "cut_tiles": cut_tiles,
            "cut_tokens": cut_tokens,
            "tflops": teraflop / interval / dist.get_world_size(),
            "mfu": mfu(teraflop * TERA, interval, dist.get_world_size(), self._peak()),
        }

    def _peak(self) -> float | None:
        """Peak of one device in FLOP/s, for the type of most matrix products."""
        return peak_flops(platform.device_name(), "fp8" if self.args.fp8 else "bf16")

    def _metrics(self, record: platform.LogRecord, totals: dict[str, Any]) -> dict[str, float | None]:
        """What sinks get of a log interval."""
        names = ("tokens_per_s", "tflops", "mfu", "padding", "memory", "rejects")
        return {
            "loss": record.losses.get("loss"),
            "learning_rate": record.learning_rate,
            "grad_norm": record.grad_norm,
            "step_seconds": totals["seconds"],
            "data_wait": totals["wait"],
            "skipped_steps": float(record.skipped),
            "consumed_samples": float(record.consumed_samples),
            "teraflop_per_step": totals["tflops"] * totals["seconds"] * dist.get_world_size(),
            **{name: totals[name] for name in names},
            **{f"rejects_{cause}": float(count) for cause, count in self.rejects.items()},
        }

    def _shown(self, line: str, record: platform.LogRecord, loss, tokens_per_s: float) -> str | None:
        """The line for the log; at a terminal, print it above the progress bar instead."""
        if not (is_last_rank() and sys.stderr.isatty()):
            return line
        from megatron_internvlx.reporting.progress import ProgressBar

        self.bar = self.bar or ProgressBar()
        self.bar.write(line)
        accuracies = self._points().accuracies
        accuracy = accuracies[-1][1] if accuracies else None
        self.bar.update(
            record.iteration, record.train_iters, loss=loss, tokens_per_s=tokens_per_s, accuracy=accuracy
        )
        return None

    def eval_line(self, prefix: str, values: dict[str, float] | None) -> str:
        """The line of one evaluation, None if the time limit cut it short; called on every rank."""
        assert self.step is not None
        self.step.take()
        iteration = int("".join(c for c in prefix.split(" on ")[0] if c.isdigit()) or 0)
        if values is None:
            if self.book is not None:
                self.book.drop()
            return f"validation at step {iteration} | cut short by the time limit, nothing is reported of it"
        if self.book is not None:
            self.book.finish()
        counts = self._evaluated()
        if "accuracy" in values:
            self._points().accuracies.append((iteration, values["accuracy"]))
        if self.settings.report_file and is_last_rank():
            self._report(Path(self.settings.report_file))
        for sink in self.sinks:
            sink.metrics(iteration, {f"validation_{name}": value for name, value in values.items()})
            for path in (self.settings.predictions_file, self.settings.report_file):
                if path:
                    sink.artifact(path)
        parts = [
            f"validation at step {iteration}",
            f"loss {_number(values.get('loss'), '.4f')}",
            f"answers right {_number(values.get('accuracy'), '.1%')}",
            f"{counts.records} records",
        ]
        if counts.rejects:
            parts.append(f"unusable {sum(counts.rejects.values())} ({_causes(counts.rejects)})")
        return " | ".join(parts + _cut(counts.cut_tiles, counts.cut_tokens))

    def _evaluated(self) -> ValidationCounts:
        """What the evaluation saw over all ranks; called on every rank."""
        mine = self.data.evaluated()
        counts = [mine.records, mine.cut_tiles, mine.cut_tokens, *(mine.rejects.get(c, 0) for c in CAUSES)]
        sums = torch.tensor(counts, dtype=torch.int64, device=platform.device())
        dist.all_reduce(sums)
        records, tiles, tokens, *rejected = sums.tolist()
        causes = {cause: count for cause, count in zip(CAUSES, rejected, strict=True) if count}
        return ValidationCounts(records, causes, tiles, tokens)

    def close(self) -> None:
        """Write the report and end the progress bar; after `pretrain`."""
        if self.bar is not None:
            self.bar.close()
        if not (is_last_rank() and self._points().losses):
            return
        if self.book is not None and self.book.last:
            print(self.book.summary())
        if self.settings.report_file:
            self._report(Path(self.settings.report_file))
            print(f"picture: {self.settings.report_file}")
            for sink in self.sinks:
                sink.artifact(self.settings.report_file)

    def close_sinks(self, status: str, alone: bool = False) -> None:
        """Tell the sinks how the run ends: FINISHED, FAILED, KILLED, or SCHEDULED to go on later.

        `alone`: no other rank knows, so one without sinks writes to MLflow itself.
        """
        sinks, self.sinks = self.sinks, []
        for sink in sinks:
            # A rank that failed has little time until its launcher ends it; after Ctrl-C a person waits.
            sink.close(status, seconds={"FAILED": 15.0, "KILLED": 8.0}.get(status, 60.0))
        if alone and status == "FAILED" and not sinks:
            mark_failed(self.args)

    def _report(self, path: Path) -> None:
        # matplotlib takes a second to import and is needed on one rank only.
        from megatron_internvlx.reporting.picture import choose_examples, write_report

        losses, accuracies = self._points().losses, self._points().accuracies
        if not losses:
            return  # an evaluation before the first log interval has ended
        caption = f"loss {losses[0][1]:.3f} -> {losses[-1][1]:.3f}"
        if accuracies:
            caption += f", held-out answers right {accuracies[-1][1]:.1%}"
        try:
            write_report(
                path,
                losses=losses,
                accuracies=accuracies,
                examples=choose_examples(self.book.predictions()) if self.book else [],
                title=f"InternVL-X: {losses[-1][0]} steps",
                caption=caption,
            )
        except OSError as error:  # a full disk, for instance: training goes on
            print(f"{path} could not be written: {error}", file=sys.stderr, flush=True)


def is_last_rank() -> bool:
    """Whether this is the rank that speaks: Megatron's choice, on the last pipeline stage."""
    return dist.get_rank() == dist.get_world_size() - 1
