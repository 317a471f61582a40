"""Checks before a start: Megatron silently starts from random weights if it finds no checkpoint."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_internvlx import files
from megatron_internvlx.lifecycle import resume
from megatron_internvlx.paths import check_path
from megatron_internvlx.ranks import is_first_rank

RELEASE = "release"


def check_start(args: argparse.Namespace) -> None:
    """Check that weights named on the command line exist and that weights in `--save` are not ignored.

    A run that names no weights starts from random ones; with `--freeze-llm` a warning says so.

    Raises ValueError for a directory without a checkpoint, for an import in `--save` that nothing loads, and for
    checkpoints of an earlier run in `--save` that this run would overwrite.
    """
    _check_save_is_free(args)
    load = None if args.ckpt_step else args.load  # a step that is named needs no tracker file
    for flag, path in (("--load", load), ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        # The run's own directory may be named before it holds a checkpoint.
        if path and path != args.save and "://" not in path and not (Path(path) / files.TRACKER).is_file():
            raise ValueError(
                f"{flag} {path}: no checkpoint is in it (no {files.TRACKER}); a Hugging Face directory is imported "
                f"first: tools/convert_checkpoint.py import --hf {path} --save CKPT"
            )
    if _loads_something(args):
        return
    if args.save and (Path(args.save) / RELEASE).is_dir():
        raise ValueError(
            f"--save {args.save} is an import ({RELEASE}/), and no flag loads its weights: give "
            f"--pretrained-checkpoint {args.save}, and another directory as --save"
        )
    if args.freeze_llm:
        print(
            "pretrain_vlm.py: --freeze-llm, and no weights are loaded: the language model stays random. "
            "--pretrained-checkpoint names an import or an earlier run",
            file=sys.stderr,
            flush=True,
        )


def _check_save_is_free(args: argparse.Namespace) -> None:
    if not args.save or "://" in args.save or args.auto_resume or args.load == args.save:
        return
    if held := files.iterations(Path(args.save)):
        raise ValueError(
            f"--save {args.save} holds checkpoints of an earlier run, up to step {held[0]}: go on from there with "
            "--auto-resume, or choose another --save"
        )


def _loads_something(args: argparse.Namespace) -> bool:
    """Whether a checkpoint gives the first weights: a named one, or one that --auto-resume finds."""
    if args.pretrained_checkpoint or (args.load and ("://" in args.load or args.load != args.save)):
        return True
    if not args.save or "://" in args.save:
        return False
    save = Path(args.save)
    if args.load == args.save and (save / files.TRACKER).is_file():
        return True
    return bool(args.auto_resume) and resume.newest_complete(save)[0] is not None


def check_paths(args: argparse.Namespace) -> None:
    """Check, on the first rank, that input paths exist and that output paths can be written. Raises ValueError."""
    if not is_first_rank():
        return
    for flag, path in (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        check_path(flag, path, args.save)
    check_start(args)
    folders = {"--save": args.save, "--tensorboard-dir": args.tensorboard_dir}
    written = {"--report-file": args.report_file, "--predictions-file": args.predictions_file}
    folders |= {flag: str(Path(path).absolute().parent) for flag, path in written.items() if path}
    for flag, folder in folders.items():
        if not folder or "://" in folder:  # of a storage client
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{flag}: {folder} cannot be made: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{flag}: no permission to write in {folder}")
