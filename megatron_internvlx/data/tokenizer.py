"""The Hugging Face tokenizer of a model directory."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_internvlx.data.internlm2_tokenizer import internlm2_tokenizer, is_internlm2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@lru_cache(maxsize=4)
def load_tokenizer(directory: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local directory. Raises ValueError if there is none."""
    if not Path(directory).is_dir():
        raise ValueError(f"--tokenizer-model {directory}: no such directory")
    try:
        return read_tokenizer(Path(directory))
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer-model {directory}: the tokenizer cannot be loaded: {error}") from error


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of a directory, whose Python code is never run; InternLM2's is read without it.

    Raises whatever transformers raises for the files of the directory, mostly OSError or ValueError.
    """
    from transformers import AutoTokenizer

    if is_internlm2(directory):
        return internlm2_tokenizer(directory)
    # Without the argument it prompts for permission on the terminal.
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
