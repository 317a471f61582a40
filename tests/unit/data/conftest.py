"""A small conversation data set on disk, and the golden tokenizers."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.data.sample import EncoderSettings, SampleEncoder

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(GOLDEN / "data" / "tokenizers" / "qwen2_fast")


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def record(image, *texts):
    entry = {"conversations": turns(*texts)}
    return entry if image is None else {"image": image, **entry}


class DiskSet:
    """Writes images, JSONL files and meta.json below one folder."""

    def __init__(self, folder):
        self.folder = folder
        self.meta = {}

    def image(self, name, width, height, **options):
        pixels = np.random.default_rng(width * 7919 + height).integers(
            0, 255, (height // 8 + 1, width // 8 + 1, 3)
        )
        picture = Image.fromarray(pixels.astype(np.uint8)).resize((width, height))
        picture.save(self.folder / name, **options)
        return name

    def add(self, name, records, **entry):
        lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
        (self.folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        self.meta[name] = {"root": "", "annotation": f"{name}.jsonl", "data_augment": False, **entry}
        return self

    def manifest(self):
        (self.folder / "meta.json").write_text(json.dumps(self.meta))
        return Manifest(self.folder / "meta.json")


@pytest.fixture
def disk(tmp_path):
    return DiskSet(tmp_path)


@pytest.fixture
def encoder(tokenizer):
    def make(**settings):
        given = {"tile_size": 32, "max_tiles": 6, "tokens_per_tile": 4, "max_length": 600, **settings}
        return SampleEncoder(tokenizer, EncoderSettings(**given))

    return make
