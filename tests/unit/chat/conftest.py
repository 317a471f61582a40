"""A tiny model as `export` writes it, loaded once, and pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_internvlx.chat.loading import Source, load_chat
from megatron_internvlx.chat.session import Chat
from megatron_internvlx.checkpoint.exporter import export_checkpoint
from megatron_internvlx.checkpoint.importer import import_checkpoint
from megatron_internvlx.evaluation.generation import Sampling
from tests.converting import lvtc_config, make_directory

SAMPLING = Sampling(8)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with LVTC; `ck` beside it is its checkpoint."""
    root = tmp_path_factory.mktemp("chat")
    source = make_directory(root / "source", lvtc_config(), tokenizer=True)
    import_checkpoint(source, root / "ck", quiet=True, processes=1)
    export_checkpoint(root / "ck", root / "hf", quiet=True, processes=1)
    return root / "hf"


@pytest.fixture(scope="session")
def chat(exported: Path) -> Chat:
    return load_chat(Source(exported))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Picture of 40 x 20 pixels: a grid of two tiles, and a thumbnail. Its path has a space."""
    return save_picture(tmp_path / "my photo.png", 40, 20)


def save_picture(path: Path, width: int, height: int) -> Path:
    drawn = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3))
    Image.fromarray(drawn.astype(np.uint8)).save(path)
    return path
