"""Checks before a start: Megatron silently starts from random weights if it finds no checkpoint."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_internvlx import files
from megatron_internvlx.config import DataSettings, RunSettings, TrainSettings, settings_from
from megatron_internvlx.lifecycle import resume
from megatron_internvlx.megatron_settings import CheckpointFiles, Loop
from megatron_internvlx.paths import check_path, is_url
from megatron_internvlx.ranks import is_first_rank


def check_start(checkpoints: CheckpointFiles, *, auto_resume: bool, freeze_llm: bool) -> None:
    """Check that weights named on the command line exist and that weights in `--save` are not ignored.

    A run that names no weights starts from random ones; with `--freeze-llm` this prints a warning.

    Raises ValueError for a directory without a checkpoint, for an import in `--save` that nothing loads, and for
    checkpoints of an earlier run in `--save` that this run would overwrite.
    """
    _check_save_is_unused(checkpoints, auto_resume)
    load = None if checkpoints.ckpt_step else checkpoints.load  # a step that is named needs no tracker file
    for flag, path in (("--load", load), ("--pretrained-checkpoint", checkpoints.pretrained_checkpoint)):
        # The run's own directory may be named before it holds a checkpoint.
        if (
            path
            and path != checkpoints.save
            and not is_url(path)
            and not (Path(path) / files.TRACKER).is_file()
        ):
            raise ValueError(
                f"{flag} {path}: no checkpoint is in it (no {files.TRACKER}); a Hugging Face directory is imported "
                f"first: ivlx import --hf {path} --save CKPT"
            )
    if _loads_weights(checkpoints, auto_resume):
        return
    save = checkpoints.save
    if save and (Path(save) / files.RELEASE).is_dir():
        raise ValueError(
            f"--save {save} is an import ({files.RELEASE}/), and no flag loads its weights: give "
            f"--pretrained-checkpoint {save}, and another directory as --save"
        )
    if freeze_llm:
        print(
            "pretrain_vlm.py: --freeze-llm, and no weights are loaded: the language model stays random. "
            "--pretrained-checkpoint names an import or an earlier run",
            file=sys.stderr,
            flush=True,
        )


def _check_save_is_unused(checkpoints: CheckpointFiles, auto_resume: bool) -> None:
    save = checkpoints.save_folder
    if save is None or auto_resume or checkpoints.load == checkpoints.save:
        return
    if saved_steps := files.iterations(save):
        raise ValueError(
            f"--save {checkpoints.save} holds checkpoints of an earlier run, up to step {saved_steps[0]}: resume "
            "from there with --auto-resume, or choose another --save"
        )


def _loads_weights(checkpoints: CheckpointFiles, auto_resume: bool) -> bool:
    """Whether a checkpoint gives the first weights: a named one, or one that `--auto-resume` finds."""
    load, save = checkpoints.load, checkpoints.save_folder
    if checkpoints.pretrained_checkpoint or (load and (is_url(load) or load != checkpoints.save)):
        return True
    if save is None:
        return False
    if load == checkpoints.save and (save / files.TRACKER).is_file():
        return True
    return auto_resume and resume.newest_complete(save)[0] is not None


def check_paths(args: argparse.Namespace) -> None:
    """Check, on the first rank, that input paths exist and that output paths can be written. Raises ValueError."""
    if not is_first_rank():
        return
    from megatron_internvlx.lifecycle.base import check_base  # PyTorch takes seconds to import

    checkpoints, data = settings_from(args, CheckpointFiles), settings_from(args, DataSettings)
    named = {"--load": checkpoints.load, "--pretrained-checkpoint": checkpoints.pretrained_checkpoint}
    for flag, path in named.items():
        check_path(flag, path, checkpoints.save)
    check_start(
        checkpoints,
        auto_resume=settings_from(args, RunSettings).auto_resume,
        freeze_llm=settings_from(args, TrainSettings).freeze_llm,
    )
    check_base(args)
    folders = {"--save": checkpoints.save, "--tensorboard-dir": settings_from(args, Loop).tensorboard_dir}
    written = {"--report-file": data.report_file, "--predictions-file": data.predictions_file}
    folders |= {flag: str(Path(path).absolute().parent) for flag, path in written.items() if path}
    for flag, folder in folders.items():
        if not folder or is_url(folder):
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{flag}: {folder} cannot be made: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{flag}: no permission to write in {folder}")
