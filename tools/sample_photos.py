"""Make a folder of photographs with a table of questions, for a first try of `ivlx prepare` without own pictures.

    python tools/sample_photos.py photos

It writes 100 crops of the photographs that scikit-image and scikit-learn ship (JPEG, of many sizes and shapes), and
`questions.csv` with the columns image, question and answer, two questions for each. The same settings write the same
bytes.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageOps

if __name__ == "__main__":  # works without an installed package too
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_internvlx.commands.values import int_in_range

# Photograph -> answers to the two questions.
PHOTOS = {
    "skimage/data/astronaut.png": ("an astronaut", "people"),
    "skimage/data/chelsea.png": ("a cat", "animals"),
    "skimage/data/coffee.png": ("coffee", "food"),
    "skimage/data/rocket.jpg": ("a rocket", "machines"),
    "skimage/data/motorcycle_left.png": ("a motorcycle", "machines"),
    "skimage/data/coins.png": ("coins", "money"),
    "skimage/data/grass.png": ("grass", "plants"),
    "skimage/data/hubble_deep_field.jpg": ("stars", "the sky"),
    "sklearn/datasets/images/china.jpg": ("a temple", "buildings"),
    "sklearn/datasets/images/flower.jpg": ("a flower", "plants"),
}
QUESTIONS = ("What is in the picture?", "What is the picture about?")
LARGEST = 640  # longer side of a crop, in pixels


def find_photo(name: str) -> Path:
    """Path of a photograph in an installed package. Raises ValueError if the package is missing."""
    package, _, rest = name.partition("/")
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / rest if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ValueError(f"{name}: not installed; `make setup` installs scikit-image and scikit-learn")
    return path


def crops(count: int, seed: int) -> Iterator[tuple[Image.Image, tuple[str, str]]]:
    """Yield `count` crops, the photographs in turn, each with the answers to `QUESTIONS`."""
    dice = random.Random(seed)
    sources = []
    for name, answers in PHOTOS.items():
        with Image.open(find_photo(name)) as photo:
            sources.append((photo.convert("RGB"), answers))
    for number in range(count):
        image, answers = sources[number % len(sources)]
        width, height = (round(side * dice.uniform(0.6, 1)) for side in image.size)
        left, top = dice.randint(0, image.width - width), dice.randint(0, image.height - height)
        crop = image.crop((left, top, left + width, top + height))
        crop.thumbnail((LARGEST, LARGEST))
        yield (ImageOps.mirror(crop) if dice.random() < 0.5 else crop), answers


def write(out: Path, count: int, seed: int) -> None:
    """Write the folder `out`, which gets its name when it is complete. Raises ValueError if it exists."""
    if out.exists():
        raise ValueError(f"{out} exists: give the name of a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as partial:
        folder = Path(partial) / out.name
        folder.mkdir()
        with (folder / "questions.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(("image", "question", "answer"))
            for number, (image, answers) in enumerate(crops(count, seed)):
                name = f"photo_{number:03}.jpg"
                image.save(folder / name, quality=92)
                table.writerows((name, *pair) for pair in zip(QUESTIONS, answers, strict=True))
        folder.rename(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder; returns the exit code: 0, or 2 for a mistake."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write; it must be new")
    parser.add_argument("--count", type=int_in_range(1, 100_000), default=100, help="number of photographs")
    parser.add_argument("--seed", type=int_in_range(0), default=0)
    options = parser.parse_args(argv)
    try:
        write(options.out, options.count, options.seed)
    except (OSError, ValueError) as error:
        print(f"sample_photos.py: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {options.count} photographs, {2 * options.count} questions in questions.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
