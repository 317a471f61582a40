"""What an exported directory has beside its weights: config.json, tokenizer, chat template, code, model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_internvlx.checkpoint.checks import read_object
from megatron_internvlx.checkpoint.hf_write import chat_config, image_settings
from megatron_internvlx.checkpoint.importer import NOTES
from megatron_internvlx.checkpoint.remote_code import (
    has_chat_template,
    model_card,
    write_chat_template,
    write_json,
    write_processor,
    write_remote_code,
)
from megatron_internvlx.checkpoint.safetensors_io import INDEX, PICKLES

if TYPE_CHECKING:
    from megatron_internvlx.checkpoint.export_plan import ExportPlan

_OURS = {
    NOTES,
    INDEX,
    *PICKLES,
    "config.json",
    "README.md",
    "processor_config.json",
    "preprocessor_config.json",
}


def write_files(plan: ExportPlan, partial: Path) -> None:
    """Write all of it into `partial`. Raises ConversionError where an original file cannot be read."""
    same = plan.side is not None and plan.notes.get("layout") == plan.layout
    same_projector = plan.notes.get("arguments", {}).get("projector") == plan.arguments.get("projector")
    if plan.side is not None:
        for path in sorted(plan.side.iterdir()):
            ours = path.name in _OURS or (path.suffix == ".py" and not (same and same_projector))
            if path.is_file() and not ours and path.suffix != ".safetensors":
                shutil.copyfile(path, partial / path.name)
    if plan.layout == "internvlx":
        write_remote_code(plan, partial)
        return
    if same:
        _keep_config(plan, partial, same_projector)
    else:
        config = chat_config(plan.arguments, plan.family, plan.sizes.tied, plan.dtype)
        write_json(partial / "config.json", config)
    if not (same and _keeps_template(plan, partial)):
        write_chat_template(plan, partial)
    write_processor(plan, partial)
    if (plan.iteration or not same) and not (partial / "README.md").exists():
        (partial / "README.md").write_text(model_card(plan, partial), encoding="utf-8")


def _keeps_template(plan: ExportPlan, partial: Path) -> bool:
    """Whether the chat template of the original is that of the model.

    Until it is trained that is so unless another one was asked for. Training used the one of its settings: the
    original's only if its config.json names it, which the native format never does. Files that have none of a
    named template do not keep it: the released code has it in Python, where no processor finds it.
    """
    assert plan.side is not None
    ours = plan.arguments.get("conversation_template", "internvl2_5")
    said = read_object(plan.side / "config.json").get("template")
    if said == ours and not has_chat_template(partial):
        return False
    named = said if plan.iteration else plan.notes.get("arguments", {}).get("conversation_template")
    return named == ours


def _keep_config(plan: ExportPlan, partial: Path, same_projector: bool) -> None:
    """The original config.json byte for byte, unless the export changed what it says."""
    assert plan.side is not None
    for name in ("README.md", "processor_config.json", "preprocessor_config.json"):
        if same_projector and (plan.side / name).is_file():
            shutil.copyfile(plan.side / name, partial / name)
    config = read_object(plan.side / "config.json")
    changed = False
    if plan.layout == "chat":
        # What training set otherwise, such as --max-tiles, is what the model is to be used with.
        before, now = image_settings(plan.notes["arguments"]), image_settings(plan.arguments)
        differing = {key: value for key, value in now.items() if before.get(key) != value}
        if plan.iteration and config.get("template") != now["template"]:
            differing["template"] = now["template"]  # the original's is none of ours
        config |= differing
        changed = bool(differing)
    if not same_projector and "auto_map" in config:
        # That remote code builds the other projector.
        del config["auto_map"]
        changed = True
    key = "dtype" if "dtype" in config else "torch_dtype"
    original = {entry["dtype"] for entry in plan.notes.get("tensors", {}).values()}
    if plan.dtype not in original:
        config[key] = plan.dtype
        changed = True
    if changed:
        write_json(partial / "config.json", config)
    else:
        shutil.copyfile(plan.side / "config.json", partial / "config.json")
