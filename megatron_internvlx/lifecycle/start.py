"""What a first start begins from: Megatron takes random weights, without a word, where it finds no others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_internvlx.lifecycle import resume

RELEASE = "release"


def check_start(args: argparse.Namespace) -> None:
    """Weights that are named are there, and those that lie in --save are not passed over.

    Random weights remain the start of a run that names none; with a frozen language model it is told what
    that means.

    Raises ValueError for a directory without a checkpoint, and for an import in --save that nothing loads.
    """
    load = None if args.ckpt_step else args.load  # which needs no tracker file
    for flag, path in (("--load", load), ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        # The run's own directory may be named before its first checkpoint is there.
        if path and path != args.save and "://" not in path and not (Path(path) / resume.TRACKER).is_file():
            raise ValueError(
                f"{flag} {path}: no checkpoint is in it (no {resume.TRACKER}); a Hugging Face directory is imported "
                f"first: tools/convert_checkpoint.py import --hf {path} --save CKPT"
            )
    if _loads_something(args):
        return
    if args.save and (Path(args.save) / RELEASE).is_dir():
        raise ValueError(
            f"--save {args.save} is an import ({RELEASE}/), and nothing says to begin with its weights: give "
            f"--pretrained-checkpoint {args.save}, and another directory as --save"
        )
    if args.freeze_llm:
        print(
            "pretrain_vlm.py: --freeze-llm, and no weights are loaded: the language model stays random. "
            "--pretrained-checkpoint names an import or an earlier run",
            file=sys.stderr,
            flush=True,
        )


def _loads_something(args: argparse.Namespace) -> bool:
    """Whether a checkpoint gives the first weights: a named one, or one that --auto-resume finds."""
    if args.pretrained_checkpoint or (args.load and ("://" in args.load or args.load != args.save)):
        return True
    if not args.save or "://" in args.save:
        return False
    save = Path(args.save)
    if args.load == args.save and (save / resume.TRACKER).is_file():
        return True
    return bool(args.auto_resume) and resume.newest_complete(save)[0] is not None
