"""The same questions to an export through every way in which it is used, and where the answers differ."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_internvlx import platform
from megatron_internvlx.checkpoint.hf_config import read_config
from megatron_internvlx.checkpoint.remote_code import load_tokenizer
from megatron_internvlx.data.conversation import IMAGE, IMG_CONTEXT
from megatron_internvlx.data.decode_pil import image_size
from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.evaluation import vllm_answers
from megatron_internvlx.evaluation.answers import Question, questions
from megatron_internvlx.evaluation.chat_messages import messages_of, template_messages, with_data
from megatron_internvlx.evaluation.hf_model import conversation_template
from megatron_internvlx.evaluation.served_answers import (
    REMEDY,
    ServerError,
    answers_of_server,
    last_line,
    missing_packages,
)

WAYS = {
    "evaluate": "ivlx evaluate",
    "generate": "generate, as harnesses",
    "serve": "transformers serve",
    "vllm": "vLLM",
}
"""Way -> its name in the table; the first is the one that the others are compared with."""
REFERENCE = "evaluate"


@dataclass(frozen=True)
class CheckSettings:
    """Arguments of `ivlx check-export`, under its flags' names."""

    hf: Path
    """Directory of the export."""
    data: Path
    """File of the questions."""
    questions: int
    """Number of questions at most."""
    ways: tuple[str, ...]
    """Ways besides the reference, of `WAYS`."""
    vllm_python: Path | None
    """Python of an environment with vLLM; None: vLLM is not asked."""
    batch_size: int
    """Questions together, where a way takes several."""
    max_new_tokens: int
    """Longest answer, in tokens."""
    dtype: str
    """Type of the weights: a name in `torch`, such as `bfloat16`."""


@dataclass(frozen=True)
class Row:
    """Answers of one way, compared with the reference's."""

    way: str
    asked: int = 0
    equal: int = 0
    difference: str = ""
    """The first answer that differs: question, token, and both texts."""
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    note: str = ""
    """Reason why the way was not taken or failed, or a remark on it."""
    failed: bool = False

    @property
    def good(self) -> bool:
        """Whether nothing is known against this way: it was not taken, or all its answers are equal."""
        return not self.failed and self.equal == self.asked


@dataclass(frozen=True)
class Asked:
    """Questions of a check."""

    questions: list[Question]
    messages: list[list[dict[str, Any]] | None]
    """Chat messages with the same prompt; None where there are none."""

    @property
    def sendable(self) -> list[int]:
        """Numbers of the questions that can be asked as a chat request."""
        return [number for number, messages in enumerate(self.messages) if messages is not None]


def prepare_questions(settings: CheckSettings, manifest: Manifest, template: str, tokenizer: Any) -> Asked:
    """Read the questions, and their chat messages where the export's own template renders the same prompt.

    Raises ValueError if there is no question or an image cannot be read.
    """
    asked = list(islice(questions(manifest, template), settings.questions))
    if not asked:
        raise ValueError(f"{settings.data}: no record has an answer to generate")
    for path in dict.fromkeys(path for question in asked for path in question.images):
        image_size(path)
    found: list[list[dict[str, Any]] | None] = []
    for question in asked:
        try:
            messages = messages_of(template, question.prompt, question.images)
        except ValueError:
            messages = []
        found.append(messages if messages and renders(tokenizer, messages, question.prompt) else None)
    return Asked(asked, found)


def renders(tokenizer: Any, messages: Sequence[dict[str, Any]], prompt: str) -> bool:
    """Whether the tokenizer has a chat template that makes this prompt of the messages."""
    if not tokenizer.chat_template:
        return False
    parts = template_messages(messages)
    rendered = tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
    return bool(rendered.replace(IMG_CONTEXT, IMAGE) == prompt)


