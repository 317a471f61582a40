"""Set-up of every test session: one thread per process, and the golden weight files restored."""

import torch

from tests import golden_weights


def pytest_configure() -> None:
    torch.set_num_threads(1)
    golden_weights.materialize()
