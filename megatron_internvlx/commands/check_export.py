"""`ivlx check-export`: the same answers wherever an export is used."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_internvlx.checkpoint.checks import check_model_directory
from megatron_internvlx.commands.help import CommandParser
from megatron_internvlx.commands.values import int_in_range
from megatron_internvlx.config import settings_from
from megatron_internvlx.data.rejects import BadSample
from megatron_internvlx.exit_codes import DONE, FAILED, INTERRUPTED, MISTAKE
from megatron_internvlx.files import write_atomically

WAYS = ("generate", "serve", "vllm")


def parser() -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    it = CommandParser(
        "check-export",
        "Ask an export the same held-out questions in every way in which it is used, and compare the answers.",
        about="The ways: ivlx evaluate, transformers' generate with the arguments of evaluation harnesses, a "
        "transformers serve process over HTTP, and vLLM. The table shows equal answers, the first token that differs, "
        "tokens per second, and the memory of the process. It runs code of the directory.",
        examples=(
            "ivlx check-export demo-model --data runs/demo/data/meta_val.json",
            "ivlx check-export demo-model --data meta_val.json --vllm-python .venv-vllm/bin/python --json check.json",
        ),
        exits={
            DONE: "all answers are equal; a way that is not installed does not count, unless --ways names it",
            FAILED: "an answer differs, a way failed, or one of --ways was not taken",
            MISTAKE: "wrong arguments or files, with one message",
            INTERRUPTED: "Ctrl-C",
        },
    )
    add = it.add_argument
    add("hf", type=Path, metavar="DIR", help="exported directory")
    add("--data", type=Path, metavar="FILE", required=True, help="InternVL meta.json of the questions")
    add("--questions", type=int_in_range(1), default=100, help="number of questions at most")
    add(
        "--ways",
        nargs="+",
        choices=WAYS,
        help="ways to compare with ivlx evaluate (unset: all that can be taken)",
    )
    add("--vllm-python", type=Path, metavar="PATH", help="Python of an environment with vLLM (docs/vllm.md)")
    add("--batch-size", type=int_in_range(1), default=8, help="questions together, in evaluate and vLLM")
    add("--max-new-tokens", type=int_in_range(1), default=64, help="tokens per answer")
    types = ("float32", "bfloat16", "float16")
    add("--dtype", choices=types, default="float32", help="type of the weights")
    add("--json", type=Path, metavar="FILE", help="file for the table and all answers")
    return it


def check_paths(options: argparse.Namespace) -> None:
    """Check inputs and outputs before PyTorch is loaded. Raises ValueError."""
    check_model_directory("DIR", options.hf)
    python = options.vllm_python
    if python is not None and not (python.is_file() and os.access(python, os.X_OK)):
        raise ValueError(f"--vllm-python {python}: no program that can be run")
    if options.json is not None and options.json.is_dir():
        raise ValueError(f"--json {options.json}: a directory, not a file")


def main(argv: Sequence[str] | None = None) -> int:
    """Check; returns the exit code."""
    options = parser().parse_args(argv)
    from megatron_internvlx.data.manifest import Manifest

    try:
        check_paths(options)
        manifest = Manifest(options.data)
        print("ivlx check-export: loading PyTorch ...", file=sys.stderr, flush=True)
        # Imported late: this takes seconds, on a busy machine half a minute.
        from megatron_internvlx.evaluation.export_check import CheckSettings, check_export, report, table

        named = options.ways is not None
        options.ways = tuple(options.ways or WAYS)
        with tempfile.TemporaryDirectory(prefix="check-export-") as folder:
            check = check_export(settings_from(options, CheckSettings), manifest, Path(folder))
            rows = []
            for row in check.rows():
                rows.append(row)
                print("\n".join(table([row])[len(rows) > 1 :]), flush=True)
            if options.json is not None:
                write_atomically(options.json, json.dumps(report(check, rows), indent=1) + "\n")
    except (BadSample, OSError, ValueError) as error:
        print(f"ivlx check-export: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return DONE if all(row.good and (row.asked or not named) for row in rows) else FAILED
