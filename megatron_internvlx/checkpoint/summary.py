"""What an import tells its user: what is new, what was left, and the command that trains it."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from megatron_internvlx.checkpoint.checks import has_tokenizer
from megatron_internvlx.checkpoint.importer import NOTES, RECIPE, SIDE, ImportPlan

_INJECTION = re.compile(r"^language_model\.decoder\.layers\.(\d+)\.injection\.")


def model_part(name: str) -> str:
    """The part of the model that a tensor, of ours or of a directory, belongs to."""
    if match := _INJECTION.match(name):
        return f"projector of layer {match[1]}"
    if name.startswith("lvtc_projectors."):
        return f"projector of layer {name.split('.')[1]}"
    head, _, rest = name.removeprefix("model.").partition(".")
    return f"{head}.{rest.partition('.')[0]}" if head == "language_model" else head


def count_by_part(names: Iterable[str]) -> str:
    """`projector 27, projector of layer 8 27`, in the order of the names."""
    return ", ".join(f"{part} {count}" for part, count in Counter(map(model_part, names)).items())


def import_summary(
    plan: ImportPlan, save: Path, *, everything: bool = False, compressed: bool = False
) -> list[str]:
    """Lines for people.

    Args:
        plan: of the import that is done.
        save: the checkpoint it made.
        everything: list the names of tensors that were initialised or not taken over.
        compressed: the import was asked for other compression than the directory's.
    """
    lines = []
    for title, names in (
        (
            "initialised (norms 1, biases 0, cls_scale normal, matrices uniform in 1/sqrt(columns))",
            plan.initialised,
        ),
        ("not used", plan.unused),
        ("not stored, because they follow from the configuration", plan.derived),
    ):
        if names:
            lines.append(f"{len(names)} tensors {title}: {count_by_part(names)}")
            lines += [f"  {name}" for name in names if everything]
    if (plan.initialised or plan.unused or plan.derived) and not everything:
        lines.append(f"their names: {save / SIDE / NOTES}, or with --list-tensors")
    lines += plan.config.remarks
    rvtc = plan.config.arguments["rvtc"]
    if compressed and rvtc == "off":
        lines.append(
            "rvtc: off, as the directory was made: images are cut by InternVL's rule. InternVL-X cuts them by RVTC: "
            f"rvtc: area in {save / RECIPE}, or --rvtc area"
        )
    lines.append(f"{save}: {len(plan.sources)} tensors, {plan.nbytes / 1e9:.2f} GB")
    lines += ["train with (meta.json lists the data, see docs/data.md):", f"  {training_command(save)}"]
    return lines


def training_command(save: Path) -> str:
    """A whole command for the shell; what the import cannot know has a name that says what it is."""
    words = ["python", "pretrain_vlm.py", "--recipe", str(save / RECIPE), "--data", "meta.json"]
    words += ["--save", str(save.with_name(f"{save.name}-trained"))]
    if not has_tokenizer(save / SIDE):  # the recipe names this directory
        words += ["--tokenizer-model", "TOKENIZER_DIRECTORY"]
    return shlex.join(words)
