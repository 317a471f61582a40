"""Set-up of every test session: CPU only unless GPU tests are asked for, golden weights, a pool of ranks."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests import golden_weights
from tests.distributed import Pool


def pytest_configure(config: pytest.Config) -> None:
    if "gpu" not in config.getoption("-m"):
        # The suite means the same on every machine; torch looks at this when first asked for devices.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    golden_weights.materialize()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # With several processes (make test), what uses the pool stays together: one pool per machine.
        shared = "pool" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("ranks" if shared else item.path.name))
        if item.path.parent.name == "heavy":
            item.add_marker(pytest.mark.heavy)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Real gloo ranks; see `distributed.py`."""
    ranks = Pool()
    yield ranks
    ranks.close()
