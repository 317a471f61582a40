"""Draw the demo's data set: images of shapes, blobs and words, questions about them, and a tokenizer.

    python tools/make_demo_data.py --out build/demo-data --train 2400 --val 320 --seed 0

The directory it writes (all paths inside it are relative to it):

    meta.json, meta_val.json    InternVL meta files of the training and the held-out samples
    train.jsonl, val.jsonl      InternVL chat records, with the extra keys `kind` and `kinds`
    images/train, images/val    JPEG and PNG, from 40x40 to 1000x600
    tokenizer/                  a Hugging Face directory for AutoTokenizer
    demo_data.json              the settings; the tool overwrites only directories with this file

A model of one or two million parameters should learn this from scratch in minutes on a CPU. Hence closed
answer sets, answers of one token, strong contrast, and mostly questions about colour. Two runs with the same
settings write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
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
from tools.demo_pictures import COLOURS, COUNTS, SHAPES, WORDS, Picture, draw_picture, shape_picture

# ------------------------------------------------------------------------------------------------ knobs

FORMAT_VERSION = 1
MARK = "demo_data.json"

# How often a picture of each kind is drawn. Colours are learnt first and make up most; forms need several
# times as many samples.
KIND_WEIGHTS = {
    "background": 0.24,
    "shape_colour": 0.28,
    "upper": 0.08,
    "lower": 0.08,
    "shape": 0.11,
    "count": 0.10,
    "word": 0.11,
}
# Every cycle of twenty samples holds this many of the other forms.
CYCLE = 20
TWO_ROUNDS_PER_CYCLE = 10
TWO_IMAGES_PER_CYCLE = 1
TEXT_ONLY_PER_CYCLE = 1

# (weight, width range, height range). The names tell the grid that RVTC's edge policy picks at tile size
# 224 with at most 6 tiles; the last three also give 3, 4 and 6 tiles at tile size 448. Five tiles at 448
# would need an image longer than 1000 pixels.
SIZE_CLASSES: dict[str, tuple[float, tuple[int, int], tuple[int, int]]] = {
    "one": (0.68, (40, 224), (40, 224)),
    "two_wide": (0.08, (360, 440), (180, 220)),
    "two_tall": (0.06, (180, 220), (360, 440)),
    "three_wide": (0.03, (600, 660), (200, 220)),
    "three_tall": (0.03, (190, 205), (560, 600)),
    "four_square": (0.05, (390, 440), (390, 440)),
    "five_wide": (0.02, (960, 1000), (180, 200)),
    "three_448": (0.01, (920, 1000), (290, 320)),
    "four_448": (0.02, (710, 740), (585, 600)),
    "six_448": (0.02, (890, 1000), (590, 600)),
}
# Longer images than this (long side over short side) get no forms to name, count or read: the tiles stretch
# them to squares, and a circle would no longer look like one.
MAX_ASPECT_FOR_FORMS = 1.7
MIN_SIDE_FOR_WORDS = 90  # pixels; smaller letters are unreadable
JPEG_QUALITY = 92

# ------------------------------------------------------------------------------------- questions, answers

QUESTIONS = {
    "background": "What colour is the background?",
    "shape_colour": "What colour is the shape?",
    "upper": "What colour is the upper half?",
    "lower": "What colour is the lower half?",
    "shape": "Which shape is it?",
    "count": "How many dots are there?",
    "word": "Which word is written?",
}
TWO_IMAGES_QUESTION = "What colour is the background of the {which} image?"
TEXT_QUESTION = "Say the word {word}."
# The two questions about a picture, where a sample that would ask the one kind has two rounds.
TWO_ROUNDS = {
    "background": ("background", "shape_colour"),
    "shape_colour": ("background", "shape_colour"),
    "upper": ("upper", "lower"),
    "lower": ("lower", "upper"),
    "shape": ("shape", "background"),
    "count": ("count", "background"),
    "word": ("word", "background"),
}

# A short system turn takes the place of the template's own, which is ten times as long as a question and
# would double the cost of a step on a CPU.
SYSTEM_TURN = {"from": "system", "value": "Answer with one word."}

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

# ------------------------------------------------------------------------------------------------ samples


def _pick_size(rng: random.Random, index: int) -> tuple[int, int]:
    names = list(SIZE_CLASSES)
    weights = [weight for weight, _, _ in SIZE_CLASSES.values()]
    # The first samples go through the classes one by one, so that small sets hold every tile count too.
    name = names[index] if index < len(names) else rng.choices(names, weights)[0]
    _, width, height = SIZE_CLASSES[name]
    return rng.randint(*width), rng.randint(*height)


def _pick_kind(rng: random.Random, size: tuple[int, int]) -> str:
    kinds = dict(KIND_WEIGHTS)
    if max(size) > MAX_ASPECT_FOR_FORMS * min(size):
        kinds = {kind: kinds[kind] for kind in ("background", "shape_colour", "upper", "lower")}
    elif min(size) < MIN_SIDE_FOR_WORDS:
        del kinds["word"]
    return rng.choices(list(kinds), list(kinds.values()))[0]


def _make_turns(*rounds: tuple[str, str]) -> list[dict[str, str]]:
    return [SYSTEM_TURN] + [
        {"from": role, "value": value}
        for question, answer in rounds
        for role, value in (("human", question), ("gpt", answer))
    ]


def _save(rng: random.Random, picture: Picture, folder: Path, stem: str) -> str:
    if rng.random() < 0.5:
        # No chroma subsampling: at 40 pixels it smears the colours that the questions are about.
        picture.image.save(folder / f"{stem}.jpg", quality=JPEG_QUALITY, subsampling=0)
        return f"{stem}.jpg"
    picture.image.save(folder / f"{stem}.png", compress_level=3)
    return f"{stem}.png"


def _text_only(rng: random.Random) -> dict[str, Any]:
    word = rng.choice(WORDS)
    rounds = _make_turns((TEXT_QUESTION.format(word=word), word))
    return {"conversations": rounds, "kind": "text_only", "kinds": ["text_only"]}


def _two_images(rng: random.Random, folder: Path, stem: str) -> dict[str, Any]:
    names, widths, heights, colours = [], [], [], []
    for number in "ab":
        size = (rng.randint(40, 224), rng.randint(40, 224))
        picture = shape_picture(rng, "background", size)
        names.append(_save(rng, picture, folder, stem + number))
        widths.append(size[0])
        heights.append(size[1])
        colours.append(picture.answers["background"])
    which = rng.randrange(2)
    question = TWO_IMAGES_QUESTION.format(which=("first", "second")[which])
    text = f"Image-1: <image>\nImage-2: <image>\n{question}"
    return {
        "image": names,
        "width_list": widths,
        "height_list": heights,
        "conversations": _make_turns((text, colours[which])),
        "kind": "two_images",
        "kinds": ["two_images"],
    }


def make_sample(seed: int, split: str, index: int, folder: Path) -> dict[str, Any]:
    """Draw sample `index` of `split` into `folder`; returns its JSONL record.

    Every sample has its own random stream: sample 7 is the same in a large and in a small set.
    """
    rng = random.Random(f"{seed}/{split}/{index}")
    stem = f"{index:06d}"
    place = index % CYCLE
    record: dict[str, Any] = {"id": index}
    if place >= CYCLE - TEXT_ONLY_PER_CYCLE:
        return record | _text_only(rng)
    if place >= CYCLE - TEXT_ONLY_PER_CYCLE - TWO_IMAGES_PER_CYCLE:
        return record | _two_images(rng, folder, stem)
    size = _pick_size(rng, index)
    kinds = [_pick_kind(rng, size)]
    if place >= CYCLE - TEXT_ONLY_PER_CYCLE - TWO_IMAGES_PER_CYCLE - TWO_ROUNDS_PER_CYCLE:
        kinds = list(TWO_ROUNDS[kinds[0]])
    picture = draw_picture(rng, kinds[0], size)
    rounds = [(QUESTIONS[kind], picture.answers[kind]) for kind in kinds]
    rounds[0] = (f"<image>\n{rounds[0][0]}", rounds[0][1])
    return record | {
        "image": _save(rng, picture, folder, stem),
        "width": size[0],
        "height": size[1],
        "conversations": _make_turns(*rounds),
        "kind": kinds[0] if len(kinds) == 1 else "two_rounds",
        "kinds": kinds,
    }


# ---------------------------------------------------------------------------------------------- tokenizer


def answer_words() -> list[str]:
    """All possible answers in the data."""
    return [*COLOURS, *SHAPES, *COUNTS, *WORDS]


def _tokenizer_text() -> list[str]:
    """Text to train the tokenizer, weighted so that answers become single tokens first, then questions."""
    words = [f"{word}\n{word}" for word in answer_words()]
    questions = [*QUESTIONS.values()]
    questions += [TWO_IMAGES_QUESTION.format(which=which) for which in ("first", "second")]
    questions += [TEXT_QUESTION.format(word=word) for word in WORDS]
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


def _write_split(root: Path, split: str, count: int, seed: int) -> None:
    folder = root / "images" / split
    folder.mkdir(parents=True)
    with (root / f"{split}.jsonl").open("w", encoding="utf-8") as out:
        for index in tqdm(range(count), desc=f"drawing {split}", disable=not sys.stderr.isatty()):
            record = make_sample(seed, split, index, folder)
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


def make_demo_data(out: Path, *, train: int, val: int, seed: int, vocab_size: int, force: bool) -> bool:
    """Write the data set to `out`; returns False if a complete one with these settings exists.

    The files are written to a temporary directory next to `out`, which is renamed at the end, so a killed run
    leaves no incomplete data set. Raises ValueError if `out` has other content.
    """
    settings = {"version": FORMAT_VERSION, "train": train, "val": val, "seed": seed, "vocab_size": vocab_size}
    found = _read_settings(out)
    if found == settings and not force:
        return False
    if found is not None and found != settings and not force:
        raise ValueError(f"{out} has data made with {found}, not {settings}: use --force to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for split, count in (("train", train), ("val", val)):
            _write_split(work, split, count, seed)
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
        "--train", type=int_in_range(1, 10_000_000), default=2400, help="number of training samples"
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
