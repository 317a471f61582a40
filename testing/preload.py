"""What the server of the rank pool imports before it forks ranks (see `rank_pool.py`): all that is slow."""

import argparse
import gc
from typing import Any

from megatron_internvlx import platform

platform.setup()

import pytest  # noqa: E402, F401 (ranks import the main program's module)
import torch  # noqa: E402
import torch._dynamo  # noqa: E402 (torch's optimizers import it in their first step)
import transformers  # noqa: E402
from megatron import training  # noqa: E402, F401
from megatron.core.models import gpt  # noqa: E402, F401
from megatron.core.tokenizers.utils import build_tokenizer  # noqa: E402, F401
from megatron.training import argument_utils  # noqa: E402
from megatron.training.arguments import add_megatron_arguments  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402, F401

from megatron_internvlx.training import builder, step  # noqa: E402, F401


# Megatron reads the documentation of every argument from its sources at each start, a third of the work of a
# short job. The ranks keep what the first reading gave.
def read_once(method: Any) -> Any:
    """The method with its answer kept per class."""
    known: dict[type, dict[str, str]] = {}

    def cached(self: Any, kind: type) -> dict[str, str]:
        if kind not in known:
            known[kind] = method(self, kind)
        return known[kind]

    return cached


factory: Any = argument_utils.ArgumentGroupFactory
factory._get_field_docstrings = read_once(factory._get_field_docstrings)
add_megatron_arguments(argparse.ArgumentParser())

_ = transformers.AutoTokenizer  # its modules are loaded when first named
torch.set_num_threads(1)
# The collector would write to every object, and so copy the pages that forked ranks share with the server.
gc.collect()
gc.freeze()
