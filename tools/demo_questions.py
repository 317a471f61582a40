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
MAX_TILES = 6  # the recipe's, without the thumbnail
MIN_SIDE = TILE * 2 // 3  # of a picture of one tile, in pixels

# The question about each thing, and its kind.
THING_QUESTIONS = {
    "digit": ("digit", "Which digit?"),
    "shape": ("shape", "Which shape?"),
    "dots": ("count", "How many dots?"),
    "word": ("word", "Which word?"),
    "star": ("position", "Where is the star?"),
}
BACKGROUND_QUESTION = "Background colour?"
COLOUR_QUESTION = "Colour of the {thing}?"
HALF_QUESTION = "Colour of the {which} half?"
TWO_IMAGES_QUESTION = "Background colour of the {which} image?"
TEXT_QUESTION = "Say the word {word}."
KINDS = frozenset(kind for kind, _ in THING_QUESTIONS.values()) | {
    "background", "colour", "half", "two_images", "text_only",
}  # fmt: skip
"""Kinds of the demo's questions."""
# Not among the demo's questions: for a data set of its own, to teach a trained model something new.
NEXT_QUESTION = "Which digit comes next?"
NEW_KINDS = ("next_digit",)

# A short system turn takes the place of the template's own, which is ten times as long as a question and
# would double the cost of a step on a CPU.
SYSTEM_TURN = {"from": "system", "value": "Answer with one word."}

# The samples go through this cycle: a thing in a picture of its own, or another form. What is learnt late, such as
# counts and what belongs to which image, is asked more often than what is learnt early, such as words.
CYCLE = (
    "digit", "dots", "two_images", "panels", "digit", "shape", "halves", "dots", "star", "two_images",
    "word", "panels", "digit", "dots", "halves", "two_images", "shape", "digit", "dots", "text_only",
)  # fmt: skip

# Grids of panels, columns and rows, as often as they are dealt. A panel is a tile or less; the largest grid is drawn
# with more pixels than the tiles hold.
GRIDS = ((2, 1),) * 6 + ((1, 2),) * 5 + ((2, 2),) * 4 + ((3, 1), (1, 3)) + ((5, 1), (3, 2))
PANEL_THINGS = ("digit", "shape", "dots", "word", "star")
JPEG_QUALITY = 92

Round = tuple[str, str, str]
"""Kind, question, answer."""


def deal[Card](seed: str, number: int, cards: Sequence[Card]) -> Card:
    """Result of the `number`-th draw: the cards are shuffled and dealt one by one, again and again."""
    pack, place = divmod(number, len(cards))
    return random.Random(f"{seed}/{pack}").sample(cards, len(cards))[place]


def _ask(thing: str, picture: Picture) -> list[Round]:
    """The question about a thing; both questions about halves."""
    if thing == "halves":
        return [
            ("half", HALF_QUESTION.format(which=half), picture.facts[half]) for half in ("upper", "lower")
        ]
    kind, question = THING_QUESTIONS[thing]
    return [(kind, question, picture.facts[thing])]


def _ask_colour(rng: random.Random, thing: str, picture: Picture) -> list[Round]:
    """A question about one of the two colours; none about halves."""
    if thing == "halves":
        return []
    if rng.random() < 0.5:
        return [("background", BACKGROUND_QUESTION, picture.facts["background"])]
    return [("colour", COLOUR_QUESTION.format(thing=thing), picture.facts["colour"])]


