"""Set-up of every test session: one thread per process, the golden weight files restored, a pool of ranks."""

from collections.abc import Iterator

import pytest
import torch

from tests import golden_weights
from tests.distributed import Pool


def pytest_configure() -> None:
    torch.set_num_threads(1)
    golden_weights.materialize()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Real gloo ranks; see `distributed.py`."""
    ranks = Pool()
    yield ranks
    ranks.close()
