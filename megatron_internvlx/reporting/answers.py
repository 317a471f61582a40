"""Answers of a model in evaluation, with their questions and correctness."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_internvlx.data.conversation import questions
from megatron_internvlx.data.plan import FILLER, SequencePlan
from megatron_internvlx.data.rejects import BadSample, blamed_on
from megatron_internvlx.files import write_atomically
from megatron_internvlx.training.provider import DataProvider


class AnswerBook:
    """Collects the predicted tokens of an evaluation and writes one JSON line per answer.

    A prediction is made with the correct earlier answer tokens given (teacher forcing), so an
    answer is entirely right exactly when greedy generation would produce it.

    Args:
        path: file of the answers; None: not written.
        data: dataset provider with the validation records.
    """

    def __init__(self, path: str | None, data: DataProvider) -> None:
        self.path, self.data = path, data
        self.last: list[dict[str, Any]] = []
        """Rows of the last complete evaluation over all ranks, on each rank of the last stage."""
        self._rows: list[dict[str, Any]] = []
        self._sources: dict[tuple[int, int], dict[str, Any]] = {}
        """Question and image by record and turn; the same in every evaluation."""

    def add(self, plan: SequencePlan, predicted: torch.Tensor) -> None:
        """Record the answers of one micro-batch: predicted int [n] for the plan's supervised rows."""
        self._rows += self._answers(plan, predicted.to("cpu").numpy())

    def discard(self) -> None:
        """Discard the answers of an evaluation that was cut short."""
        self._rows = []

    def finish(self) -> None:
        """Gather all ranks' answers at the end of an evaluation and write the file; called on every rank."""
        if not mpu.is_pipeline_last_stage(ignore_virtual=True):
            return
        rows, self._rows = self._rows, []
        # TP ranks have the same predictions; the first one's are used. Megatron chooses the rank that draws the
        # picture, so all ranks get the rows.
        first = mpu.get_tensor_model_parallel_rank() == 0
        if first and mpu.get_data_parallel_world_size() > 1:
            parts: list[Any] = [None] * mpu.get_data_parallel_world_size()
            dist.all_gather_object(parts, rows, group=mpu.get_data_parallel_group())
            rows = [row for part in parts for row in part]
        if mpu.get_tensor_model_parallel_world_size() > 1:
            shared = [rows]
            source = mpu.get_tensor_model_parallel_src_rank()
            dist.broadcast_object_list(shared, src=source, group=mpu.get_tensor_model_parallel_group())
            rows = shared[0]
        self.last = rows
        if first and mpu.get_data_parallel_rank() == 0 and self.path:
            try:
                write_jsonl(Path(self.path), rows)
            except OSError as error:  # a full disk, for instance: training continues
                print(f"{self.path} could not be written: {error}", file=sys.stderr, flush=True)

    def _answers(self, plan: SequencePlan, predicted: np.ndarray) -> list[dict[str, Any]]:
        tokenizer: Any = self.data.validation_encoder.tokenizer
        rows: list[dict[str, Any]] = []
        if (plan.sample_ids == FILLER).any():
            return rows
        spans: dict[int, int] = {}
        for answer in range(int(plan.answer_ids[-1]) + 1 if len(plan.answer_ids) else 0):
            at = np.flatnonzero(plan.answer_ids == answer)
            sample = int(plan.sample_of_loss_row[at[0]])
            turn = spans.get(sample, 0)
            spans[sample] = turn + 1
            expected, given = plan.targets[at], predicted[at]
            rows.append(
                self._known_source(int(plan.sample_ids[sample]), turn)
                | {
                    "expected": tokenizer.decode(expected, skip_special_tokens=True).strip(),
                    "given": tokenizer.decode(given, skip_special_tokens=True).strip(),
                    "correct": bool((expected == given).all()),
                }
            )
        return rows

    def _known_source(self, number: int, turn: int) -> dict[str, Any]:
        if (number, turn) not in self._sources:
            self._sources[number, turn] = self._source(number, turn)
        return self._sources[number, turn]

    def _source(self, number: int, turn: int) -> dict[str, Any]:
        """Question, image and grid of the `turn`-th answer of a validation record."""
        assert self.data.valid_manifest is not None
        key, encoder = self.data.valid_manifest.key(number), self.data.validation_encoder
        row: dict[str, Any] = {
            "key": key,
            "kind": "",
            "question": "",
            "image": None,
            "images": [],
            "cols": 0,
            "rows": 0,
            "thumbnail": False,
        }
        try:
            with blamed_on(key):
                record = self.data.valid_manifest.record(number)
                sample = encoder.encode(record)
                asked = questions(encoder.settings.template, record.data["conversations"])
                row |= {"kind": kind_of(record.data, turn), "question": asked[turn]}
        except BadSample as bad:  # another rank could read it a moment ago, and its answer counts
            print(f"{bad}: its answer is listed without question and image", file=sys.stderr, flush=True)
            return row
        if sample.images:
            first = sample.images[0]
            row |= {"image": first.path, "images": [image.path for image in sample.images]}
            row |= {"cols": first.cols, "rows": first.rows, "thumbnail": first.thumbnail}
        return row

    def predictions(self) -> list[Any]:
        """Answers of the last evaluation, as `picture.write_report` expects them."""
        from megatron_internvlx.reporting.picture import prediction_of

        return [prediction_of(row) for row in self.last]

    def summary(self) -> str:
        """Text with the share of right answers, all and per kind of question, and those of the commonest answers."""
        from megatron_internvlx.reporting.picture import kind_accuracies

        rows = self.predictions()
        if not rows:
            return "no held-out answer was usable"
        right = sum(row.correct for row in rows)
        kinds = kind_accuracies(rows)
        lines = [f"held-out answers entirely right: {right}/{len(rows)} = {right / len(rows):.1%}"]
        guessed = sum(kind.commonest * kind.asked for kind in kinds) / len(rows)
        lines.append(f"always the commonest answer of a kind: {guessed:.1%}")
        lines += [
            f"  {kind.name:<14} {kind.right:>4}/{kind.asked} = {kind.right / kind.asked:.0%}"
            f" (commonest answer {kind.commonest:.0%})"
            for kind in kinds
        ]
        return "\n".join(lines)


def kind_of(record: dict[str, Any], turn: int) -> str:
    """Kind of question that a record gives: `kinds`, one for each answer, or `kind` for all; "" if none."""
    kinds = record.get("kinds")
    if isinstance(kinds, list) and kinds:
        return str(kinds[min(turn, len(kinds) - 1)])
    return str(record.get("kind", ""))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines; the file gets its name when it is complete. Raises OSError."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
