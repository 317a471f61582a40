"""Turn what you have into training data: a table, captions, LLaVA or OpenAI JSON, Parquet, or tar shards."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_internvlx.commands.help import CommandParser
from megatron_internvlx.commands.prepare_settings import encoder_settings
from megatron_internvlx.commands.values import float_in_range, int_in_range
from megatron_internvlx.exit_codes import DONE, INTERRUPTED, MISTAKE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_internvlx.data.sample import EncoderSettings
    from megatron_internvlx.data.sources.record import Source
    from megatron_internvlx.data.sources.survey import SetReport, Survey

FORMATS = ("auto", "table", "captions", "json", "parquet", "webdataset", "meta")
TEMPLATES = ("internlm2-chat", "Hermes-2", "internvl2_5")
POLICIES = ("edge", "area", "off")
_RESERVED_NAMES = ("validation", "annotations", "images", "energon")
EXAMPLES = (
    "ivlx prepare photos --out data        # a folder with images and questions.csv (image,question,answer)",
    "ivlx prepare llava.json --root images --out data",
    "ivlx prepare photos more.parquet --out data --validation 500 --recipe RECIPE.yaml --tokenizer-model DIR",
    "ivlx prepare photos --check           # only say what is found",
)


def _share_or_number(text: str) -> float:
    """A share below 1, or a whole number of records."""
    number = float_in_range(0)(text)
    if number >= 1 and number != int(number):
        raise argparse.ArgumentTypeError(f"{text}: must be a share below 1, or a whole number of records")
    return number


def parser() -> argparse.ArgumentParser:
    """The command line; imports nothing heavy."""
    made = CommandParser(
        "prepare",
        (__doc__ or "").splitlines()[0],
        about="It says what it found and what it left out before it writes. DIR/page.html shows sampled records as "
        "training sees them. Then: --data DIR/meta.json --valid-data DIR/meta_val.json",
        examples=EXAMPLES,
        exits={
            DONE: "done",
            MISTAKE: "nothing usable, or a mistake: nothing was written",
            INTERRUPTED: "Ctrl-C; the same command continues",
        },
    )
    made.add_argument("inputs", type=Path, nargs="+", metavar="INPUT", help="folder or file, one or several")
    made.add_argument("--out", type=Path, metavar="DIR", help="directory to write; it must be new")
    made.add_argument("--check", action="store_true", help="only say what is found; write nothing")
    made.add_argument("--force", action="store_true", help="replace DIR if this command made it")

    read = made.add_argument_group("reading")
    read.add_argument(
        "--format", choices=FORMATS, default="auto", help="format of the input [found by looking]"
    )
    read.add_argument("--root", type=Path, metavar="DIR", help="folder of the images [found by looking]")
    read.add_argument(
        "--strip-prefix", metavar="TEXT", help="beginning of image names to remove, such as a path elsewhere"
    )
    for role in ("image", "question", "answer"):
        read.add_argument(f"--{role}-column", metavar="NAME", help=f"column of the {role} [usual names]")
    read.add_argument("--question", metavar="TEXT", help="question of captions ['Describe the image.']")
    read.add_argument("--encoding", metavar="NAME", help="encoding of text files [utf-8]")
    read.add_argument(
        "--rounds", action="store_true", help="join consecutive rows of one image to one conversation"
    )
    read.add_argument(
        "--limit", type=int_in_range(1), metavar="N", help="stop after N usable records of a set"
    )
    read.add_argument(
        "--headers-only",
        action="store_true",
        help="do not decode images: faster, misses files that end early",
    )
    read.add_argument(
        "--threads", type=int_in_range(1, 256), default=8, metavar="N", help="images checked at once [8]"
    )

    write = made.add_argument_group("writing")
    write.add_argument(
        "--validation",
        type=_share_or_number,
        metavar="SHARE|N",
        help="records held out, never with an image of training; 0 for none [0.05, at most 1,000]",
    )
    write.add_argument("--seed", type=int_in_range(0), default=1234, metavar="N", help="draws them [1234]")
    write.add_argument(
        "--copy", action="store_true", help="copy images into DIR instead of naming them in place"
    )
    write.add_argument(
        "--energon",
        "--packed",
        action="store_true",
        help="also write DIR/energon for --loader energon --packing",
    )

    page = made.add_argument_group("page, and how training sees the data")
    page.add_argument("--recipe", type=Path, metavar="FILE", help="take the settings below from a recipe")
    page.add_argument("--conversation-template", choices=TEMPLATES, metavar="NAME", help="[internvl2_5]")
    page.add_argument(
        "--image-size", type=int_in_range(1, 65_536), metavar="N", help="side of a tile, pixels [448]"
    )
    page.add_argument(
        "--max-tiles", type=int_in_range(1, 4096), metavar="N", help="tiles of an image, at most [12]"
    )
    page.add_argument("--rvtc", choices=POLICIES, help="rule of the tile grid [edge]")
    page.add_argument("--tokenizer-model", metavar="DIR", help="count tokens with this tokenizer")
    page.add_argument(
        "--page-records", type=int_in_range(1, 1000), default=24, metavar="N", help="records shown [24]"
    )
    return made


def _open_sources(options: argparse.Namespace) -> list[Source]:
    """Data sets of all inputs, each with a name of its own that is a valid file name. Raises ValueError."""
    from megatron_internvlx.data.sources.detect import find_sources
    from megatron_internvlx.data.sources.record import ReadSettings

    read = ReadSettings(
        options.image_column,
        options.question_column,
        options.answer_column,
        options.question,
        options.encoding,
    )
    if options.root is not None and not options.root.is_dir():
        raise ValueError(f"--root {options.root}: no such folder")
    out = options.out.resolve() if options.out else None
    sources = [
        s for path in options.inputs for s in find_sources(path, read, options.format, options.root, out)
    ]
    names: set[str] = set()
    for source in sources:
        plain = re.sub(r"[^\w.-]+", "_", source.name).strip("._") or "data"
        plain = f"{plain}_set" if plain in _RESERVED_NAMES else plain
        source.name = next(n for n in (plain, *(f"{plain}_{i}" for i in range(2, 10_000))) if n not in names)
        names.add(source.name)
    return sources


def _progress() -> Callable[[str, int], None]:
    """Prints the number of records on a terminal, over itself."""
    if not sys.stderr.isatty():
        return lambda name, read: None
    return lambda name, read: print(f"\r{name}: {read:,} records", end="", file=sys.stderr, flush=True)


def _report(reports: Sequence[SetReport]) -> None:
    """Print what was found in each set, what was left out and why, and what was mended."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    for report in reports:
        source = report.source
        print(f"{source.name}: {source.kind} in {', '.join(map(str, source.files[:2]))}")
        where = f", found in {report.root}" if report.images and not report.stored else ""
        print(
            f"  {report.records:,} records, {len(report.images):,} images{where}, {report.rounds:,} answers, "
            f"{report.tiles:,} tiles, {report.characters:,} characters"
        )
        for note in [*source.notes, *(["stopped at --limit"] if report.stopped else [])]:
            print(f"  {note}")
        for what, count in report.mends.most_common():
            print(f"  mended: {what}: {count:,}")
        for what, count in report.remarks.most_common():
            print(f"  note: {what}: {count:,}")
        if report.left_out:
            causes = ", ".join(f"{cause} {count:,}" for cause, count in report.left_out.most_common())
            print(f"  left out {report.left_out.total():,}: {causes}")
            for error in report.examples[:10]:
                print(f"    {error}")
        if report.hint:
            print(f"  {report.hint}")


