"""Samples of the demo's data set: which pictures, and a conversation about them.

Questions are cheap beside pictures, so every picture is asked about all that is known about it. Closed sets of
answers of one token; no answer of a kind is much more common than the others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tools.demo_pictures import COLOURS, PAPERS, THINGS, WORDS, Picture, draw_picture

TILE = 112  # pixels; the recipe's tile size

# The question about each thing, and its kind.
THING_QUESTIONS = {
    "digit": ("digit", "Which digit?"),
    "shape": ("shape", "Which shape?"),
    "dots": ("count", "How many dots?"),
    "word": ("word", "Which word?"),
    "spot": ("position", "Where is the spot?"),
}
BACKGROUND_QUESTION = "Background colour?"
COLOUR_QUESTION = "Colour of the {thing}?"
HALF_QUESTION = "Colour of the {which} half?"
TWO_IMAGES_QUESTION = "Background colour of the {which} image?"
TEXT_QUESTION = "Say the word {word}."

# A short system turn takes the place of the template's own, which is ten times as long as a question and
# would double the cost of a step on a CPU.
SYSTEM_TURN = {"from": "system", "value": "Answer with one word."}

# The samples go through this cycle: the form, and the thing where the form has one.
CYCLE = (
    "digit", "panels", "word", "shape", "two_images", "digit", "dots", "panels", "word", "digit",
    "halves", "panels", "digit", "dots", "two_images", "word", "spot", "panels", "shape", "text_only",
)  # fmt: skip

# Grids of panels (columns, rows) with their weight, most seldom drawn larger than six tiles hold.
GRIDS = {(2, 1): 5, (1, 2): 5, (3, 1): 2, (1, 3): 2, (2, 2): 4, (5, 1): 1, (3, 2): 1}
PANEL_THINGS = ("digit", "shape", "dots", "word")
JPEG_QUALITY = 92

Round = tuple[str, str, str]
"""Kind, question, answer."""


def deal(seed: str, number: int, answers: Sequence[str]) -> str:
    """Answer of the `number`-th draw: the answers are shuffled and dealt like cards, again and again."""
    pack, place = divmod(number, len(answers))
    return random.Random(f"{seed}/{pack}").sample(answers, len(answers))[place]


def _ask(thing: str, picture: Picture) -> list[Round]:
    """Everything that is known about a picture but its background."""
    if thing == "halves":
        return [
            ("half", HALF_QUESTION.format(which=half), picture.facts[half]) for half in ("upper", "lower")
        ]
    kind, question = THING_QUESTIONS[thing]
    return [
        (kind, question, picture.facts[thing]),
        ("colour", COLOUR_QUESTION.format(thing=thing), picture.facts["colour"]),
    ]


def _background(picture: Picture) -> list[Round]:
    known = picture.facts.get("background")
    return [("background", BACKGROUND_QUESTION, known)] if known else []


class SampleDrawer:
    """Draws the samples of one split, each from its own random stream: sample 7 is the same in a large and in a
    small set.

    Args:
        seed: of the data set.
        split: `train`, or `val` with digits that are in no training picture.
        folder: directory for the pictures.
    """

    def __init__(self, seed: int, split: str, folder: Path) -> None:
        self.seed, self.held_out, self.folder = f"{seed}/{split}", split == "val", folder

    def draw(self, index: int) -> dict[str, Any]:
        """Draw the pictures of a sample; returns its JSONL record."""
        rng = random.Random(f"{self.seed}/{index}")
        cycle, place = divmod(index, len(CYCLE))
        form = CYCLE[place]
        stem = f"{index:06d}"
        if form == "text_only":
            words = rng.sample(WORDS, 3)
            rounds = [("text_only", TEXT_QUESTION.format(word=word), word) for word in words]
            return {"id": index, **_conversation(rounds)}
        if form == "two_images":
            return {"id": index, **self._two_images(rng, stem)}
        if form == "panels":
            image, rounds = self._panels(rng)
        else:
            number = cycle * CYCLE.count(form) + CYCLE[:place].count(form)
            answer = deal(f"{self.seed}/{form}", number, THINGS[form])
            size = rng.randint(TILE * 2 // 3, TILE), rng.randint(TILE * 2 // 3, TILE)
            picture = draw_picture(rng, form, answer, size, held_out=self.held_out)
            image, rounds = picture.image, _ask(form, picture) + _background(picture)
        rng.shuffle(rounds)
        sizes = {"width": image.width, "height": image.height}
        return {
            "id": index,
            "image": self._save(rng, image, stem),
            **sizes,
            **_conversation(rounds, "<image>\n"),
        }

    def _draw_thing(self, rng: random.Random, thing: str, size: tuple[int, int]) -> Picture:
        return draw_picture(rng, thing, rng.choice(THINGS[thing]), size, held_out=self.held_out)

    def _panels(self, rng: random.Random) -> tuple[Image.Image, list[Round]]:
        """Several things side by side, each at most once, so that questions need not say where."""
        columns, rows = rng.choices(list(GRIDS), list(GRIDS.values()))[0]
        width, height = rng.randint(TILE - 12, TILE), rng.randint(TILE - 12, TILE)
        image = Image.new("RGB", (columns * width, rows * height), COLOURS["white"])
        things = rng.sample(PANEL_THINGS, min(len(PANEL_THINGS), columns * rows))
        places = rng.sample(range(columns * rows), len(things))
        rounds: list[Round] = []
        for thing, place in zip(things, places, strict=True):
            picture = self._draw_thing(rng, thing, (width, height))
            image.paste(picture.image, (place % columns * width, place // columns * height))
            rounds += _ask(thing, picture)
        return image, rounds

    def _two_images(self, rng: random.Random, stem: str) -> dict[str, Any]:
        things = rng.sample(PANEL_THINGS, 2)
        names, widths, heights, rounds = [], [], [], []
        for letter, which, thing in zip("ab", ("first", "second"), things, strict=True):
            picture = self._draw_thing(
                rng, thing, (rng.randint(TILE * 2 // 3, TILE), rng.randint(TILE * 2 // 3, TILE))
            )
            names.append(self._save(rng, picture.image, stem + letter))
            widths.append(picture.image.width)
            heights.append(picture.image.height)
            question = TWO_IMAGES_QUESTION.format(which=which)
            rounds += [("two_images", question, picture.facts["background"]), *_ask(thing, picture)]
        rng.shuffle(rounds)
        sizes = {"width_list": widths, "height_list": heights}
        return {"image": names, **sizes, **_conversation(rounds, "Image-1: <image>\nImage-2: <image>\n")}

    def _save(self, rng: random.Random, image: Image.Image, stem: str) -> str:
        if rng.random() < 0.5:
            # No chroma subsampling: it smears the colours that the questions are about.
            image.save(self.folder / f"{stem}.jpg", quality=JPEG_QUALITY, subsampling=0)
            return f"{stem}.jpg"
        image.save(self.folder / f"{stem}.png", compress_level=1)
        return f"{stem}.png"


def _conversation(rounds: Sequence[Round], prefix: str = "") -> dict[str, Any]:
    """Turns of a record, the pictures before the first question; and the kinds of its questions."""
    turns = [SYSTEM_TURN]
    for number, (_, question, answer) in enumerate(rounds):
        turns.append({"from": "human", "value": question if number else prefix + question})
        turns.append({"from": "gpt", "value": answer})
    return {"conversations": turns, "kinds": [kind for kind, _, _ in rounds]}


def answer_words() -> list[str]:
    """All possible answers."""
    return list(dict.fromkeys([*(answer for answers in THINGS.values() for answer in answers), *PAPERS]))


def all_questions() -> list[str]:
    """All questions, in the order of their kinds."""
    return [
        *(question for _, question in THING_QUESTIONS.values()),
        BACKGROUND_QUESTION,
        *(COLOUR_QUESTION.format(thing=thing) for thing in THING_QUESTIONS),
        *(HALF_QUESTION.format(which=half) for half in ("upper", "lower")),
        *(TWO_IMAGES_QUESTION.format(which=which) for which in ("first", "second")),
        *(TEXT_QUESTION.format(word=word) for word in WORDS),
    ]
