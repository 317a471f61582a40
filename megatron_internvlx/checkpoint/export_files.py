"""Files of an exported directory besides weights: config.json, tokenizer, chat template, code, model card."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_internvlx.checkpoint.checks import read_object
from megatron_internvlx.checkpoint.end_token import SETTINGS, add_stop_token, token_text
from megatron_internvlx.checkpoint.hf_write import chat_config, image_settings
from megatron_internvlx.checkpoint.importer import NOTES
from megatron_internvlx.checkpoint.remote_code import (
    TEMPLATE_FILE,
    has_chat_template,
    model_card,
    write_chat_template,
    write_json,
    write_processor,
    write_remote_code,
)
from megatron_internvlx.checkpoint.safetensors_io import INDEX, PICKLES
from megatron_internvlx.data.conversation import Template, get_template

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
    """Write all files except weights into `partial`. Raises ConversionError if an original cannot be read."""
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
    if plan.iteration or not same:
        add_stop_token(partial, _template(plan).end)
    if (plan.iteration or not same) and not (partial / "README.md").exists():
        (partial / "README.md").write_text(model_card(plan, partial), encoding="utf-8")


def _keeps_template(plan: ExportPlan, partial: Path) -> bool:
    """Whether the original directory's chat template is the model's, so that its files can be kept.

    An untrained model has the original's template unless the import chose another one. A trained model has the
    template of its settings, which is the original's only if the original's config.json names it (the native
    format never does). The released code has its templates in Python, where a processor cannot find them, so
    without a template file the template is written even if it is the same.
    """
    assert plan.side is not None
    ours = plan.arguments.get("conversation_template", "internvl2_5")
    original = read_object(plan.side / "config.json").get("template")
    if original == ours and not has_chat_template(partial):
        return False
    named = original if plan.iteration else plan.notes.get("arguments", {}).get("conversation_template")
    return named == ours and not (plan.iteration and _ends_with_eos(partial, _template(plan).end))


def _template(plan: ExportPlan) -> Template:
    return get_template(plan.arguments.get("conversation_template", "internvl2_5"))


def _ends_with_eos(partial: Path, end: str) -> bool:
    """Whether the directory's chat template writes the tokenizer's `eos_token`, and it is another one than `end`."""
    files = (TEMPLATE_FILE, "chat_template.json", SETTINGS)
    texts = [(partial / name).read_text(encoding="utf-8") for name in files if (partial / name).is_file()]
    if not any(re.search(r'(?<!["\w])eos_token(?!["\w])', text) for text in texts):
        return False
    settings = read_object(partial / SETTINGS) if (partial / SETTINGS).is_file() else {}
    return token_text(settings.get("eos_token")) != end


def _keep_config(plan: ExportPlan, partial: Path, same_projector: bool) -> None:
    """Copy the original config.json, byte for byte unless the export changes a setting in it."""
    assert plan.side is not None
    for name in ("README.md", "processor_config.json", "preprocessor_config.json"):
        if same_projector and (plan.side / name).is_file():
            shutil.copyfile(plan.side / name, partial / name)
    config = read_object(plan.side / "config.json")
    changed = False
    if plan.layout == "chat":
        # Use the model with the settings it was trained with, such as --max-tiles.
        before, now = image_settings(plan.notes["arguments"]), image_settings(plan.arguments)
        differing = {key: value for key, value in now.items() if before.get(key) != value}
        if plan.iteration and config.get("template") != now["template"]:
            differing["template"] = now["template"]  # the original names an unknown template
        if "rvtc" in differing:
            differing["rvtc_version"] = now["rvtc_version"]
        config |= differing
        changed = bool(differing)
    if not same_projector and "auto_map" in config:
        # The original's remote code builds another projector.
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
