"""What a person sees of a run: one line per interval, a progress bar, answers, the final picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_internvlx import platform
from megatron_internvlx.arguments import settings_from
from megatron_internvlx.config import DataSettings
from megatron_internvlx.data.plan import SequencePlan
from megatron_internvlx.training.answers import AnswerBook
from megatron_internvlx.training.data import DataProvider
from megatron_internvlx.training.step import ForwardStep

GIB = 1 << 30


def _number(value: float | None, digits: str) -> str:
    return "-" if value is None else f"{value:{digits}}"


class TrainingLog:
    """Replaces Megatron's log lines, and keeps what the report needs.

    Args:
        args: parsed arguments.
        data: the dataset provider, for reject counts and the validation records.
    """

    def __init__(self, args: argparse.Namespace, data: DataProvider) -> None:
        self.args, self.data = args, data
        self.settings = settings_from(args, DataSettings)
        self.losses: list[tuple[int, float]] = []
        self.accuracies: list[tuple[int, float]] = []
        self.bar: Any = None
        self.book = AnswerBook(args, data) if self.settings.valid_data else None
        self.step: ForwardStep | None = None
        self._logged = 0

    def install(self, step: ForwardStep) -> None:
        """Take over Megatron's output; before `pretrain`."""
        self.step = step
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
            self.losses.append((record.iteration, loss))
        parts = [
            f"step {record.iteration:>{len(str(record.train_iters))}}/{record.train_iters}",
            f"loss {_number(loss, '.4f')}",
            f"grad norm {_number(record.grad_norm, '.3f')}",
            f"lr {_number(record.learning_rate, '.2e')}",
            f"{totals['tokens_per_s']:,.0f} tokens/s",
            f"{totals['seconds'] * 1000:.0f} ms/step",
            f"padding {totals['padding']:.1%}",
            f"data wait {totals['wait']:.1%}",
            f"memory {totals['memory']:.2f} GiB",
        ]
        if totals["rejects"]:
            parts.append(f"unusable samples {totals['rejects']:.0f}")
        if record.skipped or record.nan:
            parts.append(f"skipped {record.skipped} nan {record.nan}")
        return self._shown(" | ".join(parts), record, loss, totals["tokens_per_s"])

    def _totals(self, record: platform.LogRecord) -> dict[str, float]:
        """Figures of the interval over all ranks, one all-reduce."""
        assert self.step is not None
        counters = self.step.take()
        replicas = dist.get_world_size() // mpu.get_data_parallel_world_size()
        rejects = self.data.rejects.total if self.data.rejects else 0
        sums = torch.tensor(
            [counters.rows / replicas, counters.padding / replicas, rejects], device=platform.device()
        )
        dist.all_reduce(sums)
        wait = counters.data_wait if self.data.is_loading_rank else 0.0
        peaks = torch.tensor(
            [wait, platform.peak_memory() / GIB], dtype=torch.float32, device=platform.device()
        )
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        rows, padding, rejected = sums.tolist()
        wait, memory = peaks.tolist()
        steps = max(record.iteration - self._logged, 1)
        self._logged = record.iteration
        interval = max(record.seconds * steps, 1e-9)
        return {
            "seconds": record.seconds,
            "tokens_per_s": (rows - padding) / interval,
            "padding": padding / max(rows, 1),
            "wait": wait / interval,
            "memory": memory,
            "rejects": rejected,
        }

    def _shown(self, line: str, record: platform.LogRecord, loss, tokens_per_s: float) -> str | None:
        """The line for the log; at a terminal, print it above the progress bar instead."""
        if not (is_last_rank() and sys.stderr.isatty()):
            return line
        from megatron_internvlx.training.progress import ProgressBar

        self.bar = self.bar or ProgressBar()
        self.bar.write(line)
        accuracy = self.accuracies[-1][1] if self.accuracies else None
        self.bar.update(
            record.iteration, record.train_iters, loss=loss, tokens_per_s=tokens_per_s, accuracy=accuracy
        )
        return None

    def eval_line(self, prefix: str, values: dict[str, float]) -> str:
        """The line of one evaluation; called on every rank."""
        assert self.step is not None
        self.step.take()
        if self.book is not None:
            self.book.finish()
        iteration = int("".join(c for c in prefix.split(" on ")[0] if c.isdigit()) or 0)
        if "accuracy" in values:
            self.accuracies.append((iteration, values["accuracy"]))
        shown = f"validation at step {iteration} | loss {_number(values.get('loss'), '.4f')}"
        return shown + f" | answers right {_number(values.get('accuracy'), '.1%')}"

    def close(self) -> None:
        """Write the report and end the progress bar; after `pretrain`."""
        if self.bar is not None:
            self.bar.close()
        if not is_last_rank() or not self.losses:
            return
        if self.book is not None and self.book.last:
            print(self.book.summary())
        if self.settings.report_file:
            self._report(Path(self.settings.report_file))

    def _report(self, path: Path) -> None:
        # matplotlib takes a second to import and is needed on one rank only.
        from megatron_internvlx.training.report import choose_examples, write_report

        examples = choose_examples(self.book.predictions()) if self.book else []
        caption = f"loss {self.losses[0][1]:.3f} -> {self.losses[-1][1]:.3f}"
        if self.accuracies:
            caption += f", held-out answers right {self.accuracies[-1][1]:.1%}"
        write_report(
            path,
            losses=self.losses,
            accuracies=self.accuracies,
            examples=examples,
            title=f"InternVL-X: {self.losses[-1][0]} steps",
            caption=caption,
        )
        print(f"picture: {path}")


def is_last_rank() -> bool:
    """Whether this is the rank that speaks: Megatron's choice, on the last pipeline stage."""
    return dist.get_rank() == dist.get_world_size() - 1
