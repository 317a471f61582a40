"""The directory that a preparation writes: meta files, JSONL of training and validation, images.

It is written beside its final name and renamed when it is complete, so there is never an incomplete one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_internvlx.data.sources.detect import MARK
from megatron_internvlx.data.sources.survey import SetReport, Survey

_LOCK = ".lock"
_KEPT = ("images", _LOCK)
_WRITTEN = {
    "meta.json", "meta_val.json", "train", "val", "images", "energon", "page.html", "left_out.jsonl", MARK, _LOCK,
}  # fmt: skip
VERSION = 1


@dataclass(frozen=True)
class Written:
    """Numbers of records written for training and validation."""

    train: int
    held_out: int


def _partial(out: Path) -> Path:
    """Directory that is written and then renamed to `out`, a path without links."""
    return out.with_name(f".{out.name}.partial")


def _settings_of(folder: Path) -> dict[str, Any] | None:
    """Settings in the mark of a complete directory; None if it has no mark of this command."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        mark["version"]
        return mark["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_new(out: Path) -> bool:
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def finished(out: Path, settings: dict[str, Any], *, force: bool) -> bool:
    """Whether `out` is complete and made with these settings. Raises ValueError if it must not be replaced.

    A run that was killed after its last file and before the renaming is brought to its end here.
    """
    out = out.resolve()
    if _is_new(out):
        if not force and _settings_of(_partial(out)) == settings:
            with _locked(out) as work:
                _put_in_place(work, out)
            return True
        return False
    found = _settings_of(out)
    if found is None:
        raise ValueError(f"{out} exists and was not made by this command: choose another --out, or remove it")
    if found == settings and not force:
        return True
    if not force:
        raise ValueError(
            f"{out} holds data made from other files or settings: choose another --out, or --force to replace it"
        )
    _refuse_other_files(out)
    return False


def state_of(files: Iterable[Path]) -> str:
    """Digest (hexadecimal) of names, sizes and times of files, in the given order."""
    digest = hashlib.sha256()
    for path in files:
        try:
            found = path.stat()
            state = b"%d %d" % (found.st_size, found.st_mtime_ns)
        except OSError:  # a link that leads nowhere costs its record alone
            state = b"missing"
        digest.update(os.fsencode(path.absolute()) + b"\0" + state + b"\n")
    return digest.hexdigest()


def _refuse_other_files(out: Path) -> None:
    """Raises ValueError if the directory to be replaced holds something that this command did not write."""
    others = sorted(path.name for path in out.iterdir() if path.name not in _WRITTEN) if out.exists() else []
    if others:
        more = f" and {len(others) - 5:,} more" if len(others) > 5 else ""
        raise ValueError(
            f"{out} also holds {', '.join(others[:5])}{more}, which this command did not write and replacing would "
            "delete: move them elsewhere, or choose another --out"
        )


@contextmanager
def _locked(out: Path) -> Iterator[Path]:
    """Directory beside `out` that only this process writes. Raises ValueError if another one does."""
    work = _partial(out)
    if work.exists() and not (work / _LOCK).exists() and _settings_of(work) is None:
        raise ValueError(f"{work} exists and was not made by this command: remove it")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}") from error
    with (work / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{out} is being written by another process: wait for it") from None
        yield work


def _put_in_place(work: Path, out: Path) -> None:
    """Give a complete directory its name, in place of an older one that this command made."""
    _refuse_other_files(out)
    aside = out.with_name(f".{out.name}.replaced")
    if aside.exists():
        shutil.rmtree(aside)
    if out.exists():
        out.rename(aside)
    work.rename(out)
    (out / _LOCK).unlink()
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def working_directory(out: Path) -> Iterator[Path]:
    """Directory to write to, which becomes `out` when the block ends without an error.

    After an error, a kill or Ctrl-C its images are kept for the next run. Raises ValueError if another process
    writes it.
    """
    out = out.resolve()
    with _locked(out) as work:
        _clear(work)
        try:
            yield work
        except ValueError:
            _clear(work)
            if not (work / "images").exists():
                shutil.rmtree(work)
            raise
        _put_in_place(work, out)


def _clear(work: Path) -> None:
    """Remove what an unfinished run wrote, besides its images."""
    for old in work.iterdir():
        if old.name not in _KEPT:
            shutil.rmtree(old) if old.is_dir() else old.unlink()


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
    used = {one.hex() for one in stored}
    for path in folder.rglob("*") if folder.exists() else ():
        if path.is_file() and path.stem not in used:
            path.unlink()
    for path in [*folder.glob("*"), folder] if folder.exists() else ():
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def write_mark(work: Path, settings: dict[str, Any], summary: dict[str, Any]) -> None:
    """Write the mark of a complete directory, last."""
    content = {"version": VERSION, "settings": settings, "summary": summary}
    (work / MARK).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
