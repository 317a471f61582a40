"""The answers a model gives in evaluation: which were right, and what was asked."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_internvlx.arguments import settings_from
from megatron_internvlx.config import DataSettings
from megatron_internvlx.data.plan import SequencePlan
from megatron_internvlx.data.tokenizer import load_tokenizer
from megatron_internvlx.training.data import DataProvider, build_encoder


def settle_validation(args: argparse.Namespace) -> None:
    """Make the settings of validation fit each other, before a run. Raises ValueError if they cannot.

    A recipe says how much to validate, and the user on what: without data there is no validation. With them
    answers and picture go beside the checkpoints, unless told otherwise.
    """
    if not args.valid_data:
        if args.eval_iters and os.environ.get("RANK", "0") == "0":
            print("no --valid-data: this run is not validated", flush=True)
        args.eval_iters = 0
        return
    if not (args.eval_iters or args.full_validation):
        raise ValueError(
            f"--valid-data {args.valid_data} with --eval-iters 0 validates nothing: say how many global batches "
            f"(of {args.eval_global_batch_size} samples) to validate on, or leave --valid-data out"
        )
    if args.save and "://" not in args.save:
        args.predictions_file = args.predictions_file or str(Path(args.save) / "predictions.jsonl")
        args.report_file = args.report_file or str(Path(args.save) / "report.png")


class AnswerBook:
    """Collects the predicted tokens of an evaluation and writes one JSON line per answer.

    A prediction is made with the correct earlier answer tokens given (teacher forcing), so an
    answer is entirely right exactly when greedy generation would produce it.
    """

    def __init__(self, args: argparse.Namespace, data: DataProvider) -> None:
        self.args, self.data = args, data
        self.path = settings_from(args, DataSettings).predictions_file
        self.last: list[dict[str, Any]] = []
        """Rows of the last complete evaluation over all ranks, on each rank of the last stage."""
        self._pending: list[tuple[SequencePlan, np.ndarray]] = []

    def add(self, plan: SequencePlan, predicted: torch.Tensor) -> None:
        """Keep one micro-batch: predicted int [n] for the plan's supervised rows."""
        self._pending.append((plan, predicted.to("cpu").numpy()))

    def finish(self) -> None:
        """End of an evaluation: gather all ranks' answers and write the file; called on every rank."""
        if not mpu.is_pipeline_last_stage(ignore_virtual=True):
            return
        rows = [row for plan, predicted in self._pending for row in self._rows(plan, predicted)]
        self._pending = []
        # TP ranks have the same predictions, and the first one's are kept. Which rank draws the picture is
        # Megatron's choice, so all of them get the rows.
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
            except OSError as error:  # a full disk, for instance: training goes on
                print(f"{self.path} could not be written: {error}", file=sys.stderr, flush=True)

    def _rows(self, plan: SequencePlan, predicted: np.ndarray) -> list[dict[str, Any]]:
        tokenizer = load_tokenizer(self.args.tokenizer_model)
        rows = []
        spans: dict[int, int] = {}
        for answer in range(int(plan.answer_ids[-1]) + 1 if len(plan.answer_ids) else 0):
            at = np.flatnonzero(plan.answer_ids == answer)
            sample = int(plan.sample_of_loss_row[at[0]])
            turn = spans.get(sample, 0)
            spans[sample] = turn + 1
            expected, given = plan.targets[at], predicted[at]
            rows.append(
                self._source(int(plan.sample_ids[sample]), turn)
                | {
                    "expected": tokenizer.decode(expected, skip_special_tokens=True).strip(),
                    "given": tokenizer.decode(given, skip_special_tokens=True).strip(),
                    "correct": bool((expected == given).all()),
                }
            )
        return rows

    def _source(self, number: int, turn: int) -> dict[str, Any]:
        """Question, image and grid of the `turn`-th answer of a validation record."""
        assert self.data.valid_manifest is not None
        record = self.data.valid_manifest.record(number)
        asked = [t["value"] for t in record.data["conversations"] if t["from"] == "human"]
        sample = build_encoder(self.args).encode(record)
        first = sample.images[0] if sample.images else None
        kinds = record.data.get("kinds") or [record.data.get("kind", "")]
        return {
            "key": record.key,
            "kind": kinds[min(turn, len(kinds) - 1)],
            "question": asked[min(turn, len(asked) - 1)].replace("<image>", "").strip(),
            "image": first.path if first else None,
            "cols": first.cols if first else 0,
            "rows": first.rows if first else 0,
            "thumbnail": first.thumbnail if first else False,
        }

    def predictions(self) -> list[Any]:
        """The last evaluation's answers as the report wants them."""
        from megatron_internvlx.training.report import prediction_of

        return [prediction_of(row) for row in self.last]

    def summary(self) -> str:
        """Share of right answers per kind of question, and what the commonest answer would reach."""
        from megatron_internvlx.training.report import accuracy_by_kind, most_common_baseline

        rows = self.predictions()
        right = sum(row.correct for row in rows)
        lines = [f"held-out answers entirely right: {right}/{len(rows)} = {right / len(rows):.1%}"]
        baseline = most_common_baseline([row.expected for row in rows])
        lines.append(f"always the commonest answer: {baseline:.1%}")
        lines += [f"  {kind:<14} {a:>4}/{b}" for kind, (a, b) in sorted(accuracy_by_kind(rows).items())]
        return "\n".join(lines)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines, under the final name only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    partial.replace(path)
