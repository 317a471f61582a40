"""The Hugging Face tokenizer of a model directory."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=4)
def load_tokenizer(directory: str):
    """Load a tokenizer from a local directory. Raises ValueError if there is none."""
    from transformers import AutoTokenizer

    if not Path(directory).is_dir():
        raise ValueError(f"--tokenizer-model {directory}: no such directory")
    try:
        # Never run code of a model directory, and never prompt for permission on the terminal.
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer-model {directory}: the tokenizer cannot be loaded: {error}") from error
