"""Layout of the checkpoint that a run resumes: kept where possible; arguments that do not fit it are listed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_internvlx import files
from megatron_internvlx.config import DataSettings, RunSettings, settings_from
from megatron_internvlx.data.rvtc import stored_policy
from megatron_internvlx.lifecycle import resume
from megatron_internvlx.megatron_settings import CheckpointFiles, Progress
from megatron_internvlx.paths import is_url
from megatron_internvlx.platform.schedule import ParameterGroupMismatch

# Arguments that a checkpoint's optimizer state, or its weights, must have in common with the run that loads it.
SHAPING = (
    "pipeline_model_parallel_layout",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "tensor_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "padded_vocab_size",
    "num_experts",
    "image_size",
    "projector",
    "expand_layer",
    "inject_layers",
    "freeze_vision",
    "freeze_llm",
    "freeze_projectors",
    "lora_rank",
    "lora_targets",
    "use_distributed_optimizer",
)
_NAMES = {"padded_vocab_size": "vocabulary", "virtual_pipeline_model_parallel_size": "virtual stages"}


def made_with(checkpoint: Path) -> argparse.Namespace:
    """Read the arguments of the run that saved a checkpoint. Needs no process group."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    return load_common_state_dict(checkpoint)["args"]


def _unreadable(checkpoint: Path) -> str | None:
    try:
        made_with(checkpoint)
    except Exception as error:  # a torn file raises nearly anything
        return f"the arguments in it cannot be read: {error!r}"
    return None


def resumed_checkpoint(args: argparse.Namespace) -> Path | None:
    """Find the checkpoint whose optimizer state a run resumes: that of `--auto-resume`, or of `--load`.

    Returns its directory; None where training starts anew, from an import or with `--finetune` for instance. All
    ranks that see the same files find the same one.
    """
    checkpoints = settings_from(args, CheckpointFiles)
    save = checkpoints.save_folder
    if settings_from(args, RunSettings).auto_resume and save is not None:
        found, _ = resume.newest_complete(
            save, lambda iteration: _unreadable(files.checkpoint_directory(save, iteration))
        )
        if found is not None:
            return files.checkpoint_directory(save, found)
    if not checkpoints.load or is_url(checkpoints.load) or checkpoints.finetune:
        return None
    load, step = Path(checkpoints.load), checkpoints.ckpt_step
    if not step:
        try:
            step = int((load / files.TRACKER).read_text())
        except (OSError, ValueError):  # an import has "release" in it; an empty --save has no such file
            return None
    checkpoint = files.checkpoint_directory(load, step)
    return checkpoint if checkpoint.is_dir() else None


def layout_to_keep(args: argparse.Namespace) -> str | None:
    """Read `--pipeline-model-parallel-layout` of the checkpoint that a run with these arguments resumes from.

    Returns None without a checkpoint, or if it was made with another pipeline size or without a layout. Raises
    ValueError if the checkpoint that `--load` names cannot be read.
    """
    checkpoint = resumed_checkpoint(args)
    if checkpoint is None:
        return None
    try:
        made = made_with(checkpoint)
    except Exception as error:  # a torn file raises nearly anything
        raise ValueError(
            f"--load {checkpoint.parent}: {checkpoint.name} is broken (the arguments in it cannot be read: {error!r}): "
            "take another --ckpt-step"
        ) from error
    if made.pipeline_model_parallel_size != args.pipeline_model_parallel_size:
        return None
    layout = made.pipeline_model_parallel_layout
    return None if layout is None else str(layout)


def check_tile_rule(args: argparse.Namespace) -> None:
    """Check that a resumed run cuts images by the rule of its checkpoint, where names of rules have changed since.

    Raises ValueError with the rule's present name.
    """
    checkpoint = resumed_checkpoint(args)
    if checkpoint is None:
        return
    made, data = made_with(checkpoint), settings_from(args, DataSettings)
    version, old = getattr(made, "rvtc_version", None), getattr(made, "rvtc", None)
    if version is not None or old in (None, "off") or settings_from(made, DataSettings).static_image_size:
        return
    if old == "edge" and data.min_tiles > 1:
        raise ValueError(
            f"{checkpoint} was trained with the rule that was called edge before, which limits columns and rows: with "
            f"--min-tiles {data.min_tiles} it differs from all present ones. Train from its weights, with "
            f"--pretrained-checkpoint {checkpoint.parent} and another --save"
        )
    if (now := stored_policy(old, version)) != data.rvtc:
        raise ValueError(
            f"{checkpoint} was trained with the rule that is called {now} today ({old} before), and --rvtc is "
            f"{data.rvtc}: resume with --rvtc {now}, or in the recipe rvtc: {now}; for other tiles train from its "
            f"weights, with --pretrained-checkpoint {checkpoint.parent} and another --save"
        )


def mistake_behind(args: argparse.Namespace, error: BaseException) -> ValueError | None:
    """Find the caller's mistake behind an error that ended training.

    Returns an error that names the remedy, or None if there is no mistake. A mistake is optimizer state of other
    parameter groups, or a checkpoint that was made with other sizes.
    """
    if isinstance(error, ParameterGroupMismatch):
        return error
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint import CheckpointException

    if Progress(args).has_begun:
        return None
    if not isinstance(error, CheckpointingException | CheckpointException) and "mismatch" not in str(error):
        return None
    checkpoint = resumed_checkpoint(args)
    if checkpoint is None or _unreadable(checkpoint):
        return None
    differing = differences(made_with(checkpoint), args)
    if not differing:
        return None
    return ValueError(
        f"{checkpoint} does not fit this run, checkpoint -> arguments: {', '.join(differing)}: give what it was made "
        f"with, or load only its weights with --pretrained-checkpoint {checkpoint.parent} and another --save"
    )


def differences(made: argparse.Namespace, now: argparse.Namespace) -> list[str]:
    """List the sizes that differ between a checkpoint's arguments and a run's, as `--flag old -> new`."""

    def shown(value: Any) -> str:
        return repr(value) if isinstance(value, str) else str(value)

    found = []
    for name in SHAPING:
        if not hasattr(made, name):  # of an earlier version
            continue
        old, new = getattr(made, name), getattr(now, name, None)
        if (old or None) != (new or None):
            found.append(f"{_NAMES.get(name, '--' + name.replace('_', '-'))} {shown(old)} -> {shown(new)}")
    return found
