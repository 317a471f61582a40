"""What the server of the rank pool imports before it forks ranks (see `distributed.py`): all that is slow."""

import gc

from megatron_internvlx import platform

platform.setup()

import pytest  # noqa: E402, F401 (ranks import the main program's module)
import torch  # noqa: E402
import torch._dynamo  # noqa: E402 (torch's optimizers import it in their first step)
import transformers  # noqa: E402
from megatron import training  # noqa: E402, F401
from megatron.core.models import gpt  # noqa: E402, F401
from megatron.core.tokenizers.utils import build_tokenizer  # noqa: E402, F401
from tokenizers import Tokenizer  # noqa: E402, F401

from megatron_internvlx.model import builder  # noqa: E402, F401
from megatron_internvlx.training import step  # noqa: E402, F401

_ = transformers.AutoTokenizer  # its modules are loaded when first named
torch.set_num_threads(1)
# The collector would write to every object, and so copy the pages that forked ranks share with the server.
gc.collect()
gc.freeze()
