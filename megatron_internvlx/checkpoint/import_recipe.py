"""`recipe.yaml` of an import: the model, where it begins, and settings to fine-tune it with, each explained."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

# (setting, value as it is written, what it is). The values are those of examples/recipes for a fine-tune.
_FINE_TUNE = (
    (
        "Length. Sets of one pass: train_iters = records / global_batch_size.",
        (
            ("global_batch_size", "128", "samples per step, over all GPUs"),
            ("micro_batch_size", "1", "samples that a GPU computes together"),
            ("train_iters", "1000", "steps; with 128 samples each that is 128,000 samples"),
        ),
    ),
    (
        "Optimizer",
        (
            ("lr", "2.0e-5", "highest learning rate, after the warm-up"),
            ("min_lr", "1.0e-6", "the last one"),
            ("lr_decay_style", "cosine", "how it gets from one to the other"),
            ("lr_warmup_fraction", "0.03", "share of the steps in which it rises from 0"),
            ("weight_decay", "0.05", "not of biases and norms"),
            ("adam_beta2", "0.999", "of Adam"),
            ("clip_grad", "1.0", "largest norm of all gradients together"),
            (
                "loss_weighting",
                "square",
                "an answer of n tokens counts as sqrt(n); token: as n; sample: as 1",
            ),
        ),
    ),
    (
        "Running",
        (
            ("save_interval", "200", "steps between checkpoints, in --save"),
            ("auto_resume", "true", "the same command goes on from the newest checkpoint in --save"),
            ("exit_signal_handler", "true", "SIGTERM leads to a checkpoint first"),
            ("log_interval", "10", "steps between lines of the log"),
        ),
    ),
)
_RVTC = {
    "area": "tiles by RVTC: no more than the image has pixels for",
    "edge": "tiles by RVTC: no more columns and rows than the image has pixels for",
    "off": "tiles by InternVL's rule; area: by RVTC, which makes fewer tiles of small images",
}


def fine_tune_settings() -> dict[str, Any]:
    """The settings beside the model, as YAML reads them."""
    return {name: yaml.safe_load(value) for _, lines in _FINE_TUNE for name, value, _ in lines}


def recipe_text(arguments: Mapping[str, Any], source: Path) -> str:
    """The file.

    Args:
        arguments: of the model and its start, from `importer.recipe_of`.
        source: the Hugging Face directory, for the heading.
    """
    lines = [
        *_comment(
            f"{source.name}, imported. A run's command line overrides what is here, such as --lr 1e-5."
        ),
        *_comment(
            "Several GPUs: torchrun --nproc-per-node N pretrain_vlm.py ...; a model that one GPU does not hold: "
            "tensor_model_parallel_size, pipeline_model_parallel_size and use_distributed_optimizer, as in "
            "examples/recipes; --dry-run --dry-run-world-size N says what fits."
        ),
    ]
    for title, settings in _FINE_TUNE:
        lines += ["", *_comment(title)]
        lines += [_line(name, value, what) for name, value, what in settings]
    lines += ["", *_comment("The model, and where it begins")]
    for name in sorted(arguments):
        text = yaml.safe_dump({name: arguments[name]}, width=10**6).rstrip("\n")
        lines.append(f"{text}  # {_RVTC[arguments[name]]}" if name == "rvtc" else text)
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="# ")


def _line(name: str, value: str, what: str) -> str:
    return f"{name}: {value}".ljust(28) + f"# {what}"
