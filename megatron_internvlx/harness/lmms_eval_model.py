"""Model `internvlx` of lmms-eval, registered by an entry point of this package.

`lmms-eval --model internvlx --model_args pretrained=DIR,dtype=bfloat16 --tasks docvqa_val`. Every task is asked in
its chat form; the answer ends with the token that ended answers in training, whatever a task's `until` is.
"""

from __future__ import annotations

import time
from pathlib import Path

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from megatron_internvlx import ranks
from megatron_internvlx.harness.answering import MAX_NEW_TOKENS, ExportAnswerer, sampling_of
from megatron_internvlx.harness.messages import Message, chat_parts

NAME = "internvlx"


def manifest() -> ModelManifest:
    """Registration of the model, which lmms-eval asks for through the entry point `lmms_eval.models`."""
    return ModelManifest(NAME, chat_class_path=f"{__name__}.InternVLX")


class InternVLX(lmms):
    """Exported or released InternVL-X as a chat model of lmms-eval.

    Args:
        pretrained: directory of the model.
        batch_size: answers generated together.
        dtype: type of the weights.
        max_tiles: tiles of an image at most; None: as in training.
        max_new_tokens: length limit of an answer where the task sets none.
        max_batch_size: ignored; lmms-eval passes it to every model.
        device: `cpu` or `cuda`; None: the GPU if there is one. Under `accelerate launch` each process has its own.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        dtype: str = "bfloat16",
        max_tiles: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        place = None
        if ranks.launched_ranks() > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()  # lmms-eval gathers the answers of all processes through it
            place = self.accelerator.device
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        elif device == "cpu":
            import torch

            place = torch.device(device)
        self.batch_size, self.max_new_tokens = int(batch_size), int(max_new_tokens)
        self.answerer = ExportAnswerer(Path(pretrained), dtype, int(max_tiles) if max_tiles else None, place)
        self.device = self.answerer.generator.model.device

    def _messages(self, request: Instance) -> list[Message]:
        """Messages of a request, images loaded."""
        _, to_messages, _, document, task, split = request.args
        messages = to_messages(self.task_dict[task][split][document])
        return [(message["role"], chat_parts(message["content"])) for message in messages]

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests, which are batched by their generation settings."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[2].items(), key=str)), []).append(number)
        found: dict[int, GenerationResult] = {}
        begun, tokens = time.monotonic(), 0
        with tqdm(total=len(requests), desc="answers", unit="answer", disable=self.rank != 0) as bar:
            for own in groups.values():
                sampling = sampling_of(requests[own[0]].args[2], self.max_new_tokens)
                for start in range(0, len(own), self.batch_size):
                    batch = own[start : start + self.batch_size]
                    given = self.answerer.answer([self._messages(requests[i]) for i in batch], sampling)
                    for number, answer in zip(batch, given, strict=True):
                        counts = TokenCounts(output_tokens=answer.tokens)
                        found[number] = GenerationResult(answer.text, counts)
                        tokens += answer.tokens
                    bar.set_postfix_str(f"{tokens / (time.monotonic() - begun):.0f} tokens/s", refresh=False)
                    bar.update(len(batch))
        return [found[number] for number in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: raises NotImplementedError."""
        raise NotImplementedError(
            "internvlx generates answers; tasks that compare likelihoods are not supported"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: raises NotImplementedError."""
        raise NotImplementedError(
            "internvlx answers one question at a time; tasks of several rounds are not supported"
        )
