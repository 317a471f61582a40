"""Training sample: a record of the manifest, tokenized, its images measured but not yet decoded."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_internvlx.data.conversation import IMAGE, check_tokenizer, encode, get_template
from megatron_internvlx.data.decode_pil import image_size
from megatron_internvlx.data.manifest import Record
from megatron_internvlx.data.packing import Budget, Cost
from megatron_internvlx.data.plan import FILLER, IGNORE, supervised_tokens
from megatron_internvlx.data.quirks import NO_QUIRKS, ReleasedQuirks
from megatron_internvlx.data.rejects import BadSample, blamed_on, printable
from megatron_internvlx.data.rvtc import POLICIES, tile_count, tile_grid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A text with more characters per available token is rejected unread. English has four per token.
MOST_CHARACTERS_PER_TOKEN = 64
SHORT_TEXT = 65_536  # characters; tokenized in a fifth of a second

# Upright width and height of an image, from its path. Raises BadSample if there is none.
SizeOf = Callable[[str], tuple[int, int]]

__all__ = ["BadSample", "EncoderSettings", "ImageTiles", "Sample", "SampleEncoder"]


@dataclass(frozen=True)
class ImageTiles:
    """Image of a sample: path, upright size in pixels, and grid in tiles."""

    path: str
    width: int
    height: int
    cols: int
    rows: int
    thumbnail: bool

    @property
    def num_tiles(self) -> int:
        """Number of tiles, including the thumbnail, which a 1x1 grid does not have."""
        return tile_count(self.cols, self.rows, thumbnail=self.thumbnail)


@dataclass
class Sample:
    """Tokenized record of n tokens in the layout of the deep phase."""

    key: str
    """Name of the record in messages."""
    input_ids: np.ndarray
    """int64 [n] token ids."""
    labels: np.ndarray
    """int64 [n], not shifted; -100 where ignored."""
    images: tuple[ImageTiles, ...]
    is_visual: np.ndarray
    """bool [n], True at rows of image features, in the order of `images` and of their tiles."""
    jpeg_augment: bool
    """Whether the decoder applies the released JPEG augmentation."""
    attention_mask: np.ndarray | None = None
    """bool [n]; None unless a released quirk masks tokens."""
    dropped_tokens: int = 0
    """Tokens cut from the end by a limit of length or of supervised tokens."""
    dropped_tiles: int = 0
    """Tiles removed to fit a packing budget."""
    number: int = 0
    """Position of the record in the unshuffled data set; set by the loader."""

    @property
    def num_tiles(self) -> int:
        """Number of tiles of all images; 0 for a text-only sample."""
        return sum(image.num_tiles for image in self.images)


@dataclass(frozen=True)
class EncoderSettings:
    """Settings of the conversion of records to samples."""

    template: str = "internvl2_5"
    """Chat template."""
    tile_size: int = 448
    """Side of a tile, in pixels."""
    max_tiles: int = 12
    """Maximum tiles of an image without the thumbnail; shared by the images of a record."""
    min_tiles: int = 1
    """Minimum tiles of an image without the thumbnail."""
    use_thumbnail: bool = True
    """Whether an image of several tiles is also added as one tile."""
    rvtc: str = "edge"
    """RVTC policy: off, edge or area."""
    tokens_per_tile: int = 256
    """Tokens of a tile in the deep phase."""
    max_length: int | None = None
    """Maximum tokens of a sample; None for no limit."""
    dynamic_image_size: bool = True
    """Whether images are cut into several tiles."""
    compat: ReleasedQuirks = field(default=NO_QUIRKS)
    """Behaviours of the released code to reproduce."""
    shallow_tokens_per_tile: int | None = None
    """Tokens of a tile in the shallow phase; None for those of the deep phase."""
    budget: Budget | None = None
    """Capacity of a pack; None without packing."""

    @property
    def shallow_per_tile(self) -> int:
        """Tokens of a tile in the shallow phase."""
        return self.shallow_tokens_per_tile or self.tokens_per_tile

    def __post_init__(self) -> None:
        get_template(self.template)
        for name in ("tile_size", "max_tiles", "min_tiles", "tokens_per_tile"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"min_tiles {self.min_tiles} must be at most max_tiles {self.max_tiles}")
        if self.rvtc not in POLICIES:
            raise ValueError(f"unknown RVTC policy {self.rvtc!r}: must be one of {', '.join(POLICIES)}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length {self.max_length} must be at least 2 tokens, or None for no limit")


def filler_sample() -> Sample:
    """Sample of two text tokens, one of them supervised, for a micro-batch without any sample; see `plan.FILLER`."""
    ids = np.zeros(2, np.int64)
    labels = np.asarray([IGNORE, 0], np.int64)
    return Sample("filler", ids, labels, (), np.zeros(2, bool), jpeg_augment=False, number=FILLER)


def parse_record(record: Record) -> tuple[list[str], list[dict[str, Any]]]:
    """Image paths and turns of a record. Raises BadSample if its fields are missing or malformed."""
    data, key = record.data, record.key
    turns = data.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        detail = "the record needs 'conversations', a list of {from, value}"
        if "messages" in data:
            detail += "; it has OpenAI's 'messages', which tools/convert_messages.py converts"
        raise BadSample(key, "missing_key", detail)
    if data.get("video"):
        raise BadSample(key, "video", "videos are not supported; convert them to images first")
    named = data.get("image") or []
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise BadSample(key, "bad_message", "'image' must be a path or a list of paths")
    for text in (*names, *(turn.get("value") for turn in turns)):
        if isinstance(text, str) and printable(text) != text:
            raise BadSample(
                key, "bad_message", "a text contains half of a surrogate pair (\\ud800 to \\udfff)"
            )
    # As in the released loader: only for an image given as a string, not for a list.
    if isinstance(named, str) and not any(IMAGE in str(turn.get("value")) for turn in turns):
        first = next((i for i, turn in enumerate(turns) if turn.get("from") == "human"), None)
        if first is not None and isinstance(turns[first].get("value"), str):
            turns = list(turns)
            turns[first] = {**turns[first], "value": f"{IMAGE}\n{turns[first]['value']}"}
    return [os.path.join(record.root, name) for name in names], turns  # noqa: PTH118 (keeps the path as written)


class SampleEncoder:
    """Converts records to samples: image sizes from the headers, RVTC grids, tokens and labels.

    Raises ValueError at construction if the tokenizer lacks the special tokens of the template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: EncoderSettings):
        check_tokenizer(tokenizer, settings.template)
        self.tokenizer = tokenizer
        self.settings = settings

    @property
    def apply_exif(self) -> bool:
        """Whether images are turned upright; the same for grids and decoding."""
        return not self.settings.compat.ignore_exif

    def cost(self, sample: Sample) -> Cost:
        """Cost of a sample in a pack."""
        deep, tiles = len(sample.input_ids), sample.num_tiles
        saved = self.settings.tokens_per_tile - self.settings.shallow_per_tile
        return Cost(deep - tiles * saved, deep, tiles, supervised_tokens(sample.labels))

    def encode(self, record: Record, size_of: SizeOf | None = None) -> Sample:
        """Sample of `record`. Raises BadSample, named by the record's key, if it is unusable.

        `size_of` gives recorded image sizes; without it headers are read. If a sample exceeds the packing budget, its
        images share one tile less until it fits or each has one tile; then its text is cut after the last whole
        answer that fits.
        """
        with blamed_on(record.key):
            return self._encode(record, size_of)

    def _encode(self, record: Record, size_of: SizeOf | None) -> Sample:
        paths, turns = parse_record(record)
        self._check_length(record.key, turns)
        sizes = [size_of(path) if size_of else image_size(path, apply_exif=self.apply_exif) for path in paths]
        # A data set may set its own maximum, which several images share, with at least one tile each.
        max_tiles = max(1, (record.max_tiles or self.settings.max_tiles) // max(1, len(paths)))
        images = self._cut(paths, sizes, max_tiles)
        budget = self.settings.budget
        if budget is None:
            return self._sample(record, turns, images, self.settings.max_length)
        sample = self._sample(record, turns, images, None)
        if budget.fits(self.cost(sample)):
            return sample
        return self._reduced(record, turns, sizes, max_tiles, sample, budget)

    def _check_length(self, key: str, turns: Sequence[dict[str, Any]]) -> None:
        """Reject a text that would be cut almost entirely, before tokenizing it takes half a minute."""
        budget = self.settings.budget
        limit = budget.deep if budget else self.settings.max_length
        length = sum(len(turn["value"]) for turn in turns if isinstance(turn.get("value"), str))
        if limit is not None and length > max(MOST_CHARACTERS_PER_TOKEN * limit, SHORT_TEXT):
            raise BadSample(
                key,
                "too_long",
                f"{length:,} characters for {limit:,} tokens, over {MOST_CHARACTERS_PER_TOKEN} per token: nearly "
                "all would be cut; split the record",
            )

    def _reduced(
        self,
        record: Record,
        turns: list[dict[str, Any]],
        sizes: Sequence[tuple[int, int]],
        max_tiles: int,
        whole: Sample,
        budget: Budget,
    ) -> Sample:
        """Sample that fits `budget`: with fewer tiles, then with less text."""
        per_tile, shallow = self.settings.tokens_per_tile, self.settings.shallow_per_tile
        if budget.supervised is not None:
            # No tile makes room for supervised tokens, and none is given up for text that goes with them.
            whole = self._sample(record, turns, whole.images, None, budget.supervised)
            if budget.fits(self.cost(whole)):
                return whole
        text = len(whole.input_ids) - whole.num_tiles * per_tile
        most = min((budget.deep - text) // per_tile, (budget.shallow - text) // shallow)
        most = min(most, budget.tiles) if budget.tiles is not None else most
        images, paths = whole.images, [image.path for image in whole.images]
        while max_tiles > 1 and sum(image.num_tiles for image in images) > most:
            max_tiles -= 1
            images = self._cut(paths, sizes, max_tiles)
        tiles = sum(image.num_tiles for image in images)
        if budget.tiles is not None and tiles > budget.tiles:
            raise BadSample(
                record.key,
                "too_many_images",
                f"{len(paths)} images of one tile each exceed the {budget.tiles} tiles of a pack: "
                "raise --max-tiles-per-pack or split the record",
            )
        limit = min(budget.deep, budget.shallow + tiles * (per_tile - shallow))
        sample = self._sample(record, turns, images, limit, budget.supervised)
        sample.dropped_tiles = whole.num_tiles - tiles
        return sample

    def _sample(
        self,
        record: Record,
        turns: list[dict[str, Any]],
        images: tuple[ImageTiles, ...],
        max_length: int | None,
        max_supervised: int | None = None,
    ) -> Sample:
        per_tile = self.settings.tokens_per_tile
        text = encode(
            self.tokenizer,
            self.settings.template,
            turns,
            image_tokens=[image.num_tiles * per_tile for image in images],
            max_length=max_length,
            max_supervised=max_supervised,
            compat=self.settings.compat,
            key=record.key,
        )
        sample = Sample(
            key=record.key,
            input_ids=text.input_ids,
            labels=text.labels,
            images=images[: text.num_images],
            is_visual=text.is_visual,
            jpeg_augment=record.data_augment,
            attention_mask=text.attention_mask,
            dropped_tokens=text.dropped_tokens,
        )
        placeholders, features = int(sample.is_visual.sum()), sample.num_tiles * per_tile
        if placeholders != features:
            raise BadSample(
                record.key,
                "placeholder_mismatch",
                f"{placeholders} placeholder tokens for {features} image features "
                f"({sample.num_tiles} tiles of {per_tile} tokens)",
            )
        return sample

    def _cut(
        self, paths: Sequence[str], sizes: Sequence[tuple[int, int]], max_tiles: int
    ) -> tuple[ImageTiles, ...]:
        """Images with their grids, each of at most `max_tiles` tiles."""
        settings = self.settings
        images = []
        for path, (width, height) in zip(paths, sizes, strict=False):
            cols, rows = 1, 1
            if settings.dynamic_image_size:
                cols, rows = tile_grid(
                    width,
                    height,
                    tile_size=settings.tile_size,
                    min_tiles=settings.min_tiles,
                    max_tiles=max_tiles,
                    policy=settings.rvtc,
                )
            images.append(ImageTiles(path, width, height, cols, rows, settings.use_thumbnail))
        return tuple(images)
