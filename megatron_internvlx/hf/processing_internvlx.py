"""Images to tiles by RVTC, and text with image placeholders (remote code of this directory).

An image is stretched (bicubic, antialiased) to a grid of square tiles that fits its size and aspect
ratio; the whole image as one more tile follows every grid but 1x1.
"""

import base64
import http.client
import io
import os
import sys
import urllib.request

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BatchFeature, ProcessorMixin

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE, START, CONTEXT, END = "<image>", "<img>", "<IMG_CONTEXT>", "</img>"
SECONDS = 30  # that a server of images may take to answer
LARGEST = 64 << 20  # bytes of an image's file


def tile_grid(width, height, tile_size=448, min_tiles=1, max_tiles=12, policy="edge"):
    """(columns, rows) of tiles for an image; see data/rvtc.py of Megatron-InternVL-X.

    `policy` limits the number of tiles: edge to those that cover the image at its own size (the released rule), area
    to those that hold its pixels, off not at all.
    """
    if policy == "edge":
        max_tiles = min(max_tiles, -(-width // tile_size) * -(-height // tile_size))
    elif policy == "area":
        max_tiles = min(max_tiles, -(-width * height // tile_size**2))
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    best, best_distance = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)):
        distance = abs(width / height - columns / rows)
        # At equal distance the larger grid wins only if the image fills more than half of it.
        larger = distance == best_distance and 2 * width * height > tile_size**2 * columns * rows
        if distance < best_distance or larger:
            best, best_distance = (columns, rows), distance
    return best


def upright(image):
    """The image turned as its EXIF orientation says, as in training.

    EXIF that cannot be read, or that a PNG keeps behind its pixels, does not count.
    """
    if image.format == "PNG" and "exif" not in image.info:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def refusal(message):
    """A ValueError; in a process that serves HTTP one that is answered with status 400 and the message.

    `transformers serve` answers other errors of a processor with "500 Internal Server Error" only.
    """
    answered = getattr(sys.modules.get("starlette.exceptions"), "HTTPException", None)
    if answered is None:
        return ValueError(message)
    kind = type("Refused", (answered, ValueError), {"__str__": lambda self: self.detail})
    return kind(400, message)


def fetch_image(address):
    """The image at an http(s) address, or in a `data:` URI in base64, as OpenAI's chat requests have it.

    It is upright, in RGB, and has no metadata. Raises ValueError if it cannot be read.
    """
    try:
        if address.startswith("data:"):
            content = base64.b64decode(address.partition(",")[2])
        else:
            request = urllib.request.Request(address, headers={"User-Agent": "InternVL-X"})
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                content = answer.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it has more than {LARGEST >> 20} MiB")
        # An array, because metadata that a PNG has behind its pixels is known once these are read.
        return Image.fromarray(np.asarray(upright(Image.open(io.BytesIO(content))).convert("RGB")))
    except (
        OSError,
        RuntimeError,  # of the decoder of AVIF
        SyntaxError,
        ValueError,
        http.client.HTTPException,
        Image.DecompressionBombError,
    ) as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "its format is unknown, or it is no image" if unknown else error
        shown = address if len(address) <= 80 else address[:77] + "..."
        raise refusal(f"the image {shown} cannot be read: {reason}") from error


class InternVLXProcessor(ProcessorMixin):
    """Text with `<image>` placeholders, and images, to model inputs.

    `<IMG_CONTEXT>` is a placeholder too, which the chat template of transformers' own InternVL writes, in a
    prompt that has neither `<image>` nor an image's tokens already.

    Settings (processor_config.json): tile_size in pixels, tokens_per_tile, min_tiles, max_tiles (shared by
    the images of one prompt), use_thumbnail, dynamic_image_size (False: one tile per image), rvtc
    (the rule that limits the tiles: edge, area or off).
    """

    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer=None,
        chat_template=None,
        tile_size=448,
        tokens_per_tile=256,
        min_tiles=1,
        max_tiles=12,
        use_thumbnail=True,
        dynamic_image_size=True,
        rvtc="edge",
        **_kwargs,
    ):
        super().__init__(tokenizer, chat_template=chat_template)
        self.tile_size, self.tokens_per_tile = tile_size, tokens_per_tile
        self.min_tiles, self.max_tiles = min_tiles, max_tiles
        self.use_thumbnail, self.dynamic_image_size, self.rvtc = use_thumbnail, dynamic_image_size, rvtc

    @property
    def model_input_names(self):
        """What `__call__` returns."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def tiles(self, image, max_tiles=None):
        """One image to normalised tiles [t, 3, S, S].

        `image`: a PIL image, an array that PIL takes, a path, an http(s) address or a `data:` URI.
        """
        if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
            image = fetch_image(image)
        elif isinstance(image, str | os.PathLike):
            image = Image.open(image)
        elif not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image))
        image = upright(image).convert("RGB")
        size, columns, rows = self.tile_size, 1, 1
        if self.dynamic_image_size:
            columns, rows = tile_grid(
                image.width, image.height, size, self.min_tiles, max_tiles or self.max_tiles, self.rvtc
            )
        whole = np.asarray(image.resize((columns * size, rows * size)))
        cut = whole.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
        if self.use_thumbnail and columns * rows > 1:
            cut = np.concatenate([cut, np.asarray(image.resize((size, size)))[None]])
        pixels = torch.from_numpy(cut.copy()).permute(0, 3, 1, 2).float().div_(255)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return pixels.sub_(mean).div_(std)

    def __call__(self, images=None, text=None, padding=True, return_tensors="pt", **kwargs):
        """Tokens and tiles of one prompt or a list of prompts.

        Args:
            images: for one prompt an image or a list; for several prompts a list of lists, or a flat list that
                is dealt out in the order of the placeholders.
            text: prompts, each with one `<image>` per image of it.
            padding: prompts are padded on the left to the longest.
            return_tensors: only "pt".
            kwargs: for the tokenizer.

        Raises:
            ValueError: images and placeholders do not fit.
        """
        if text is None or return_tensors != "pt":
            raise ValueError("the processor needs text, and returns PyTorch tensors")
        prompts = [text] if isinstance(text, str) else list(text)
        marks = [IMAGE if IMAGE in prompt or START in prompt else CONTEXT for prompt in prompts]
        counts = [prompt.count(mark) for prompt, mark in zip(prompts, marks, strict=True)]
        dealt = self._deal(images, counts)
        pixels, filled = [], []
        for prompt, mark, own in zip(prompts, marks, dealt, strict=True):
            limit = max(1, self.max_tiles // max(1, len(own)))
            before, *rest = prompt.split(mark)
            for image, after in zip(own, rest, strict=True):
                tiles = self.tiles(image, limit)
                before += START + CONTEXT * (self.tokens_per_tile * len(tiles)) + END + after
                pixels.append(tiles)
            filled.append(before)
        if kwargs.pop("videos", None) or kwargs.pop("audio", None):
            raise refusal("the model takes images and text, no video and no audio")
        kwargs.pop("padding_side", None)
        data = dict(
            self.tokenizer(filled, padding=padding, padding_side="left", return_tensors="pt", **kwargs)
        )
        data.pop("token_type_ids", None)
        if pixels:
            data["pixel_values"] = torch.cat(pixels)
        return BatchFeature(data=data)

    def _deal(self, images, counts):
        if images is None:
            images = []
        elif not isinstance(images, list | tuple):
            images = [images]
        if images and isinstance(images[0], list | tuple):
            dealt = [list(own) for own in images]
        elif len(images) == sum(counts):
            flat = iter(images)
            dealt = [[next(flat) for _ in range(count)] for count in counts]
        else:
            dealt = [list(images)] if len(counts) == 1 else []
        if [len(own) for own in dealt] != counts:
            given = [len(own) for own in dealt] or len(images)
            raise refusal(f"{counts} {IMAGE} placeholders per prompt, but images are {given}")
        return dealt

    def batch_decode(self, *args, **kwargs):
        """As the tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs):
        """As the tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)
