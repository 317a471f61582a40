"""Printed summary of an import of adapters: what was taken over, and how to train on."""

from __future__ import annotations

import shlex
from pathlib import Path

from megatron_internvlx.checkpoint.peft_import import PeftImport


def lora_flags(plan: PeftImport) -> list[str]:
    """Arguments with which training continues the adapters."""
    lora = plan.settings
    words = ["--lora-rank", str(lora.lora_rank), "--lora-alpha", f"{lora.alpha:.9g}"]
    words += ["--lora-targets", *lora.targets]
    words += ["--lora-dropout", f"{lora.lora_dropout:g}"] if lora.lora_dropout else []
    words += ["--lora-rslora"] if lora.lora_rslora else []
    return words + [f"--freeze-{part}" for part in plan.frozen]


def peft_import_summary(plan: PeftImport, save: Path, base: Path) -> list[str]:
    """Lines of the summary."""
    lines = [f"{save}: adapters of rank {plan.settings.lora_rank} on {len(plan.given)} modules of {base}"]
    if plan.added:
        lines.append(
            f"{plan.added} more modules of the same targets get an adapter that adds zero, and are trained too"
        )
    if plan.whole:
        lines.append(f"{len(plan.whole)} tensors of parts that were trained whole")
    words = ["--load", str(save), "--pretrained-checkpoint", str(base), *lora_flags(plan)]
    return [*lines, "train on with the recipe of the base and", f"  {shlex.join(words)}"]