class SampleDrawer:
    """Draws the samples of one split, each from its own random stream: sample 7 is the same in a large and in a
    small set.

    Args:
        seed: of the data set.
        split: `train`, or `val` with digits that are in no training picture.
        folder: directory for the pictures.
        only: one of NEW_KINDS, of which all questions are then. None: the demo's questions.
    """

    def __init__(self, seed: int, split: str, folder: Path, only: str | None = None) -> None:
        self.seed, self.held_out, self.folder = f"{seed}/{split}", split == "val", folder
        self.only = only

    def draw(self, index: int) -> dict[str, Any]:
        """Draw the pictures of a sample; returns its JSONL record."""
        rng = random.Random(f"{self.seed}/{index}")
        if self.only:
            return {"id": index, **self._next_digit(rng, f"{index:06d}", index)}
        cycle, place = divmod(index, len(CYCLE))
        form = CYCLE[place]
        number = cycle * CYCLE.count(form) + CYCLE[:place].count(form)
        stem = f"{index:06d}"
        if form == "text_only":
            words = rng.sample(WORDS, 3)
            rounds = [("text_only", TEXT_QUESTION.format(word=word), word) for word in words]
            return {"id": index, **_conversation(rounds)}
        if form == "two_images":
            return {"id": index, **self._two_images(rng, stem, number)}
        if form == "panels":
            image, rounds = self._panels(rng, number)
        else:
            size = rng.randint(MIN_SIDE, TILE), rng.randint(MIN_SIDE, TILE)
            picture = self._draw_thing(rng, form, size, form, number)
            image, rounds = picture.image, _ask(form, picture) + _ask_colour(rng, form, picture)
        rng.shuffle(rounds)
        sizes = {"width": image.width, "height": image.height}
        return {
            "id": index,
            "image": self._save(rng, image, stem),
            **sizes,
            **_conversation(rounds, "<image>\n"),
        }

    def _next_digit(self, rng: random.Random, stem: str, number: int) -> dict[str, Any]:
        size = rng.randint(MIN_SIDE, TILE), rng.randint(MIN_SIDE, TILE)
        picture = self._draw_thing(rng, "digit", size, "next_digit", number)
        answer = str((int(picture.facts["digit"]) + 1) % 10)
        name = self._save(rng, picture.image, stem)
        sizes = {"width": picture.image.width, "height": picture.image.height}
        return {"image": name, **sizes, **_conversation([("next_digit", NEXT_QUESTION, answer)], "<image>\n")}

    def _draw_thing(
        self, rng: random.Random, thing: str, size: tuple[int, int], form: str, number: int
    ) -> Picture:
        """Draw a thing for the `number`-th sample of a form; its answer is dealt."""
        answer = deal(f"{self.seed}/{form}/{thing}", number, THINGS[thing])
        return draw_picture(rng, thing, answer, size, held_out=self.held_out)

    def _panels(self, rng: random.Random, number: int) -> tuple[Image.Image, list[Round]]:
        """Several things side by side, each at most once, so that questions need not say where."""
        columns, rows = deal(f"{self.seed}/grids", number, GRIDS)
        most = 2 * TILE if columns * rows == MAX_TILES else TILE
        width, height = rng.randint(most * 3 // 4, most), rng.randint(most * 3 // 4, most)
        image = Image.new("RGB", (columns * width, rows * height), COLOURS["white"])
        things = rng.sample(PANEL_THINGS, min(len(PANEL_THINGS), columns * rows))
        places = rng.sample(range(columns * rows), len(things))
        rounds: list[Round] = []
        for thing, place in zip(things, places, strict=True):
            picture = self._draw_thing(rng, thing, (width, height), "panels", number)
            image.paste(picture.image, (place % columns * width, place // columns * height))
            rounds += _ask(thing, picture)
            if len(rounds) == 1:
                rounds.append(("colour", COLOUR_QUESTION.format(thing=thing), picture.facts["colour"]))
        return image, rounds

    def _two_images(self, rng: random.Random, stem: str, number: int) -> dict[str, Any]:
        things = rng.sample(PANEL_THINGS, 2)
        names, widths, heights, rounds = [], [], [], []
        for letter, which, thing in zip("ab", ("first", "second"), things, strict=True):
            size = rng.randint(MIN_SIDE, TILE), rng.randint(MIN_SIDE, TILE)
            picture = self._draw_thing(rng, thing, size, f"two_images/{which}", number)
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