def run_program(command: Sequence[str], job: Mapping[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """Run a program on a job file, with the paths of job and result as its last arguments; returns the result.

    Raises ServerError with the last line of its output if it fails.
    """
    source, target, log = (folder / f"{name}.{kind}" for kind in ("job.json", "answers.json", "log"))
    source.write_text(json.dumps(job), encoding="utf-8")
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, str(source), str(target)], stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait()
        finally:  # Ctrl-C
            process.kill()
            process.wait()
    if code or not target.is_file():
        raise ServerError(f"ended with code {code}: {last_line(log)}")
    result: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return result


class ExportCheck:
    """One check of an export, a way after the other.

    Args:
        settings: of the command.
        asked: the questions.
        tokenizer: of the export.
        folder: for jobs, results and logs of the programs.
    """

    def __init__(self, settings: CheckSettings, asked: Asked, tokenizer: Any, folder: Path) -> None:
        self.settings, self.asked, self.tokenizer, self.folder = settings, asked, tokenizer, folder
        self.results: dict[str, dict[str, Any]] = {}
        """Result of each way that ran, in the form of local_answers.py."""
        self.kind = str(read_config(settings.hf).get("model_type"))

    def rows(self) -> Iterator[Row]:
        """Rows of the table as the ways end, the reference first; after a failure of that there are no others."""
        for way in (REFERENCE, *(way for way in self.settings.ways if way != REFERENCE)):
            reason = self.reason_against(way)
            row = Row(way, note=reason) if reason else self._row(way)
            yield row
            if way == REFERENCE and row.failed:
                return

    def reason_against(self, way: str) -> str:
        """Reason why a way cannot be taken here, with the remedy; "" if it can."""
        if way in ("generate", "serve") and self.kind == "internvl_chat":
            return (
                "not possible: released names, for which transformers has no class; export with --remote-code"
            )
        if way == "serve" and (missing := missing_packages()):
            return f"not installed: {', '.join(missing)}; {REMEDY}"
        if way == "vllm" and self.settings.vllm_python is None:
            return "not installed here: --vllm-python names the Python of an environment with vLLM"
        if way in ("serve", "vllm") and not self.asked.sendable:
            return "not possible: the directory's chat template renders none of the questions' prompts, or is missing"
        return ""

    def _row(self, way: str) -> Row:
        chat = way in ("serve", "vllm")
        numbers = self.asked.sendable if chat else list(range(len(self.asked.questions)))
        try:
            result = self.results[way] = self._answers(way, numbers)
        except ServerError as error:
            return Row(way, note=f"failed: {error}", failed=True)
        left = len(self.asked.questions) - len(numbers)
        note = f"{left} questions left out: the chat template renders another prompt" if left else ""
        equal, difference = self._compare(result["answers"], numbers)
        speed = result["answer_tokens"] / max(result["seconds"], 1e-9)
        return Row(way, len(numbers), equal, difference, speed, result["peak_bytes"], note)

    def _answers(self, way: str, numbers: Sequence[int]) -> dict[str, Any]:
        s = self.settings
        job: dict[str, Any] = {
            "way": way, "hf": str(s.hf), "dtype": s.dtype, "max_new_tokens": s.max_new_tokens,
            "batch_size": s.batch_size,
        }  # fmt: skip
        chosen = [self.asked.questions[number] for number in numbers]
        messages = [self.asked.messages[number] or [] for number in numbers]
        if way == "serve":
            log = self.folder / "serve.log"
            return answers_of_server(job | {"messages": messages}, log, str(platform.device()))
        if way == "vllm":
            longest = max(self.results[REFERENCE]["prompt_tokens"][number] for number in numbers)
            job |= {
                "messages": [with_data(own) for own in messages],
                "max_model_len": -(-(longest + s.max_new_tokens) // 64) * 64,
                "images": max(1, *(len(question.images) for question in chosen)),
                "trust_remote_code": self.kind != "internvlx",
            }
            assert s.vllm_python is not None
            return run_program([str(s.vllm_python), str(vllm_answers.__file__)], job, self.folder, way)
        job["questions"] = [{"prompt": q.prompt, "images": list(q.images)} for q in chosen]
        program = "megatron_internvlx.evaluation.local_answers"
        return run_program([sys.executable, "-m", program], job, self.folder, way)

    def _compare(self, answers: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> tuple[int, str]:
        """(number of answers equal to the reference's, description of the first other one)."""
        equal, first = 0, ""
        for answer, number in zip(answers, numbers, strict=True):
            expected = self.results[REFERENCE]["answers"][number]
            same_ids = (
                None in (answer["tokens"], expected["tokens"]) or answer["tokens"] == expected["tokens"]
            )
            if same_ids and answer["text"] == expected["text"]:
                equal += 1
            elif not first:
                first = self._difference(number, expected, answer)
        return equal, first

    def _difference(self, number: int, expected: Mapping[str, Any], answer: Mapping[str, Any]) -> str:
        ids = [expected["tokens"], answer["tokens"]]
        if None in ids:  # a server tells only the text
            ids = [
                self.tokenizer(a["text"], add_special_tokens=False)["input_ids"] for a in (expected, answer)
            ]
        pairs = zip(*ids, strict=False)
        at = next((at for at, (a, b) in enumerate(pairs) if a != b), min(map(len, ids)))
        texts = [repr(a["text"])[:60] for a in (answer, expected)]
        return f"question {number}, token {at}: {texts[0]} instead of {texts[1]}"


def check_export(settings: CheckSettings, manifest: Manifest, folder: Path) -> ExportCheck:
    """Prepare a check; its `rows` run it.

    Args:
        settings: export, questions and ways.
        manifest: records of the data.
        folder: existing directory for the programs' files.

    Raises:
        ValueError: an export that cannot be loaded, or questions that cannot be asked.
    """
    template = conversation_template(settings.hf)
    tokenizer = load_tokenizer(settings.hf)
    return ExportCheck(
        settings, prepare_questions(settings, manifest, template, tokenizer), tokenizer, folder
    )


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of the table of all ways, and below it what differs and why."""
    lines = [f"{'way':24} {'equal answers':>14} {'tokens/s':>9} {'peak memory':>12}  first difference"]
    for row in rows:
        name = WAYS[row.way]
        if not row.asked:
            lines.append(f"{name:24} {row.note}")
            continue
        equal = "reference" if row.way == REFERENCE else f"{row.equal} / {row.asked}"
        speed = f"{row.tokens_per_second:.1f}" if row.tokens_per_second is not None else "?"
        memory = f"{row.peak_bytes / 1e6:,.0f} MB" if row.peak_bytes else "?"
        nothing = "" if row.way == REFERENCE else "none"
        rest = "; ".join(filter(None, (row.difference or nothing, row.note)))
        lines.append(f"{name:24} {equal:>14} {speed:>9} {memory:>12}  {rest}".rstrip())
    return lines


def report(check: ExportCheck, rows: Sequence[Row]) -> dict[str, Any]:
    """Content of the file of `--json`: settings, rows, and every answer of every way."""
    s = check.settings
    answers = {way: [answer["text"] for answer in found["answers"]] for way, found in check.results.items()}
    return {
        "hf": str(s.hf),
        "data": str(s.data),
        "questions": len(check.asked.questions),
        "sendable": check.asked.sendable,
        "dtype": s.dtype,
        "max_new_tokens": s.max_new_tokens,
        "batch_size": s.batch_size,
        "rows": [asdict(row) for row in rows],
        "answers": answers,
    }
