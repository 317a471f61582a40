"""Model and local data set for VLMEvalKit, which has no plugins: `register` adds them to its tables."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
from vlmeval.dataset import DATASET_TYPE
from vlmeval.dataset.image_base import ImageBaseDataset
from vlmeval.vlm.base import BaseModel

from megatron_internvlx.evaluation.generation import Sampling
from megatron_internvlx.harness.answering import MAX_NEW_TOKENS, ExportAnswerer
from megatron_internvlx.harness.local_task import local_messages
from megatron_internvlx.harness.messages import choice_prompt, grouped_messages, short_prompt

NAME = "internvlx"


class InternVLX(BaseModel):
    """Exported or released InternVL-X as a model of VLMEvalKit, which asks one question after the other.

    Args:
        model_path: directory of the model.
        dtype: type of the weights.
        max_new_tokens: length limit of an answer.
        max_tiles: tiles of an image at most; None: as in training.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        model_path: str,
        dtype: str = "bfloat16",
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_tiles: int | None = None,
    ) -> None:
        super().__init__()
        self.answerer = ExportAnswerer(Path(model_path), dtype, max_tiles)
        self.sampling = Sampling(max_new_tokens)
        self.tokens = 0

    def use_custom_prompt(self, dataset: str) -> bool:
        """Whether `build_prompt` is asked: for options, and for yes or no, so that questions end as in training.

        MMMU's own prompts are kept: they place images inside the question.
        """
        return DATASET_TYPE(dataset) in ("MCQ", "Y/N") and "MMMU" not in dataset

    def build_prompt(self, line: Mapping[str, Any], dataset: str) -> list[dict[str, str]]:
        """Images of a question, then its text."""
        options = DATASET_TYPE(dataset) == "MCQ"
        text = choice_prompt(line) if options else short_prompt(line)
        pictures = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        return [*pictures, {"type": "text", "value": text}]

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """Answer to the kit's items."""
        (answer,) = self.answerer.answer([grouped_messages(message)], self.sampling)
        self.tokens += answer.tokens
        return answer.text


class LocalDataset(ImageBaseDataset):
    """Rows of a local task as a data set of VLMEvalKit.

    Args:
        name: of the data set.
        rows: from `local_task.local_rows`.
    """

    TYPE = "VQA"
    force_use_dataset_prompt = True

    def __init__(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        # The parent's would look for a table in the kit's own folder, or download it.
        self.dataset_name, self.rows = name, list(rows)
        self.data = pandas.DataFrame(
            {
                "index": range(len(rows)),
                "question": [row["question"] for row in rows],
                "answer": [row["expected"] for row in rows],
            }
        )

    def build_prompt(self, line: Mapping[str, Any]) -> list[dict[str, str]]:
        """Items of a question, each with its role; images stand before the text that has their `<image>`."""
        return [
            {"role": role, "type": "text", "value": part}
            if isinstance(part, str)
            else {"role": role, "type": "image", "value": str(part)}
            for role, parts in local_messages(self.rows[int(line["index"])])
            for part in parts
        ]

    def dump_image(self, line: Mapping[str, Any]) -> list[str]:
        """Paths of a question's images."""
        return list(self.rows[int(line["index"])]["images"])

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> dict[str, float]:
        """Not needed: raises NotImplementedError. `tools/run_harness.py` scores the answers."""
        raise NotImplementedError("answers to local rows are scored by tools/run_harness.py")


def register(model_path: str, **settings: Any) -> None:
    """Add the model to the kit's table of models, under `NAME`; settings are those of `InternVLX`."""
    from vlmeval.config import supported_VLM

    supported_VLM[NAME] = functools.partial(InternVLX, model_path, **settings)
