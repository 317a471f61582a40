"""What the server of the rank pool imports before it forks ranks; see `distributed.py`."""

from megatron_internvlx import platform

platform.setup()

import torch  # noqa: E402
from megatron import training  # noqa: E402, F401
from megatron.core.models import gpt  # noqa: E402, F401

torch.set_num_threads(1)
