"""Prepare the data sets of InternVL's meta.json for the Energon loader, and show statistics of them.

    python tools/prepare_data.py META.json OUT [--validation 0.01] [--verify] [--to-webdataset]
    python tools/prepare_data.py stats OUT --tokenizer-model DIR [--png stats.png] [--seq-length 8192 ...]

The first command indexes annotations in place, measures every image once, and lists broken images and
lines in OUT/broken.jsonl; the same command continues a stopped run. The second prints and draws sizes, tiles
and tokens per RVTC policy, the fill of packs, and the share of compute saved.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_internvlx.commands.values import float_in_range, int_in_range
from megatron_internvlx.config import TrainSettings, check_supervised_budget
from megatron_internvlx.data.conversation import TEMPLATES
from megatron_internvlx.data.packing import Budget
from megatron_internvlx.data.prepare import PrepareSettings, prepare
from megatron_internvlx.data.prepared import BROKEN_LIST, read_broken


def _prepare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="'prepare_data.py stats OUT --help' explains the statistics.",
    )
    parser.add_argument("meta", type=Path, help="InternVL meta.json; its paths may be object-store URLs")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument(
        "--validation",
        type=float_in_range(0, 1),
        default=0.0,
        help="held-out share of each set, its last records",
    )
    parser.add_argument("--verify", action="store_true", help="decode every image, not only its header")
    parser.add_argument(
        "--to-webdataset", action="store_true", help="write tar shards with unchanged image files"
    )
    parser.add_argument("--shard-size", type=int_in_range(1), default=1000, help="records per shard")
    parser.add_argument(
        "--threads", type=int_in_range(1, 4096), default=8, help="images measured in parallel"
    )
    return parser


def run_prepare(argv: Sequence[str]) -> None:
    """Prepare all data sets, and print a line for each."""
    options = vars(_prepare_parser().parse_args(argv))
    meta, out = options.pop("meta"), options.pop("out")
    for data_set in prepare(meta, out, PrepareSettings(**options)):
        print(
            f"{data_set.name}: {data_set.train} records x {data_set.repeat_time:g}, {data_set.validation} kept "
            f"for validation, {data_set.images} images, {data_set.broken_images} of them broken, "
            f"{data_set.broken_records} broken records"
        )
    causes = Counter(bad.cause for bad in read_broken(out / BROKEN_LIST))
    if causes:
        counts = ", ".join(f"{cause} {count}" for cause, count in causes.most_common())
        print(f"{causes.total()} broken images and lines ({counts}): {out / BROKEN_LIST}", file=sys.stderr)
    print(f"train with: --loader energon --data {out}")


def _stats_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare_data.py stats", description="Show statistics of prepared data."
    )
    parser.add_argument("out", type=Path, help="prepared directory")
    parser.add_argument("--tokenizer-model", required=True, help="Hugging Face tokenizer directory")
    parser.add_argument("--conversation-template", default="internvl2_5", choices=sorted(TEMPLATES))
    parser.add_argument("--png", type=Path, help="picture to write")
    parser.add_argument("--samples", type=int_in_range(1), default=20_000, help="number of records used")
    parser.add_argument("--model-preset", help="model whose compute is predicted, e.g. internvlx_8b")
    parser.add_argument("--image-size", type=int_in_range(1, 65_536), default=448)
    parser.add_argument("--patch-size", type=int_in_range(1, 4096), default=14)
    parser.add_argument("--low-ratio", type=float_in_range(0, 1, above=True), default=0.25)
    parser.add_argument("--high-ratio", type=float_in_range(0, 1, above=True), default=0.5)
    parser.add_argument("--max-tiles", type=int_in_range(1, 4096), default=12)
    parser.add_argument("--no-thumbnail", action="store_true")
    parser.add_argument("--seq-length", type=int_in_range(1), help="packing budget of deep tokens")
    parser.add_argument("--shallow-seq-length", type=int_in_range(1), help="packing budget of shallow tokens")
    parser.add_argument("--max-tiles-per-pack", type=int_in_range(1, 65_536), help="packing budget of tiles")
    parser.add_argument(
        "--max-supervised-tokens-per-pack", type=int_in_range(1), help="packing budget of tokens with a loss"
    )
    return parser


def run_stats(argv: Sequence[str]) -> None:
    """Print the table of statistics, and draw the picture."""
    options = _stats_parser().parse_args(argv)
    from megatron_internvlx.config import grid_side
    from megatron_internvlx.data.sample import EncoderSettings, SampleEncoder
    from megatron_internvlx.data.tokenizer import load_tokenizer
    from megatron_internvlx.planning import statistics as stats

    if options.patch_size < 1 or options.image_size % options.patch_size:
        raise ValueError(
            f"--image-size {options.image_size} must be a multiple of --patch-size {options.patch_size}"
        )
    if options.samples < 1:
        raise ValueError(f"--samples {options.samples}: must be at least 1")
    most = options.max_supervised_tokens_per_pack
    if not options.seq_length and (options.shallow_seq_length or options.max_tiles_per_pack or most):
        raise ValueError(
            "--shallow-seq-length, --max-tiles-per-pack and --max-supervised-tokens-per-pack need --seq-length, the "
            "deep budget"
        )
    patches = options.image_size // options.patch_size
    low = grid_side(patches, options.low_ratio, "--low-ratio")
    high = grid_side(patches, options.high_ratio, "--high-ratio")
    settings = EncoderSettings(
        template=options.conversation_template,
        tile_size=options.image_size,
        max_tiles=options.max_tiles,
        use_thumbnail=not options.no_thumbnail,
        tokens_per_tile=high**2,
        shallow_tokens_per_tile=low**2,
    )
    budget = None
    if options.seq_length:
        budget = Budget(
            options.shallow_seq_length or options.seq_length,
            options.seq_length,
            options.max_tiles_per_pack,
            supervised=most,
        )
        for name, rows, tile in (
            ("--seq-length", budget.deep, high**2),
            ("--shallow-seq-length", budget.shallow, low**2),
        ):
            if rows <= tile:
                raise ValueError(
                    f"{name} {rows} is too small for one tile of {tile} tokens and some text: raise it"
                )
        fixed = TrainSettings(boundary="static", max_supervised_tokens_per_pack=most)
        check_supervised_budget(fixed, entry_rows=budget.shallow, samples=1)
    encoder = SampleEncoder(load_tokenizer(options.tokenizer_model), settings)
    found = stats.collect(options.out, encoder, limit=options.samples)
    if budget:
        over = stats.add_fill(found, budget)
        if over:
            print(
                f"{over} samples exceed a budget by themselves and were cut to it, or would be refused in training"
            )
    if options.model_preset:
        flags = ("image_size", "patch_size", "low_ratio", "high_ratio")
        stats.add_flops(found, options.model_preset, {name: getattr(options, name) for name in flags})
    print(stats.table(found, budget))
    if options.png:
        stats.draw(found, options.png, budget)
        print(f"picture: {options.png}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["stats"]:
            run_stats(argv[1:])
        else:
            run_prepare(argv)
    except (ValueError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare_data: stopped; the same command continues", file=sys.stderr)
        return 130
    return 0
