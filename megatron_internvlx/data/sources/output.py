"""The directory that a preparation writes: meta files, JSONL of training and validation, images.

It is written beside its final name and renamed when it is complete, so there is never an incomplete one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_internvlx.data.sources.detect import MARK
from megatron_internvlx.data.sources.survey import SetReport, Survey

_LOCK = ".lock"
_KEPT = ("images", _LOCK)
VERSION = 1


@dataclass(frozen=True)
class Written:
    """Numbers of records written for training and validation."""

    train: int
    held_out: int


def finished(out: Path, settings: dict[str, Any], *, force: bool) -> bool:
    """Whether `out` is complete and made with these settings. Raises ValueError if it must not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        mark = json.loads((out / MARK).read_text(encoding="utf-8"))
        mark["version"], mark["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{out} exists and was not made by this command: choose another --out, or remove it"
        ) from None
    if mark["settings"] == settings and not force:
        return True
    if not force:
        raise ValueError(
            f"{out} holds data made from other files or settings: choose another --out, or --force to replace it"
        )
    return False


@contextmanager
def working_directory(out: Path) -> Iterator[Path]:
    """Directory to write to, which becomes `out` when the block ends without an error.

    After a refusal (ValueError) it is removed; after a kill or Ctrl-C its images are kept for the next run. Raises
    ValueError if another process writes it.
    """
    out = out.absolute()
    work = out.with_name(f".{out.name}.partial")
    if work.exists() and not (work / _LOCK).exists():
        raise ValueError(f"{work} exists and was not made by this command: remove it")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}") from error
    with ExitStack() as stack:
        lock = stack.enter_context((work / _LOCK).open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{out} is being written by another process: wait for it") from None
        for old in work.iterdir():
            if old.name not in _KEPT:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        try:
            yield work
        except ValueError:
            shutil.rmtree(work)
            raise
        (work / _LOCK).unlink()
        aside = out.with_name(f".{out.name}.replaced")
        if aside.exists():
            shutil.rmtree(aside)
        if out.exists():
            out.rename(aside)
        work.rename(out)
        shutil.rmtree(aside, ignore_errors=True)


def write_sets(work: Path, survey: Survey, held_out: set[int]) -> Written:
    """Write `meta.json`, `meta_val.json`, and the JSONL files of every set; remove images of an earlier run."""
    counts = {(number, side): 0 for number in range(len(survey.reports)) for side in ("train", "val")}
    with ExitStack() as stack:
        files = {}
        for number, side in counts:
            path = work / side / f"{survey.reports[number].source.name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            files[number, side] = stack.enter_context(path.open("w", encoding="utf-8"))
        for index, line in enumerate(survey.lines()):
            number = survey.set_of[index]
            side = "val" if survey.groups.find(survey.node_of[index]) in held_out else "train"
            record = final_record(line, survey.reports[number])
            files[number, side].write(json.dumps(record, ensure_ascii=False) + "\n")
            counts[number, side] += 1
    for name, side in (("meta.json", "train"), ("meta_val.json", "val")):
        meta = {}
        for number, report in enumerate(survey.reports):
            relative = f"{side}/{report.source.name}.jsonl"
            if counts[number, side]:
                meta[report.source.name] = _entry(report, relative, counts[number, side])
            else:
                (work / relative).unlink()
        if meta:
            text = json.dumps(meta, ensure_ascii=False, indent=1) + "\n"
            (work / name).write_text(text, encoding="utf-8")
        else:
            (work / side).rmdir()
    survey.spool.unlink()
    _remove_unused(work, survey.stored)
    by_side = {side: sum(n for (_, s), n in counts.items() if s == side) for side in ("train", "val")}
    return Written(by_side["train"], by_side["val"])


def _entry(report: SetReport, annotation: str, length: int) -> dict[str, Any]:
    """Entry of a set in `meta.json`; an empty root is the folder of `meta.json`."""
    kept = report.source.entry
    entry = {
        "root": "" if report.stored else str(report.root.absolute()),
        "annotation": annotation,
        "data_augment": kept.data_augment,
        "repeat_time": kept.repeat_time,
        "length": length,
    }
    return entry if kept.max_dynamic_patch is None else {**entry, "max_dynamic_patch": kept.max_dynamic_patch}


def final_record(line: dict[str, Any], report: SetReport) -> dict[str, Any]:
    """Record for training: extra fields, `source`, `image` (one path, or a list) and `conversations`."""
    names = [_relative(name, report) for name in line["images"]]
    image = {"image": names[0] if len(names) == 1 else names} if names else {}
    return {**line["extra"], "source": line["key"], **image, "conversations": line["turns"]}


def _relative(name: str, report: SetReport) -> str:
    root = str(report.root.absolute())
    if report.stored or not Path(name).is_relative_to(root):
        return name
    return os.path.relpath(name, root)


def _remove_unused(work: Path, stored: set[bytes]) -> None:
    """Remove images that a stopped earlier run wrote and this one does not use."""
    folder = work / "images"
    for path in folder.rglob("*") if folder.exists() else ():
        if path.is_file() and path.stem not in {one.hex() for one in stored}:
            path.unlink()
    for path in [*folder.glob("*"), folder] if folder.exists() else ():
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def write_mark(work: Path, settings: dict[str, Any], summary: dict[str, Any]) -> None:
    """Write the mark of a complete directory, last."""
    content = {"version": VERSION, "settings": settings, "summary": summary}
    (work / MARK).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
