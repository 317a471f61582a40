"""Draw the pictures of the demo's data set: handwritten digits, shapes, dots, words, a star, halves.

A model of a million parameters that sees a picture for the first time should read it after minutes of training.
Hence large forms, and ink that is darker than the paper everywhere: with one polarity a model need not learn each
form once per pair of colours.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Pale papers and dark inks: the contrast is alike for every pair, so a form is learnt once and not once per pair.
PAPERS = {
    "white": (245, 245, 245),
    "yellow": (250, 240, 120),
    "orange": (255, 185, 105),
    "cyan": (140, 235, 240),
    "pink": (250, 165, 225),
}
INKS = {
    "black": (15, 15, 15),
    "red": (150, 15, 20),
    "green": (15, 95, 25),
    "blue": (25, 30, 150),
    "purple": (110, 20, 130),
}
COLOURS = PAPERS | INKS
COLOUR_NOISE = 12  # every channel of a drawn colour is off by at most this, of 255

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COUNTS = ("one", "two", "three", "four", "five")
DIGITS = tuple("0123456789")
WORDS = ("cat", "dog", "sun", "box", "key", "fly")
PLACES = ("left", "right", "top", "bottom", "middle")
# Centre of the star, in parts of width and height.
_PLACE_CENTRES = {
    "left": (0.2, 0.5),
    "right": (0.8, 0.5),
    "top": (0.5, 0.2),
    "bottom": (0.5, 0.8),
    "middle": (0.5, 0.5),
}

# What a picture can show, and the answers to the question about it.
THINGS: dict[str, tuple[str, ...]] = {
    "digit": DIGITS,
    "shape": SHAPES,
    "dots": COUNTS,
    "word": WORDS,
    "star": PLACES,
    "halves": tuple(COLOURS),
}
HELD_OUT_DIGIT = 5  # one handwritten digit of so many is kept for the held-out pictures

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Picture:
    """Drawn image, and what there is to know about it: `background`, `colour` of the ink, `answer` and so on."""

    image: Image.Image
    facts: dict[str, str]


@lru_cache(maxsize=1)
def _handwritten() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 8, 8] with values 0 to 16, and their digits [1797]; scikit-learn's, on disk."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    return images.reshape(-1, 8, 8), digits


def handwritten_digits(digit: str, *, held_out: bool) -> list[int]:
    """Numbers of the handwritten images of a digit: the held-out ones, or those for training."""
    _, digits = _handwritten()
    return [int(n) for n in np.flatnonzero(digits == int(digit)) if (n % HELD_OUT_DIGIT == 0) == held_out]


def _add_colour_noise(rng: random.Random, colour: str) -> Colour:
    r, g, b = (min(255, max(0, c + rng.randint(-COLOUR_NOISE, COLOUR_NOISE))) for c in COLOURS[colour])
    return r, g, b


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: tuple[float, ...], fill: Colour) -> None:
    x0, y0, x1, y1 = box
    middle_x, middle_y, radius = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=round(0.4 * radius))
    elif shape == "star":
        angles = [math.pi * n / 5 for n in range(10)]
        reach = [radius * (0.5 if n % 2 else 1.15) for n in range(10)]
        draw.polygon(
            [
                (middle_x + r * math.sin(a), middle_y - r * math.cos(a))
                for a, r in zip(angles, reach, strict=True)
            ],
            fill=fill,
        )
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "triangle":
        draw.polygon([(x0, y1), (x1, y1), (middle_x, y0)], fill=fill)
    else:
        third_x, third_y = (x1 - x0) / 3, (y1 - y0) / 3
        draw.rectangle((x0 + third_x, y0, x1 - third_x, y1), fill=fill)
        draw.rectangle((x0, y0 + third_y, x1, y1 - third_y), fill=fill)


def _paste_mask(rng: random.Random, image: Image.Image, mask: Image.Image, part: float, fill: Colour) -> None:
    """Stretch `mask` over the middle `part` of the image, a little to a side, and paint it."""
    width, height = image.size
    size = max(1, round(width * part)), max(1, round(height * part))
    room = width - size[0], height - size[1]
    corner = round(room[0] * rng.uniform(0.3, 0.7)), round(room[1] * rng.uniform(0.3, 0.7))
    image.paste(fill, corner, mask.resize(size, Image.Resampling.BICUBIC))


def _draw_digit(rng: random.Random, image: Image.Image, digit: str, fill: Colour, *, held_out: bool) -> None:
    images, _ = _handwritten()
    grey = images[rng.choice(handwritten_digits(digit, held_out=held_out))] * (255 / 16)
    _paste_mask(rng, image, Image.fromarray(grey.astype(np.uint8)), rng.uniform(0.85, 1.0), fill)


@lru_cache(maxsize=len(WORDS))
def _word_mask(word: str) -> Image.Image:
    font = ImageFont.load_default(size=60)
    bounds = font.getmask(word.upper(), mode="L", stroke_width=3).size
    mask = Image.new("L", (int(bounds[0]) + 20, int(bounds[1]) + 20))
    middle = mask.width / 2, mask.height / 2
    ImageDraw.Draw(mask).text(middle, word.upper(), fill=255, font=font, anchor="mm", stroke_width=3)
    return mask.crop(mask.getbbox())


def _draw_word(rng: random.Random, image: Image.Image, word: str, fill: Colour) -> None:
    # Stretched over the picture, so that every letter covers a third of its width.
    _paste_mask(rng, image, _word_mask(word), rng.uniform(0.85, 0.95), fill)


def _draw_dots(rng: random.Random, image: Image.Image, count: str, fill: Colour) -> None:
    """Dots on a grid of three by three places, no two on the same one."""
    width, height = image.size
    draw = ImageDraw.Draw(image)
    # So that tiles, which stretch pictures to squares, hold the same amount of ink per dot.
    radius = 0.125 * (width * height) ** 0.5
    for slot in rng.sample(range(9), COUNTS.index(count) + 1):
        x = width * (0.19 + 0.31 * (slot % 3) + rng.uniform(-0.02, 0.02))
        y = height * (0.19 + 0.31 * (slot // 3) + rng.uniform(-0.02, 0.02))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def draw_picture(
    rng: random.Random, thing: str, answer: str, size: tuple[int, int], *, held_out: bool
) -> Picture:
    """Draw a `thing` of `size` (width, height), about which `answer` is right.

    `halves` are two colours without a form, and `answer` is that of the upper one.
    """
    width, height = size
    if thing == "halves":
        lower = rng.choice([colour for colour in COLOURS if colour != answer])
        image = Image.new("RGB", size, _add_colour_noise(rng, answer))
        below = 0, round(height * rng.uniform(0.47, 0.53)), width, height
        ImageDraw.Draw(image).rectangle(below, fill=_add_colour_noise(rng, lower))
        return Picture(image, {"upper": answer, "lower": lower})
    paper, ink = rng.choice(list(PAPERS)), rng.choice(list(INKS))
    image = Image.new("RGB", size, _add_colour_noise(rng, paper))
    fill = _add_colour_noise(rng, ink)
    if thing == "digit":
        _draw_digit(rng, image, answer, fill, held_out=held_out)
    elif thing == "word":
        _draw_word(rng, image, answer, fill)
    elif thing == "dots":
        _draw_dots(rng, image, answer, fill)
    else:
        side = min(size) * (rng.uniform(0.3, 0.36) if thing == "star" else rng.uniform(0.65, 0.85))
        x, y = _PLACE_CENTRES[answer] if thing == "star" else (0.5, 0.5)
        x, y = width * (x + rng.uniform(-0.03, 0.03)), height * (y + rng.uniform(-0.03, 0.03))
        box = x - side / 2, y - side / 2, x + side / 2, y + side / 2
        _draw_shape(ImageDraw.Draw(image), "star" if thing == "star" else answer, box, fill)
    return Picture(image, {"background": paper, "colour": ink, thing: answer})
