"""Task of local records for lmms-eval and VLMEvalKit: the questions that `ivlx evaluate` asks, without a hub.

A row is one question: `key`, `question`, `expected`, `references`, `metric`, `messages` (JSON text: role and text
of each turn before the answer, with `<image>` in its place) and `images` (paths, in the order of the `<image>`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_internvlx.data.conversation import IMAGE
from megatron_internvlx.evaluation.answers import Question
from megatron_internvlx.evaluation.metrics import get_metric
from megatron_internvlx.files import write_atomically
from megatron_internvlx.harness.messages import ROLES, Message

TASK = "internvlx_local"
_ROLES = {ours: theirs for theirs, ours in ROLES.items()}
_TASK_FILE = """task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_messages: !function {module}.doc_to_messages
doc_to_visual: !function {module}.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: expected
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  do_sample: false
process_results: !function {module}.process_results
metric_list:
  - metric: score
    aggregation: mean
    higher_is_better: true
"""


def local_rows(questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Rows of questions, in their order."""
    return [
        {
            "key": question.key,
            "question": question.text,
            "expected": question.expected,
            "references": list(question.compared),
            "metric": question.metric,
            "messages": json.dumps(
                [{"role": _ROLES[turn["from"]], "text": turn["value"]} for turn in question.turns],
                ensure_ascii=False,
            ),
            "images": [str(Path(path).absolute()) for path in question.images],
        }
        for question in questions
    ]


def local_messages(row: Mapping[str, Any]) -> list[Message]:
    """Messages of a row: the images of a turn, then its text with their `<image>`."""
    left = [Path(path) for path in row["images"]]
    messages: list[Message] = []
    for turn in json.loads(row["messages"]):
        count = turn["text"].count(IMAGE)
        messages.append((turn["role"], [*left[:count], turn["text"]]))
        left = left[count:]
    return messages


def write_task(folder: Path, rows: Sequence[Mapping[str, Any]], max_new_tokens: int) -> None:
    """Write a folder for lmms-eval's `--include_path`: the rows, and the task `TASK` that reads them."""
    table = (folder / f"{TASK}.jsonl").absolute()
    write_atomically(table, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    text = _TASK_FILE.format(
        task=TASK, rows=json.dumps(str(table)), module=__name__, max_new_tokens=max_new_tokens
    )
    write_atomically(folder / f"{TASK}.yaml", text)


def doc_to_messages(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> list[dict[str, Any]]:
    """Messages in lmms-eval's form, images opened."""
    pictures = iter(doc_to_visual(doc))
    return [
        {
            "role": role,
            "content": [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image", "url": next(pictures)}
                for part in parts
            ],
        }
        for role, parts in local_messages(doc)
    ]


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Images of a row, opened."""
    return [Image.open(path) for path in doc["images"]]


def score_row(row: Mapping[str, Any], given: str) -> float:
    """Score of an answer to a row, 0 to 1, by the row's metric."""
    return get_metric(row["metric"]).score(row["references"], given, row["question"])


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score of an answer, for lmms-eval."""
    return {"score": score_row(doc, results[0])}
