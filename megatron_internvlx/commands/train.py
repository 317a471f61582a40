"""`ivlx train`: pretrain_vlm.py in this process, or on several ranks of this machine."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_internvlx import usage
from megatron_internvlx.commands.help import CommandParser
from megatron_internvlx.commands.layout_words import fewest_ranks, layout_sizes
from megatron_internvlx.commands.programs import training_program
from megatron_internvlx.commands.values import int_in_range
from megatron_internvlx.exit_codes import (
    DONE,
    FAILED,
    IN_USE,
    INTERRUPTED,
    MISTAKE,
    SAVE_FAILED,
    STOP,
    TERMINATED,
)
from megatron_internvlx.ranks import is_launched, visible_cards

MOST_RANKS = 4096
OTHER_NAMES = (
    "--gpus",
    "--nproc",
    "--nproc-per-node",
    "--num-gpus",
    "--rank",
    "--world-size",
)  # of other programs
EXITS = {
    DONE: "done, or stopped after a checkpoint, on request",
    FAILED: "an error of the program",
    MISTAKE: "wrong arguments, files or data, with one message",
    SAVE_FAILED: "no space on the disk for the last checkpoint",
    STOP: "the run cannot continue by itself",
    IN_USE: "another run uses the same --save",
    INTERRUPTED: "Ctrl-C",
    TERMINATED: "SIGTERM, on several ranks",
}


def parser() -> argparse.ArgumentParser:
    """Create the parser for help and completion; pretrain_vlm.py parses the arguments, with Megatron's."""
    it = CommandParser(
        "train",
        "Train from a recipe: in one process on the CPU, or on every GPU of this machine.",
        about="Values come from the model preset, then the recipe (examples/recipes/), then the command line; the last "
        "one wins. --help-all lists all of Megatron's arguments too. Under torchrun and SLURM this is pretrain_vlm.py, "
        "one rank of the run.",
        examples=(
            "ivlx train --recipe RECIPE.yaml --data meta.json --tokenizer-model DIR --save run1",
            "ivlx train --recipe RECIPE.yaml ... --ranks 2 --pipeline-model-parallel-size 2   # two CPU processes",
            "ivlx train --recipe RECIPE.yaml ... --auto-resume                                # continue a run",
        ),
        exits=EXITS,
        rest="[--NAME VALUE ...]",
    )
    _add_start(it, "processes to start on this machine (unset: one per visible GPU, on the CPU 1)")
    add_run_arguments(it)
    return it


def _add_start(it: argparse.ArgumentParser, ranks: str) -> None:
    start = it.add_argument_group("Start")
    start.add_argument("--recipe", metavar="FILE", help="flat YAML file of arguments")
    start.add_argument("--without", metavar="NAME", nargs="+", help="ignore these settings of the recipe")
    start.add_argument("--ranks", type=int_in_range(1, MOST_RANKS), help=ranks)
    start.add_argument("--help-all", action="store_true", help="list all arguments, Megatron's too")


def add_run_arguments(it: argparse.ArgumentParser) -> None:
    """Add the usual arguments of pretrain_vlm.py, in its groups."""
    for title, rows in usage.groups():
        group = it.add_argument_group(title)
        for row in rows:
            flag = f"--{row.name.replace('_', '-')}"
            text = row.text.replace("%", "%%")
            if row.value == "":
                group.add_argument(flag, action="store_true", default=row.default, help=text)
            else:
                words = "|" in row.value and len(row.value) > usage.FLAG_WIDTH - len(flag)
                group.add_argument(
                    flag, metavar="NAME" if words else row.value, default=row.default, help=text
                )


def split_ranks(command: str, words: Sequence[str], most: int) -> tuple[int | None, list[str]]:
    """(number after `--ranks` or None, all other words). A wrong number ends the program with code 2."""
    own = CommandParser(command, "", add_help=False, rest="[--NAME VALUE ...]")
    own.add_argument("--ranks", type=int_in_range(1, most))
    options, rest = own.parse_known_args(list(words))
    if wrong := [word for word in rest if word.partition("=")[0] in OTHER_NAMES]:
        own.error(f"unknown option {wrong[0]}: did you mean --ranks?")
    return options.ranks, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    ranks, rest = split_ranks("train", sys.argv[1:] if argv is None else argv, MOST_RANKS)
    try:
        program = training_program()
        if is_launched() and ranks is not None:
            raise ValueError("--ranks starts processes, and a launcher has done that already: remove it")
        cards = 0 if is_launched() or ranks else visible_cards()
        alone = is_launched() or "--dry-run" in rest or "--help-all" in rest
        ranks = 1 if alone else ranks or max(cards, 1)
        if not alone:
            _check_layout(ranks, rest)
    except ValueError as error:
        print(f"ivlx train: {error}", file=sys.stderr)
        return MISTAKE
    if ranks == 1:
        return run_here(program, rest)
    by = "one per GPU; --ranks 1 starts one only" if cards else "--ranks"
    print(f"ivlx train: {ranks} ranks ({by})", file=sys.stderr, flush=True)
    from megatron_internvlx import launch

    if not visible_cards():  # else every rank would use all cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    return launch.main(["--standalone", "--nproc-per-node", str(ranks), program, *rest])


def _check_layout(ranks: int, words: Sequence[str]) -> None:
    """Compare the number of ranks with what the layout needs. Raises ValueError with the remedy."""
    sizes = layout_sizes(words)
    if sizes is not None and ranks < (needed := fewest_ranks(sizes)):
        tensor, pipeline = sizes["tensor_model_parallel_size"], sizes["pipeline_model_parallel_size"]
        raise ValueError(
            f"the layout needs at least {needed} ranks (TP {tensor} x PP {pipeline}), and {ranks} would be started: "
            f"--ranks {needed} starts more on this machine, and a smaller layout, such as "
            "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1, needs fewer"
        )


def run_here(program: str, words: Sequence[str]) -> int:
    """Run pretrain_vlm.py in this process with these arguments; returns the exit code."""
    import pretrain_vlm

    sys.argv = [program, *words]
    return pretrain_vlm.main()
