"""Printed summary of an import: new tensors, unused tensors, and the command to train it."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from megatron_internvlx.checkpoint.checks import has_tokenizer, tokenizer_is_code
from megatron_internvlx.checkpoint.importer import NOTES, RECIPE, SIDE, ImportPlan

_INJECTION = re.compile(r"^language_model\.decoder\.layers\.(\d+)\.injection\.")


def model_part(name: str) -> str:
    """Part of the model to which a tensor belongs, by its name (ours or Hugging Face's)."""
    if match := _INJECTION.match(name):
        return f"projector of layer {match[1]}"
    if name.startswith("lvtc_projectors."):
        return f"projector of layer {name.split('.')[1]}"
    head, _, rest = name.removeprefix("model.").partition(".")
    return f"{head}.{rest.partition('.')[0]}" if head == "language_model" else head


def count_by_part(names: Iterable[str]) -> str:
    """Number of tensors per part, such as `projector 27, projector of layer 8 27`, in the order of the names."""
    return ", ".join(f"{part} {count}" for part, count in Counter(map(model_part, names)).items())


def import_summary(
    plan: ImportPlan, save: Path, *, everything: bool = False, compressed: bool = False
) -> list[str]:
    """Lines of the summary.

    Args:
        plan: plan of the finished import.
        save: checkpoint that it has written.
        everything: list the names of tensors that were initialised or not taken over.
        compressed: the user chose other compression settings than the directory's.
    """
    lines = []
    for title, names in (
        (
            "initialised (norms 1, biases 0, cls_scale normal, matrices uniform in 1/sqrt(columns))",
            plan.initialised,
        ),
        ("not used", plan.unused),
        ("not stored, because they are computed from the configuration", plan.derived),
    ):
        if names:
            lines.append(f"{len(names)} tensors {title}: {count_by_part(names)}")
            lines += [f"  {name}" for name in names if everything]
    if (plan.initialised or plan.unused or plan.derived) and not everything:
        lines.append(f"their names are in {save / SIDE / NOTES}; --list-tensors prints them")
    lines += plan.config.remarks
    rvtc = plan.config.arguments["rvtc"]
    if compressed and rvtc == "off":
        lines.append(
            "rvtc is off, as in the directory: images are cut by InternVL's rule. For RVTC, as in the released "
            f"InternVL-X, set rvtc: edge in {save / RECIPE}, or --rvtc edge"
        )
    if tokenizer_is_code(save / SIDE):
        lines.append(
            "the directory's tokenizer is Python code, which training does not run: set --tokenizer-model to a "
            "directory with the same tokenizer as tokenizer.json"
        )
    lines.append(f"{save}: {len(plan.sources)} tensors, {plan.nbytes / 1e9:.2f} GB")
    lines += ["train with (meta.json lists the data, see docs/data.md):", f"  {training_command(save)}"]
    return lines


def training_command(save: Path) -> str:
    """Complete shell command for training, with placeholders for unknown paths."""
    words = ["python", "pretrain_vlm.py", "--recipe", str(save / RECIPE), "--data", "meta.json"]
    words += ["--save", str(save.with_name(f"{save.name}-trained"))]
    if not has_tokenizer(save / SIDE):  # the recipe names this directory
        words += ["--tokenizer-model", "TOKENIZER_DIRECTORY"]
    return shlex.join(words)
