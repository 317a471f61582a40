"""Draw the pictures of the demo's data set: coloured shapes, halves, dots and words.

Strong contrast and large forms: a model of a million parameters should read them after minutes of training.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

# The corners of the RGB cube, pulled in a little: as far apart as eight colours can be.
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 190, 50),
    "blue": (35, 50, 220),
    "yellow": (245, 230, 40),
    "cyan": (40, 215, 225),
    "pink": (240, 60, 215),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
GREY = (128, 128, 128)  # colour of parts that no question is about
# Shapes to name, dots to count and words to read are black on one of these: with the same polarity
# everywhere a model need not learn each form once per pair of colours.
LIGHT = ("white", "yellow", "cyan")
COLOUR_NOISE = 12  # every channel of a drawn colour is off by at most this, of 255
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = ("one", "two", "three", "four")
# Words of different lengths: they fill the image's width, so also the letters' size tells them apart.
WORDS = ("go", "cat", "stop", "bakery")


@dataclass(frozen=True)
class Picture:
    """Drawn image, and the answer to every kind of question about it."""

    image: Image.Image
    answers: dict[str, str]


def _add_colour_noise(rng: random.Random, colour: str | None) -> tuple[int, int, int]:
    """Colour with this name, or grey, with a small random change."""
    exact = GREY if colour is None else COLOURS[colour]
    r, g, b = (min(255, max(0, c + rng.randint(-COLOUR_NOISE, COLOUR_NOISE))) for c in exact)
    return r, g, b


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, box: Sequence[int], fill: tuple[int, int, int]
) -> None:
    x0, y0, x1, y1 = box
    if shape == "circle":
        draw.ellipse((x0, y0, x1, y1), fill=fill)
    elif shape == "square":
        draw.rectangle((x0, y0, x1, y1), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x0, y1), (x1, y1), ((x0 + x1) // 2, y0)], fill=fill)
    else:
        third = (x1 - x0) // 3
        draw.rectangle((x0 + third, y0, x1 - third, y1), fill=fill)
        draw.rectangle((x0, y0 + third, x1, y1 - third), fill=fill)


def shape_picture(rng: random.Random, kind: str, size: tuple[int, int]) -> Picture:
    """Draw one large shape near the middle; `size` is (width, height).

    Asked for `background` both colours are free; for `shape_colour` the background is grey; for `shape` the
    shape is black on a light background.
    """
    width, height = size
    colours = rng.sample(list(COLOURS), 2)
    back: str | None = colours[0]
    front = colours[1]
    if kind == "shape_colour":
        # A model first learns which colours an image holds, and only much later which belongs where: two
        # colours in every picture would take it several times as long.
        back = None
    elif kind == "shape":
        back, front = rng.choice(LIGHT), "black"
    shape = rng.choice(SHAPES)
    image = Image.new("RGB", size, _add_colour_noise(rng, back))
    side = int(min(size) * rng.uniform(0.7, 0.85))
    # The shape moves by a tenth of the free room at most, so that it is always near the middle.
    x0 = int((width - side) * rng.uniform(0.4, 0.6))
    y0 = int((height - side) * rng.uniform(0.4, 0.6))
    _draw_shape(ImageDraw.Draw(image), shape, (x0, y0, x0 + side, y0 + side), _add_colour_noise(rng, front))
    answers = {"background": back, "shape_colour": front, "shape": shape}
    return Picture(image, {kind: answer for kind, answer in answers.items() if answer is not None})


def _halves_picture(rng: random.Random, size: tuple[int, int]) -> Picture:
    # Upper and lower, not left and right: tokens run row by row, so a half is one stretch of them.
    width, height = size
    upper, lower = rng.sample(list(COLOURS), 2)
    image = Image.new("RGB", size, _add_colour_noise(rng, upper))
    middle = int(height * rng.uniform(0.47, 0.53))
    ImageDraw.Draw(image).rectangle((0, middle, width, height), fill=_add_colour_noise(rng, lower))
    return Picture(image, {"upper": upper, "lower": lower})


def _count_picture(rng: random.Random, size: tuple[int, int]) -> Picture:
    width, height = size
    back = rng.choice(LIGHT)
    count = rng.randrange(len(COUNTS)) + 1
    image = Image.new("RGB", size, _add_colour_noise(rng, back))
    draw, fill = ImageDraw.Draw(image), _add_colour_noise(rng, "black")
    radius = min(width, height) * rng.uniform(0.18, 0.22)
    # One dot in the middle of each of the first quadrants, in reading order.
    for slot in range(count):
        x = width * (0.25 + 0.5 * (slot % 2) + rng.uniform(-0.03, 0.03))
        y = height * (0.25 + 0.5 * (slot // 2) + rng.uniform(-0.03, 0.03))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return Picture(image, {"background": back, "count": COUNTS[count - 1]})


def _word_picture(rng: random.Random, size: tuple[int, int]) -> Picture:
    width, height = size
    word = rng.choice(WORDS)
    back = rng.choice(LIGHT)
    image = Image.new("RGB", size, _add_colour_noise(rng, back))
    # The letters are stretched over the same part of every image, as the tiles stretch the image: a word then
    # always covers the same patches.
    font = ImageFont.load_default(size=100)
    bounds = font.getmask(word.upper(), mode="L", stroke_width=5).size
    mask = Image.new("L", (int(bounds[0]), int(bounds[1])))
    ImageDraw.Draw(mask).text(
        (bounds[0] / 2, bounds[1] / 2), word.upper(), fill=255, font=font, anchor="mm", stroke_width=5
    )
    box = mask.getbbox()
    letters = mask.crop(box).resize((int(width * 0.86), int(height * 0.6)), Image.Resampling.BICUBIC)
    shift = rng.uniform(-0.02, 0.02), rng.uniform(-0.02, 0.02)
    corner = int(width * (0.07 + shift[0])), int(height * (0.2 + shift[1]))
    image.paste(_add_colour_noise(rng, "black"), corner, letters)
    return Picture(image, {"background": back, "word": word})


def draw_picture(rng: random.Random, kind: str, size: tuple[int, int]) -> Picture:
    """Draw a picture of `size` (width, height) about which a question of `kind` can be asked."""
    if kind == "count":
        return _count_picture(rng, size)
    if kind == "word":
        return _word_picture(rng, size)
    if kind in ("upper", "lower"):
        return _halves_picture(rng, size)
    return shape_picture(rng, kind, size)