def _nothing_usable(reports: Sequence[SetReport]) -> ValueError:
    lost = sum(report.left_out.total() for report in reports)
    hints = [report.hint for report in reports if report.hint]
    why = f"all {lost:,} records are left out, see above" if lost else "there are no records"
    return ValueError(f"nothing to train on: {why}" + "".join(f". {hint}" for hint in hints))


def _write(
    work: Path,
    survey: Survey,
    options: argparse.Namespace,
    settings: EncoderSettings,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[int, int]:
    """Write everything but the mark; returns the numbers of records for training and validation."""
    from megatron_internvlx.data.sources.output import write_sets
    from megatron_internvlx.data.sources.page import page_text
    from megatron_internvlx.data.sources.samples import choose_samples, look_at

    held_out = survey.held_out(options.validation, options.seed)
    chosen = choose_samples(survey, options.page_records, options.seed)
    shown = [look_at(survey, n, why, held_out, settings, tokenizer) for n, why in chosen.items()]
    count = sum(survey.groups.find(node) in held_out for node in survey.node_of)
    (work / "page.html").write_text(page_text(survey, shown, count, settings), encoding="utf-8")
    written = write_sets(work, survey, held_out)
    if options.energon:
        from megatron_internvlx.data.prepare import PrepareSettings, prepare

        prepare(work / "meta.json", work / "energon", PrepareSettings(threads=options.threads))
    return written.train, written.held_out


def _summary(out: Path, train: int, held_out: int, energon: bool) -> None:
    validation = f" --valid-data {out / 'meta_val.json'}" if held_out else ""
    print(f"{train:,} records for training, {held_out:,} for validation: {out}")
    print(f"look at {out / 'page.html'}: sampled records as training sees them")
    print(f"train with: --data {out / 'meta.json'}{validation}")
    if energon:
        print(f"or packed: --loader energon --packing --data {out / 'energon'}{validation}")


def _made_from(options: argparse.Namespace, sources: Sequence[Source]) -> dict[str, Any]:
    """Dependencies of a finished directory: options, and name, size and time of the files that were looked at.

    Images that only a table or JSON names are not known before it is read, so they are not among them.
    """
    from megatron_internvlx.data.sources.output import state_of

    kept = {
        name: value
        for name, value in vars(options).items()
        if name not in ("force", "check", "threads", "out")
    }
    plain = {name: list(map(str, v)) if isinstance(v, list) else str(v) for name, v in kept.items()}
    recipe = [] if options.recipe is None else [options.recipe]
    files = [*recipe, *(path for s in sources for path in s.files if path.is_file())]
    return {
        "options": plain,
        "files": [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "beside": state_of(path for s in sources for path in s.beside),
    }


def run(options: argparse.Namespace) -> None:
    """Prepare, print the report and the next command. Raises ValueError for mistakes and unusable data."""
    import tempfile

    from megatron_internvlx.data.sources.output import finished, working_directory, write_mark
    from megatron_internvlx.data.sources.survey import Survey, SurveySettings
    from megatron_internvlx.data.tokenizer import load_tokenizer

    if options.out is None and not options.check:
        raise ValueError("--out DIR is needed, or --check to write nothing")
    settings, most = encoder_settings(options)
    tokenizer = load_tokenizer(options.tokenizer_model) if options.tokenizer_model else None
    sources = _open_sources(options)
    survey_settings = SurveySettings(
        settings,
        most,
        options.strip_prefix,
        options.copy,
        options.limit,
        not options.headers_only,
        options.threads,
        options.rounds,
    )
    if options.check:
        with tempfile.TemporaryDirectory() as folder:
            survey = Survey(Path(folder), survey_settings)
            survey.run(sources, _progress())
            _report(survey.reports)
            if not len(survey):
                raise _nothing_usable(survey.reports)
        return
    made_from = _made_from(options, sources)
    if finished(options.out, made_from, force=options.force):
        print(
            f"{options.out} is complete and made from the same files and settings: nothing to do (--force redoes it)"
        )
        return
    with working_directory(options.out) as work:
        survey = Survey(work, survey_settings)
        survey.run(sources, _progress())
        _report(survey.reports)
        if not len(survey):
            raise _nothing_usable(survey.reports)
        train, held_out = _write(work, survey, options, settings, tokenizer)
        write_mark(work, made_from, {"train": train, "validation": held_out})
    if any(report.left_out for report in survey.reports):
        print(f"every left-out record: {options.out / 'left_out.jsonl'}")
    _summary(options.out, train, held_out, options.energon)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        run(options)
    except (ValueError, OSError) as error:
        sys.stdout.flush()
        print(f"ivlx prepare: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("ivlx prepare: stopped; the same command continues", file=sys.stderr)
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
