"""`recipe.yaml` of an import: the model, its checkpoint, and commented settings for fine-tuning."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_internvlx.data.rvtc import MEANINGS

# (setting, value in YAML, comment), with the values of the fine-tuning recipes in examples/recipes.
_FINE_TUNE = (
    (
        "Length. One epoch: train_iters = records / global_batch_size.",
        (
            ("global_batch_size", "128", "samples per step, over all GPUs"),
            ("micro_batch_size", "1", "samples per forward pass of a GPU"),
            ("train_iters", "1000", "steps; with 128 samples each that is 128,000 samples"),
        ),
    ),
    (
        "Optimizer",
        (
            ("lr", "2.0e-5", "highest learning rate, after the warm-up"),
            ("min_lr", "1.0e-6", "learning rate at the end"),
            ("lr_decay_style", "cosine", "shape of the decay"),
            ("lr_warmup_fraction", "0.03", "share of the steps in which the learning rate rises from 0"),
            ("weight_decay", "0.05", "not for biases and norms"),
            ("adam_beta2", "0.999", "Adam's decay of the second moment"),
            ("clip_grad", "1.0", "largest norm of the gradient"),
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
            ("auto_resume", "true", "the same command resumes from the newest checkpoint in --save"),
            ("exit_signal_handler", "true", "save a checkpoint on SIGTERM"),
            ("log_interval", "10", "steps between lines of the log"),
        ),
    ),
)


def fine_tune_settings() -> dict[str, Any]:
    """Settings for fine-tuning, as parsed by YAML."""
    return {name: yaml.safe_load(value) for _, lines in _FINE_TUNE for name, value, _ in lines}


def recipe_text(arguments: Mapping[str, Any], source: Path) -> str:
    """Text of recipe.yaml.

    Args:
        arguments: settings of the model and its checkpoint, from `importer.recipe_of`.
        source: Hugging Face directory, named in the heading.
    """
    lines = [
        *_comment(
            f"Import of {source.name}. The command line overrides these settings, for example --lr 1e-5."
        ),
        *_comment(
            "Several GPUs: torchrun --nproc-per-node N pretrain_vlm.py ... For a model too large for one GPU set "
            "tensor_model_parallel_size, pipeline_model_parallel_size and use_distributed_optimizer as in "
            "examples/recipes; --dry-run --dry-run-world-size N shows the memory."
        ),
    ]
    for title, settings in _FINE_TUNE:
        lines += ["", *_comment(title)]
        lines += [_line(name, value, what) for name, value, what in settings]
    lines += ["", *_comment("Model and checkpoint")]
    for name in sorted(arguments):
        text = yaml.safe_dump({name: arguments[name]}, width=10**6).rstrip("\n")
        lines.append(f"{text}  # {_rule(arguments[name])}" if name == "rvtc" else text)
    return "\n".join(lines) + "\n"


def _rule(policy: str) -> str:
    other = "; edge: RVTC, as in the released InternVL-X" if policy == "off" else ""
    return MEANINGS[policy] + other


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="# ")


def _line(name: str, value: str, what: str) -> str:
    return f"{name}: {value}".ljust(28) + f"# {what}"
