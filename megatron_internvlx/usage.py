"""The short help of `pretrain_vlm.py --help`: one line per commonly set flag, without importing Megatron.

`--help-all` uses Megatron's parser and lists every argument.
"""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from megatron_internvlx.config import SETTINGS
from megatron_internvlx.ranks import is_first_rank

FLAG_WIDTH = 34
HEAD = """\
usage: torchrun --nproc-per-node RANKS pretrain_vlm.py --recipe FILE [--NAME VALUE ...]

Values come from the model preset, then the recipe (examples/recipes/), then the command line; the last one wins.
--dry-run checks a run on any number of GPUs and prints its memory. --help-all lists all of Megatron's arguments too.
"""
_TITLES = {
    "VisionSettings": "Vision encoder",
    "CompressionSettings": "Compression of visual tokens",
    "TrainSettings": "Model, precision and what is trained",
    "LoraSettings": "Adapters (LoRA)",
    "DataSettings": "Data",
    "RunSettings": "Checks, resuming and tracking",
}
# Megatron's arguments that users commonly set; tests/unit/test_usage.py checks their defaults.
MEGATRON: dict[str, tuple[tuple[str, str, str], ...]] = {
    "Batches, steps and the optimizer (Megatron's)": (
        ("seq_length", "INT", "Tokens of a sample, or of a pack with --packing."),
        ("micro_batch_size", "INT", "Samples of a forward pass; 1 with --packing."),
        (
            "global_batch_size",
            "INT",
            "Samples (packs) of a step. Unset: one micro-batch per data-parallel rank.",
        ),
        (
            "train_iters",
            "INT",
            "Steps; or --epochs, or --train-samples. A larger number continues a finished run.",
        ),
        ("lr", "FLOAT", "Peak of the learning rate."),
        ("min_lr", "FLOAT", "Learning rate at the end of the decay."),
        ("lr_decay_style", "NAME", "constant, linear, cosine, inverse-square-root or WSD."),
        ("lr_warmup_fraction", "FLOAT", "Share of the steps that warm up; or --lr-warmup-iters."),
        ("weight_decay", "FLOAT", "For all weights except biases and one-dimensional ones."),
        ("adam_beta2", "FLOAT", "Decay of the running second moment."),
        ("clip_grad", "FLOAT", "Largest norm of the gradient. 0: not clipped."),
        ("seed", "INT", "Random seed of weights, data order and drop path."),
    ),
    "Layout and memory (Megatron's)": (
        ("tensor_model_parallel_size", "INT", "TP: ranks that share a layer, inside a node."),
        ("pipeline_model_parallel_size", "INT", "PP: stages of layers. TP x PP x replicas = ranks."),
        (
            "pipeline_model_parallel_layout",
            "TEXT",
            "Layers of each stage; ivlx plan writes one.",
        ),
        ("expert_model_parallel_size", "INT", "EP: ranks that share the experts."),
        ("sequence_parallel", "", "Split the rows between layers over the TP ranks."),
        ("use_distributed_optimizer", "", "Split the optimizer's state over the replicas."),
        (
            "recompute_granularity",
            "NAME",
            "full or selective recomputation in the backward pass. Unset: none.",
        ),
    ),
    "Checkpoints, evaluation and log (Megatron's)": (
        ("tokenizer_model", "DIR", "Hugging Face tokenizer directory."),
        ("save", "DIR", "Directory for checkpoints and all other files of the run."),
        ("save_interval", "INT", "Steps between two checkpoints."),
        ("pretrained_checkpoint", "DIR", "Import or earlier run whose weights the first start loads."),
        ("eval_interval", "INT", "Steps between two evaluations."),
        ("log_interval", "INT", "Steps between two lines of the log."),
        ("exit_signal_handler", "", "On SIGTERM or SIGUSR1, save a checkpoint and exit."),
    ),
}
# The defaults of `arguments.OUR_DEFAULTS` and Megatron; flags not listed are unset or off.
DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 1,
    "min_lr": 0.0,
    "lr_decay_style": "linear",
    "weight_decay": 0.01,
    "adam_beta2": 0.999,
    "clip_grad": 1.0,
    "seed": 1234,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "eval_interval": 1000,
    "log_interval": 10,
}


class Formatter(argparse.HelpFormatter):
    """Help formatter that prints a text unchanged if % formatting fails, as on a stray `10%`."""

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            return action.help or ""


def help_requested(argv: Sequence[str]) -> bool:
    """Whether the command line asks for the short help."""
    return any(word in ("-h", "--help") for word in argv)


def field_docstrings(settings: type) -> dict[str, str]:
    """Map each field to the docstring below it, its help text, like Megatron's ArgumentGroupFactory."""
    (body,) = ast.parse(inspect.getsource(settings)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _value_name(kind: Any) -> str:
    """Placeholder for a flag's value: the choices or the type; "" for a switch."""
    arguments = [one for one in get_args(kind) if one is not type(None)]
    if get_origin(kind) is Literal:
        return "|".join(map(str, arguments))
    if get_origin(kind) is list:
        return f"{_value_name(arguments[0])} ..."
    if arguments:
        return _value_name(arguments[0])
    return {bool: "", int: "INT", float: "FLOAT"}.get(kind, "TEXT")


def _flag_line(name: str, value: str, text: str, default: Any) -> str:
    flag = f"  --{name.replace('_', '-')} {value}".rstrip()
    if "|" in value and len(flag) > FLAG_WIDTH:
        named = all(choice in text for choice in value.split("|"))
        return _flag_line(name, "NAME", text if named else f"{text} {value.replace('|', ', ')}.", default)
    shown = "" if default is None or default is False else f" [{default}]"
    return f"{flag.ljust(FLAG_WIDTH)}  {text}{shown}"


class Row(NamedTuple):
    """A commonly set argument."""

    name: str
    value: str
    """Placeholder of its value; "" for a switch."""
    text: str
    default: Any


def groups() -> Iterator[tuple[str, list[Row]]]:
    """(title, rows) of the arguments that the short help shows, in its order."""
    for title, lines in MEGATRON.items():
        yield title, [Row(name, value, text, DEFAULTS.get(name)) for name, value, text in lines]
    for settings in SETTINGS:
        kinds, texts = get_type_hints(settings), field_docstrings(settings)
        rows = [
            Row(field.name, _value_name(kinds[field.name]), texts.get(field.name, ""), field.default)
            for field in fields(settings)
        ]
        yield _TITLES.get(settings.__name__, settings.__name__), rows


def help_lines() -> Iterator[str]:
    """Lines of the short help."""
    yield from HEAD.splitlines()
    for title, rows in groups():
        yield f"\n{title}"
        yield from (_flag_line(*row) for row in rows)
    yield "\nRecipes"
    yield _flag_line("recipe", "FILE", "Flat YAML file of arguments; the command line overrides it.", None)
    yield _flag_line("without", "NAME ...", "Ignore these settings of the recipe, such as packing.", None)


def print_help() -> int:
    """Print the short help on rank 0; returns the exit code."""
    if is_first_rank():
        print("\n".join(help_lines()))
    return 0
