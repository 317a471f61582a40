#!/usr/bin/env python
"""Run an exported model in lmms-eval or VLMEvalKit: on local records, or on tasks that the harness downloads.

In the environment of `tools/eval_env.sh`:
`.venv-eval/bin/python tools/run_harness.py lmms-eval --hf DIR --data meta.json`.

With local records it asks what `ivlx evaluate` asks, through the harness's own loop, and writes `answers.jsonl`;
`--expect` compares them with a predictions.jsonl of `ivlx evaluate`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_internvlx.checkpoint.checks import check_model_directory
from megatron_internvlx.commands.evaluate import positive_int
from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.evaluation.metrics import METRICS
from megatron_internvlx.exit_codes import DONE, FAILED, MISTAKE
from megatron_internvlx.files import write_atomically

MODULES = {"lmms-eval": "lmms_eval", "vlmevalkit": "vlmeval"}
# Neither harness may reach a hub for local records, nor write outside of --out.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
FOLDERS = {"HF_HOME": "cache/hf", "LMUData": "cache/vlmevalkit"}


def parser() -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    it = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="with --tasks, arguments after -- are passed to the harness's own command",
    )
    add = it.add_argument
    add("harness", choices=tuple(MODULES))
    add("--hf", type=Path, metavar="DIR", required=True, help="directory of the model")
    what = it.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, metavar="FILE", help="InternVL meta.json of local records")
    what.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks of the harness, which it downloads")
    add("--out", type=Path, metavar="DIR", default=Path("harness"), help="directory to write")
    add("--limit", type=positive_int, metavar="INT", help="maximum number of records (unset: all)")
    add("--metric", choices=tuple(METRICS), help="metric of all local answers (unset: that of each record)")
    add(
        "--batch-size",
        type=positive_int,
        default=8,
        metavar="INT",
        help="answers per batch; VLMEvalKit has 1",
    )
    add(
        "--max-new-tokens",
        type=positive_int,
        metavar="INT",
        help="tokens per answer (unset: 64 locally, else 1024)",
    )
    add("--max-tiles", type=positive_int, metavar="INT", help="tiles per image (unset: as in training)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="type of the weights")
    add("--expect", type=Path, metavar="FILE", help="predictions.jsonl of ivlx evaluate to compare with")
    return it


def run_lmms_eval(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> list[str]:
    """Answers to local rows through lmms-eval's evaluator."""
    from lmms_eval import evaluator
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager

    from megatron_internvlx.harness.local_task import TASK, write_task

    folder = options.out / "task"
    write_task(folder, rows, options.max_new_tokens)
    model = get_model("internvlx")(
        str(options.hf), options.batch_size, dtype=options.dtype, max_tiles=options.max_tiles
    )
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = evaluator.simple_evaluate(
        model, tasks=[TASK], task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
    given = {sample["doc_id"]: sample["resps"][0][0] for sample in found["samples"][TASK]}
    return [given[number] for number in range(len(rows))]


def run_vlmevalkit(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> list[str]:
    """Answers to local rows through VLMEvalKit's loop."""
    from vlmeval.config import supported_VLM
    from vlmeval.inference import infer_data_job

    from megatron_internvlx.harness.local_task import TASK
    from megatron_internvlx.harness.vlmevalkit_model import NAME, LocalDataset, register

    register(
        str(options.hf),
        dtype=options.dtype,
        max_new_tokens=options.max_new_tokens,
        max_tiles=options.max_tiles,
    )
    folder = options.out / "vlmevalkit"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"*{TASK}*"):  # answers of an earlier run, which the kit would take
        old.unlink()
    data = LocalDataset(TASK, rows)
    infer_data_job(supported_VLM[NAME](), str(folder), NAME, data)
    # Not read from the kit's table: a spreadsheet has no "none", nor "".
    return list(data.data["prediction"])


RUNS: dict[str, Callable[[Sequence[Mapping[str, Any]], argparse.Namespace], list[str]]] = {
    "lmms-eval": run_lmms_eval,
    "vlmevalkit": run_vlmevalkit,
}


def keep_offline(out: Path) -> None:
    """Keep a harness from hubs, and its files in `out`; before anything of Hugging Face is imported."""
    folders = {name: (out / path).absolute() for name, path in FOLDERS.items()}
    os.environ.update(OFFLINE | {name: str(folder) for name, folder in folders.items()})
    for folder in folders.values():  # VLMEvalKit uses the home folder where its own is missing
        folder.mkdir(parents=True, exist_ok=True)


def run_local(options: argparse.Namespace) -> int:
    """Ask local records, write and score the answers, and compare them; returns the exit code."""
    keep_offline(options.out)
    from megatron_internvlx.evaluation.answers import questions
    from megatron_internvlx.evaluation.hf_model import conversation_template
    from megatron_internvlx.harness.local_task import local_rows, score_row

    template = conversation_template(options.hf)
    rows = local_rows(questions(Manifest(options.data), template, options.limit, options.metric))
    if not rows:
        raise ValueError(f"{options.data}: no record has an answer to compare with")
    wanted = read_expected(options.expect, rows) if options.expect else None
    options.max_new_tokens = options.max_new_tokens or 64
    given = RUNS[options.harness](rows, options)
    scores = [score_row(row, answer) for row, answer in zip(rows, given, strict=True)]
    lines = [
        {name: row[name] for name in ("key", "question", "expected", "metric")}
        | {"given": answer, "score": score}
        for row, answer, score in zip(rows, given, scores, strict=True)
    ]
    target = options.out / "answers.jsonl"
    write_atomically(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    print(
        f"{options.harness}: {len(rows)} answers in {target}, mean score {100 * sum(scores) / len(scores):.2f} %"
    )
    if wanted is None:
        return DONE
    differing = [number for number, (a, b) in enumerate(zip(wanted, given, strict=True)) if a != b]
    print(f"same as {options.expect}: {len(rows) - len(differing)} of {len(rows)}")
    for number in differing[:10]:
        print(
            f"  {rows[number]['key']} {rows[number]['question']!r}: {wanted[number]!r} -> {given[number]!r}"
        )
    return FAILED if differing else DONE


def read_expected(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Answers of a predictions.jsonl to rows. Raises ValueError if it has other questions."""
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: no predictions.jsonl of ivlx evaluate: {error}") from error
    if not all(isinstance(line, dict) and "given" in line for line in found):
        raise ValueError(f"{path}: no predictions.jsonl of ivlx evaluate: a line has no answer ('given')")
    for number, row in enumerate(rows):
        there = found[number] if number < len(found) else {}
        if [there.get(name) for name in ("key", "question")] != [row["key"], row["question"]]:
            what = repr(there["question"]) if "question" in there else "nothing"
            raise ValueError(
                f"{path}: answer {number + 1} must be to {row['question']!r} of {row['key']}, found {what}; "
                "run ivlx evaluate on the same data"
            )
    return [line["given"] for line in found[: len(rows)]]


def check_task_options(options: argparse.Namespace) -> None:
    """Refuse options that have no effect on the harness's own tasks. Raises ValueError."""
    if not options.tasks:
        return
    unused = ["expect", "metric"] + (["limit"] if options.harness == "vlmevalkit" else [])
    for name in unused:
        if (value := getattr(options, name)) is not None:
            raise ValueError(
                f"--{name} {value}: of no effect with --tasks in {options.harness}; leave it out"
            )


def run_tasks(options: argparse.Namespace, further: Sequence[str]) -> int:
    """Run the harness's own command with its own tasks, and with further arguments; returns the exit code."""
    given = {"dtype": options.dtype, "max_tiles": options.max_tiles, "max_new_tokens": options.max_new_tokens}
    settings = {name: value for name, value in given.items() if value is not None}
    options.out.mkdir(parents=True, exist_ok=True)
    if options.harness == "vlmevalkit":
        from vlmeval.run import main

        from megatron_internvlx.harness.vlmevalkit_model import NAME, register

        register(str(options.hf), **settings)
        sys.argv = ["vlmeval", "--data", *options.tasks, "--model", NAME, "--work-dir", str(options.out)]
    else:
        from lmms_eval.cli.dispatch import main

        arguments = ",".join(
            f"{name}={value}" for name, value in {"pretrained": options.hf, **settings}.items()
        )
        sys.argv = ["lmms-eval", "--model", "internvlx", "--model_args", arguments, "--log_samples"]
        sys.argv += ["--tasks", ",".join(options.tasks), "--batch_size", str(options.batch_size)]
        sys.argv += ["--output_path", str(options.out)]
        sys.argv += ["--limit", str(options.limit)] if options.limit else []
    sys.argv += further
    main()
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a harness; returns the exit code: 0, 1 if answers differ from `--expect`, 2 for a mistake."""
    given = list(sys.argv[1:] if argv is None else argv)
    at = given.index("--") if "--" in given else len(given)
    options, further = parser().parse_args(given[:at]), given[at + 1 :]
    try:
        if further and options.data:
            raise ValueError(
                f"{' '.join(further)}: arguments after -- are for the harness's own command, with --tasks"
            )
        check_task_options(options)
        if importlib.util.find_spec(MODULES[options.harness]) is None:
            raise ValueError(
                f"{options.harness} is not installed here; bash tools/eval_env.sh makes .venv-eval, then: "
                f".venv-eval/bin/python tools/run_harness.py {options.harness} ..."
            )
        check_model_directory("--hf", options.hf)
        return run_local(options) if options.data else run_tasks(options, further)
    except (BadSample, OSError, ValueError) as error:
        print(f"run_harness.py: {error}", file=sys.stderr)
        return MISTAKE


if __name__ == "__main__":
    sys.exit(main())
