"""Draw the demo's data set: pictures of handwritten digits, shapes, dots and words, questions, and a tokenizer.

    python tools/make_demo_data.py --out build/demo-data --train 8000 --val 320 --seed 0

The directory it writes (all paths inside it are relative to it):

    meta.json, meta_val.json    InternVL meta files of the training and the held-out samples
    train.jsonl, val.jsonl      InternVL chat records, with the extra key `kinds`, one for each answer
    images/train, images/val    JPEG and PNG, from 74x74 to 672x448
    tokenizer/                  a Hugging Face directory for AutoTokenizer
    demo_data.json              the settings; the tool overwrites only directories with this file

The digits are scikit-learn's 1,797 real ones; those of held-out pictures are in no training picture. Two runs with
the same settings write the same bytes. With `--only next_digit` all questions are of a kind that the demo never asks,
about digits, and the tokenizer is the demo's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

if __name__ == "__main__":  # works without an installed package too
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_internvlx.commands.values import int_in_range
from megatron_internvlx.data.conversation import TEMPLATES
from tools.demo_questions import NEW_KINDS, SYSTEM_TURN, SampleDrawer, all_questions, answer_words

# ------------------------------------------------------------------------------------------------ knobs

FORMAT_VERSION = 2
MARK = "demo_data.json"

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)

# ---------------------------------------------------------------------------------------------- tokenizer


def _tokenizer_text() -> list[str]:
    """Text to train the tokenizer, weighted so that answers become single tokens first, then questions."""
    words = [f"{word}\n{word}" for word in answer_words()]
    questions = all_questions()
    prompts = ["Image-1: \nImage-2: \n"]
    prompts += [f"system\n{SYSTEM_TURN['value']}", "user\n", "assistant\n"]
    systems = sorted({template.system for template in TEMPLATES.values()})
    return words * 40 + questions * 30 + prompts * 30 + systems * 10


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """Train a byte-level BPE with at most `vocab_size` tokens, and write a Hugging Face tokenizer directory."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_tokenizer_text(), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
    }
    _write_json(folder / "tokenizer_config.json", config)


# ---------------------------------------------------------------------------------------------- directory


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_split(root: Path, split: str, count: int, seed: int, only: str | None) -> None:
    folder = root / "images" / split
    folder.mkdir(parents=True)
    drawer = SampleDrawer(seed, split, folder, only)
    with (root / f"{split}.jsonl").open("w", encoding="utf-8") as out:
        for index in tqdm(range(count), desc=f"drawing {split}", disable=not sys.stderr.isatty()):
            record = drawer.draw(index)
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    meta = {
        f"demo_{split}": {
            "root": f"images/{split}",
            "annotation": f"{split}.jsonl",
            "data_augment": False,
            "repeat_time": 1,
            "length": count,
        }
    }
    _write_json(root / ("meta.json" if split == "train" else f"meta_{split}.json"), meta)


def _read_settings(out: Path) -> dict[str, Any] | None:
    """Read the settings of a directory made by this tool; None if `out` is missing or empty."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        return dict(json.loads((out / MARK).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise ValueError(
            f"{out} exists without a readable {MARK}, so it was not made by this tool: choose another --out"
        ) from None


def make_demo_data(
    out: Path, *, train: int, val: int, seed: int, vocab_size: int, force: bool, only: str | None = None
) -> bool:
    """Write the data set to `out`; returns False if a complete one with these settings exists.

    The files are written to a temporary directory next to `out`, which is renamed at the end, so a killed run
    leaves no incomplete data set. Raises ValueError if `out` has other content.
    """
    settings: dict[str, Any] = {"version": FORMAT_VERSION, "train": train, "val": val, "seed": seed}
    settings |= {"vocab_size": vocab_size, **({"only": only} if only else {})}
    found = _read_settings(out)
    if found == settings and not force:
        return False
    if found is not None and found != settings and not force:
        raise ValueError(f"{out} has data made with {found}, not {settings}: use --force to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for split, count in (("train", train), ("val", val)):
            _write_split(work, split, count, seed, only)
        make_tokenizer(work / "tokenizer", vocab_size)
        _write_json(work / MARK, settings)
        work.chmod(0o755)  # mkdtemp makes it private
        if out.exists():
            shutil.rmtree(out)
        work.replace(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return True


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with a message for invalid values."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--train", type=int_in_range(1, 10_000_000), default=8000, help="number of training samples"
    )
    parser.add_argument(
        "--val", type=int_in_range(1, 10_000_000), default=320, help="number of held-out samples"
    )
    parser.add_argument("--seed", type=int_in_range(0), default=0)
    parser.add_argument(
        "--vocab-size",
        type=int_in_range(1, 10_000_000),
        default=512,
        help="number of tokens, including special ones",
    )
    parser.add_argument(
        "--only", choices=NEW_KINDS, help="ask only this new kind of question (unset: the demo's)"
    )
    parser.add_argument("--force", action="store_true", help="replace a directory made by this tool")
    args = parser.parse_args(argv)
    floor = len(SPECIAL_TOKENS) + 256
    if args.vocab_size < floor:
        parser.error(
            f"--vocab-size {args.vocab_size}: must be at least {floor} (256 bytes and the special tokens)"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parse_args(argv)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    try:
        fresh = make_demo_data(args.out, **settings)
    except (ValueError, OSError) as error:
        print(f"make_demo_data: {error}", file=sys.stderr)
        return 2
    verb = "drew" if fresh else "kept"
    print(f"{verb} {args.train} training and {args.val} held-out samples in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
